"""Whether the corpus behind a part or a run is still the one it was made on; and where each of its samples stands."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing

from ghoststore.corpus import Corpus, Position, Sample, SampleScan
from ghoststore.errors import MismatchError
from ghoststore.progress import Progress, counted
from ghoststore.store import Part, Run


class Places:
    """Where each sample of a corpus lies (file and offset), collected in a pass over it. 12 bytes a sample."""

    def __init__(self) -> None:
        self._file = array("i")
        self._offset = array("q")

    def add(self, sample: Sample) -> None:
        """Add the next sample."""
        self._file.append(sample.file)
        self._offset.append(sample.offset)

    def of(self, source_rows: Iterable[int]) -> list[Position]:
        """The positions of these samples."""
        return [Position(source_row=row, file=self._file[row], offset=self._offset[row]) for row in source_rows]


def read_unchanged(corpus: Corpus, source: Part | Run, progress: Progress) -> Iterator[Sample]:
    """Every sample of ``corpus`` that a part was built from, or a run trained on, in order.

    At the end, MismatchError with both fingerprints if the samples are no longer the same. CorpusError if the corpus
    cannot be read.
    """
    stored = source.manifest["corpus"]
    sample_scan = SampleScan(corpus.samples(), max_rows=stored.get("max_samples", stored["samples"]))
    with closing(progress.task("reading the corpus", stored["samples"], unit="samples")) as task:
        yield from counted(sample_scan, task)
    scan = sample_scan.finish()
    if scan.fingerprint != stored["fingerprint"]:
        raise MismatchError(
            f"{corpus.source} has changed since {source.kind.name} {source.name!r} was {source.kind.made} on it: "
            f"stored {stored['fingerprint']} ({stored['samples']:,} samples), found {scan.fingerprint} "
            f"({scan.rows:,}). Nothing was written; make the {source.kind.name} again on the corpus as it is, or bring "
            "the old one back"
        )
