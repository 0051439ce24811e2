"""The plan of a build: which rows each span holds and which rows share a batch. Fixed by the manifest.

The scan reads the corpus once: it counts rows, fingerprints them, and notes for every span where in the
corpus it begins and what it must contain, so that any span can be built alone, later, or elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ghoststore.corpus import Corpus, Position, Sample, Scan, scan_samples
from ghoststore.corpus.repeated import Repeated, RepeatedIds, repeated_words
from ghoststore.errors import CorpusError, MismatchError
from ghoststore.progress import Progress, Silent
from ghoststore.store import Part
from ghoststore.store.base.manifest import Difference, difference_lines
from ghoststore.store.part.part import span_table
from indexer.encode.tokens import SAMPLES_AT_ONCE, Row, Tokenizer, TokenSettings, rows_of

COLUMNS = ("source_row", "window", "file", "offset", "digest")
"""Columns of the span table; ``digest`` is a 64-bit hash of the samples that the span's rows come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPlan:
    """What the scan found."""

    scan: Scan
    rows: int
    """Rows of the part: samples, or windows of samples."""
    tokens: int | None
    """Tokens in all rows, where the scan had to tokenize."""
    table: NDArray[np.int64]
    """(spans, 5), see COLUMNS."""
    before: NDArray[np.int64]
    """(spans,): planned samples before the one that each span begins with."""
    repeated_ids: Repeated | None
    """None where every sample has an id of its own."""


