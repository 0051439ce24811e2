"""Whether the corpus behind a part or a run is still the one it was made on; and where each of its samples stands."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice

from ghoststore.corpus import Corpus, Position, Sample, SampleScan
from ghoststore.corpus.joined import JoinedCorpora
from ghoststore.corpus.scan import Fingerprint
from ghoststore.errors import MismatchError
from ghoststore.progress import Progress, counted
from ghoststore.store import Part, Run


class Places:
    """Where each sample of a corpus lies (file and offset), collected in a pass over it, or over stretches of it. 12
    bytes a sample.
    """

    def __init__(self) -> None:
        self._first: list[int] = []
        """Of each stretch its first sample …"""
        self._at: list[int] = []
        """… and how many samples come before it."""
        self._next = 0
        self._file = array("i")
        self._offset = array("q")

    def add(self, sample: Sample) -> None:
        """Add the next sample."""
        if not self._first or sample.source_row != self._next:
            self._first.append(sample.source_row)
            self._at.append(len(self._file))
        self._next = sample.source_row + 1
        self._file.append(sample.file)
        self._offset.append(sample.offset)

    def of(self, source_rows: Iterable[int]) -> list[Position]:
        """The positions of these samples."""
        found = []
        for row in source_rows:
            stretch = bisect_right(self._first, row) - 1
            at = self._at[stretch] + row - self._first[stretch]
            found.append(Position(source_row=row, file=self._file[at], offset=self._offset[at]))
        return found


def all_unchanged(corpus: Corpus | JoinedCorpora, source: Part | Run, progress: Progress) -> Iterator[Sample]:
    """:func:`read_unchanged` of each of the corpora behind a part, a union or a run, as samples of ``corpus``."""
    if isinstance(corpus, Corpus):
        yield from read_unchanged(corpus, source, progress)
        return
    assert isinstance(source, Part)
    for place, (part, own) in enumerate(zip(source.members, corpus.corpora, strict=True)):
        yield from corpus.samples_of(place, read_unchanged(own, part, progress))


def read_unchanged(corpus: Corpus, source: Part | Run, progress: Progress, *, grown: bool = True) -> Iterator[Sample]:
    """Every sample of ``corpus`` that a part was built from, or a run trained on, in order.

    Samples that have come after them since are not read; without ``grown`` they, too, are a change.

    At the end, MismatchError with both fingerprints if the samples are no longer the same. CorpusError if the corpus
    cannot be read.
    """
    stored = source.manifest["corpus"]
    samples = islice(corpus.samples(), stored.get("skip_samples", 0), None)
    most = stored["samples"] if grown else stored.get("max_samples", stored["samples"])
    sample_scan = SampleScan(samples, max_rows=most, link=Fingerprint.link_of(stored["fingerprint"]))
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