class SpanDigest:
    """Hash of the samples that a span's rows come from, each counted once."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._last = -1

    def add(self, sample: Sample) -> None:
        """Count ``sample`` if it is not the one counted last."""
        if sample.source_row != self._last:
            self._last = sample.source_row
            self._hash.update(sample.digest().to_bytes(8, "little"))

    def value(self) -> int:
        """The hash as a signed 64-bit integer."""
        return int.from_bytes(self._hash.digest(), "little", signed=True)


class _TableBuilder:
    """Notes the first row of every span and the digest of its samples, as rows go by."""

    def __init__(self, span_rows: int) -> None:
        self.span_rows = span_rows
        self.rows = 0
        self.samples = 0
        self.entries: list[list[int]] = []
        self.before: list[int] = []
        self._digest = SpanDigest()

    def add(self, sample: Sample, rows: int) -> None:
        """``rows`` rows of ``sample`` follow."""
        for window in range(rows):
            if self.rows % self.span_rows == 0:
                self._close()
                self.entries.append([sample.source_row, window, sample.file, sample.offset, 0])
                self.before.append(self.samples)
                self._digest = SpanDigest()
            self._digest.add(sample)
            self.rows += 1
        self.samples += 1

    def _close(self) -> None:
        if self.entries:
            self.entries[-1][4] = self._digest.value()

    def table(self) -> NDArray[np.int64]:
        self._close()
        return np.array(self.entries, dtype=np.int64).reshape(-1, len(COLUMNS))


def plan_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: TokenSettings,
    *,
    span_rows: int,
    max_samples: int | None = None,
    tokenize: bool = False,
    on_sample: Callable[[Sample], None] | None = None,
    progress: Progress | None = None,
) -> CorpusPlan:
    """Scan ``corpus`` (its first ``max_samples`` samples) for spans of ``span_rows`` rows.

    Tokenizes only where the number of rows depends on it (``window``, ``error``), where the tokenizer has tokens that
    the model's embedding lacks, or ``tokenize`` asks. ``on_sample`` is shown every sample. Ids that samples share are
    counted, and noted.
    Raises CorpusError for a malformed row, an overlong sample under ``error``, and a corpus without rows;
    MismatchError for tokens of another tokenizer; UsageError for a row with a token that the embedding lacks.
    """
    table = _TableBuilder(span_rows)
    tokens, lengths_needed = 0, tokenize or settings.needs_lengths or tokenizer.exceeds
    waiting: list[Sample] = []
    named, ids = corpus.resolved.id is not None, RepeatedIds()  # without a field, ids are places: no two are the same

    def flush() -> None:
        nonlocal tokens
        for sample, rows in zip(waiting, tokenizer.rows(waiting, settings), strict=True):
            tokens += sum(len(row.tokens) for row in rows)
            table.add(sample, len(rows))
        waiting.clear()

    def see(sample: Sample) -> None:
        tokenizer.check(sample)
        if named:
            ids.add(sample.id)
        if on_sample is not None:
            on_sample(sample)
        if not lengths_needed:
            table.add(sample, 1)
            return
        waiting.append(sample)
        if len(waiting) == SAMPLES_AT_ONCE:
            flush()

    progress = progress or Silent()
    with closing(progress.task("scanning corpus", None)) as task:
        seen = 0

        def scanned(rows: int) -> None:
            nonlocal seen
            task.advance(rows - seen)
            seen = rows

        scan = scan_samples(corpus.samples(), max_rows=max_samples, on_sample=see, progress=scanned)
    if waiting:
        flush()
    if not scan.rows:
        of = "" if corpus.domains is None else f" of {', '.join(map(repr, sorted(corpus.domains)))}"
        raise CorpusError(f"{corpus.source}: has no rows{of}")
    repeated_ids = ids.count()
    if words := repeated_words(repeated_ids):
        progress.note(f"{corpus.source}: {words}")
    return CorpusPlan(
        scan=scan,
        rows=table.rows,
        tokens=tokens if lengths_needed else None,
        table=table.table(),
        before=np.array(table.before, dtype=np.int64),
        repeated_ids=repeated_ids,
    )


def rows_of_spans(
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: TokenSettings,
    plan: CorpusPlan,
    sizes: Sequence[int],
    spans: Sequence[int],
) -> Iterator[tuple[int, list[Row]]]:
    """(span, its rows) for each of ``spans``, ascending. Neighbouring spans are read in one go.

    ``sizes[span]`` is its number of rows. Nothing is read beyond the samples that were planned.
    MismatchError where the corpus is not the one that was planned.
    """
    table = plan.table
    for run in _neighbours(spans):
        source_row, window, file, offset, _ = (int(value) for value in table[run[0]])
        start = Position(source_row=source_row, file=file, offset=offset)
        planned = islice(_unless_unreadable(corpus, start), plan.scan.rows - int(plan.before[run[0]]))
        rows = rows_of(planned, tokenizer, settings)
        for span in run:
            try:
                if span == run[0]:
                    for _ in islice(rows, window):
                        pass
                found = list(islice(rows, sizes[span]))
            except _Unreadable as error:
                raise _changed(corpus, table, span) from error
            digest = SpanDigest()
            for row in found:
                digest.add(row.sample)
            if len(found) != sizes[span] or digest.value() != int(table[span][4]):
                raise _changed(corpus, table, span)
            yield span, found


class _Unreadable(MismatchError):
    """The corpus could be read when it was planned, and cannot be now."""


def _unless_unreadable(corpus: Corpus, start: Position) -> Iterator[Sample]:
    try:
        yield from corpus.samples(start)
    except CorpusError as error:
        raise _Unreadable(str(error)) from error


def other_places(part: Part, table: NDArray[np.int64], source: Mapping[str, Any], store: Path) -> MismatchError:
    """What to raise where the samples of ``part`` lie elsewhere in the corpus ``source`` of a manifest, by its span
    ``table``: rows lead back to their samples by these places.
    """
    stored, kept = span_table(part), part.manifest["source"]
    found: list[Difference] = [
        (f"source.{name}", kept.get(name), source.get(name))
        for name in ("form", "data")
        if kept.get(name) != source.get(name)
    ]
    if stored.shape == table.shape:
        span = int(np.flatnonzero((stored != table).any(axis=1))[0])
        begins = f"span {span} begins at"
        columns = zip(COLUMNS, stored[span].tolist(), table[span].tolist(), strict=True)
        found += [(f"{begins} {name}", old, new) for name, old, new in columns if old != new]
    return MismatchError(
        f"part {part.name!r} of {store} was built from the same samples in another form or file, in which they lie at "
        f"other places; nothing was changed:\n{difference_lines(found)}\n"
        f"Give the corpus it was begun with to continue it, --data {kept.get('data')}, or another --name for a new one"
    )


def _changed(corpus: Corpus, table: NDArray[np.int64], span: int) -> MismatchError:
    return MismatchError(
        f"{corpus.source} has changed since it was planned: the samples from row {table[span][0]} on are not those "
        f"of span {span}. Restore the corpus, or begin anew under another name (--name, --out)"
    )


def _neighbours(spans: Sequence[int]) -> Iterator[list[int]]:
    """``spans`` cut into runs of consecutive numbers."""
    run: list[int] = []
    for span in spans:
        if run and span != run[-1] + 1:
            yield run
            run = []
        run.append(span)
    if run:
        yield run
