"""The plan of a build: which rows of the corpus each span holds.

One scan of the corpus counts the rows, computes the fingerprint, and records for every span where it begins in the
corpus and the digest of its samples. So any span can be built alone, later, or on another machine.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ghoststore.corpus import Corpus, Position, Sample, SampleScan, Scan
from ghoststore.corpus.repeated import Repeated, RepeatedIds, repeated_words
from ghoststore.errors import CorpusError, MismatchError
from ghoststore.progress import Progress, Silent, counted
from ghoststore.store import Part
from ghoststore.store.base.manifest import difference_lines
from ghoststore.store.part.kept import KeptField
from ghoststore.store.part.part import span_table
from ghoststore.store.spans.layout import SAMPLE_COLUMNS
from indexer.build.kept_fields import KeptScan, kept_bytes
from indexer.encode.tokens import SAMPLES_AT_ONCE, Row, Tokenizer, TokenSettings, rows_of

COLUMNS = ("source_row", "window", "file", "offset", "digest")
"""Columns of the span table; ``digest`` is a 64-bit hash of the samples that the span's rows come from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPlan:
    """The result of the scan: the size of the part, and the table of its spans."""

    scan: Scan
    rows: int
    """Rows of the part: samples, or windows of samples."""
    tokens: int | None
    """Tokens in all rows; None if the scan did not have to tokenize."""
    table: NDArray[np.int64]
    """(spans, 5), see COLUMNS."""
    before: NDArray[np.int64]
    """(spans,): number of planned samples before the first sample of each span."""
    repeated_ids: Repeated | None
    """None if no two samples have the same id."""
    fields: tuple[KeptField, ...] = ()
    """Fields that are kept as columns."""
    kept_fingerprint: str | None = None
    """Of their values; None without any."""
    head: dict[str, Any] | None = None
    """Of a stream: the number and the fingerprint of the samples at its beginning that the projection may learn from.
    None for other corpora."""
    goes_on: bool = False
    """Whether the corpus has more than the samples that a part was begun with, if these alone are planned."""


class SpanDigest:
    """Hash of the samples that a span's rows come from, each counted once."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._last = -1

    def add(self, sample: Sample) -> None:
        """Add ``sample``, unless it is the one added last."""
        if sample.source_row != self._last:
            self._last = sample.source_row
            self._hash.update(sample.digest().to_bytes(8, "little"))
            if sample.kept:
                self._hash.update(kept_bytes(sample))

    def value(self) -> int:
        """The hash as a signed 64-bit integer."""
        return int.from_bytes(self._hash.digest(), "little", signed=True)


class _TableBuilder:
    """Collects the table of spans, sample by sample."""

    def __init__(self, span_rows: int) -> None:
        self.span_rows = span_rows
        self.rows = 0
        self.samples = 0
        self.entries: list[list[int]] = []
        self.before: list[int] = []
        self._digest = SpanDigest()

    def add(self, sample: Sample, rows: int) -> None:
        """Add ``sample``, which gives ``rows`` rows."""
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
        """(spans, 5) int64: the table of spans, see COLUMNS."""
        self._close()
        return np.array(self.entries, dtype=np.int64).reshape(-1, len(COLUMNS))


class LearningSample:
    """A random sample of ``count`` of the corpus's samples. It depends only on their places, so it is the same for
    every projection.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[int, int, Sample]] = []

    def see(self, sample: Sample) -> None:
        """Consider one more sample."""
        lot = xxhash.xxh3_64_intdigest(f"ghoststore/1|calibration|{sample.source_row}".encode())
        entry = (-lot, sample.source_row, sample)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    @property
    def samples(self) -> list[Sample]:
        """The chosen samples, in the order of the corpus."""
        return sorted((sample for _, _, sample in self._heap), key=lambda sample: sample.source_row)


def plan_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: TokenSettings,
    *,
    span_rows: int,
    skip_samples: int = 0,
    max_samples: int | None = None,
    known: int = 0,
    tokenize: bool = False,
    learning: LearningSample | None = None,
    progress: Progress | None = None,
) -> CorpusPlan:
    """Scan ``corpus`` (the first ``max_samples`` samples after ``skip_samples``) for spans of ``span_rows`` rows.

    A part of the first ``known`` of these samples exists: their own fingerprint tells whether the corpus only grew.
    Where these alone are planned, to complete it, the plan says whether others follow.

    The scan tokenizes only if the number of rows depends on it (``overlong`` is ``window`` or ``error``), if the
    tokenizer has tokens that the model's embedding lacks, or with ``tokenize``. ``learning`` sees every sample. A note
    counts ids that several samples share.

    Raises CorpusError for a malformed row, an overlong sample under ``error``, and a corpus without rows;
    MismatchError for tokens of another tokenizer; UsageError for a row with a token that the embedding lacks.
    """
    progress = progress or Silent()
    lengths_needed = tokenize or settings.needs_lengths or tokenizer.exceeds
    # Without an id field, ids are places in the corpus, which do not repeat.
    ids = None if corpus.resolved.id is None else RepeatedIds()
    kept = KeptScan(corpus) if corpus.keep else None
    all_samples = islice(corpus.samples(), skip_samples, None)
    sample_scan = SampleScan(all_samples, max_rows=max_samples, known=known)
    table, tokens = _TableBuilder(span_rows), 0
    with closing(progress.task("scanning corpus", None)) as task:
        samples = _checked(counted(sample_scan, task), tokenizer, ids, learning, kept)
        if lengths_needed:
            for sample, rows in _tokenized(samples, tokenizer, settings):
                table.add(sample, len(rows))
                tokens += sum(row.length for row in rows)
        else:
            for sample in samples:
                table.add(sample, 1)
    scan = sample_scan.finish()
    if not scan.rows:
        of = "" if corpus.domains is None else f" of {', '.join(map(repr, sorted(corpus.domains)))}"
        beyond = f" beyond the first {skip_samples:,}, which `skip_samples` leaves out" if skip_samples else ""
        raise CorpusError(f"{corpus.source}: has no rows{of}{beyond}")
    repeated_ids = None if ids is None else ids.count()
    if words := repeated_words(repeated_ids):
        progress.note(f"{corpus.source}: {words}")
    return CorpusPlan(
        scan=scan,
        rows=table.rows,
        tokens=tokens if lengths_needed else None,
        table=table.table(),
        before=np.array(table.before, dtype=np.int64),
        repeated_ids=repeated_ids,
        fields=() if kept is None else kept.fields(),
        kept_fingerprint=None if kept is None else kept.fingerprint,
        goes_on=0 < known == max_samples and _goes_on(all_samples),
    )


def _goes_on(samples: Iterator[Sample]) -> bool:
    """Whether another of ``samples`` follows, if only one that cannot be read: it may be about to be written."""
    try:
        return next(samples, None) is not None
    except CorpusError:
        return True


def planned_as(part: Part) -> CorpusPlan:
    """The plan that ``part`` was begun with, without reading the corpus.

    Only where each sample is one row. :func:`rows_of_spans` compares the samples of a span with their digest in the
    plan, so that another corpus is refused by the first span.
    """
    corpus, layout = part.manifest["corpus"], part.layout
    table = span_table(part)
    return CorpusPlan(
        scan=Scan(
            rows=int(corpus["samples"]),
            fingerprint=str(corpus["fingerprint"]),
            domains=corpus["domains"],
            text_bytes=0,
        ),
        rows=layout.rows,
        tokens=None,
        table=table,
        before=np.arange(len(table), dtype=np.int64) * layout.span_rows,
        repeated_ids=part.repeated_ids,
        fields=layout.fields,
        kept_fingerprint=corpus.get("kept_fingerprint"),
    )


def _checked(
    samples: Iterable[Sample],
    tokenizer: Tokenizer,
    ids: RepeatedIds | None,
    learning: LearningSample | None,
    kept: KeptScan | None,
) -> Iterator[Sample]:
    """``samples``, unchanged, after each was passed to ``tokenizer``, ``ids``, ``learning`` and ``kept``."""
    for sample in samples:
        tokenizer.check(sample)
        if ids is not None:
            ids.add(sample.id)
        if learning is not None:
            learning.see(sample)
        if kept is not None:
            kept.see(sample)
        yield sample


def _tokenized(
    samples: Iterable[Sample], tokenizer: Tokenizer, settings: TokenSettings
) -> Iterator[tuple[Sample, list[Row]]]:
    """Each of ``samples`` with its rows, tokenized some hundred at a time."""
    samples = iter(samples)
    while batch := list(islice(samples, SAMPLES_AT_ONCE)):
        yield from zip(batch, tokenizer.rows(batch, settings), strict=True)


def rows_of_spans(
    corpus: Corpus,
    tokenizer: Tokenizer,
    settings: TokenSettings,
    plan: CorpusPlan,
    sizes: Sequence[int],
    spans: Sequence[int],
) -> Iterator[tuple[int, list[Row]]]:
    """(span, its rows) for each of ``spans``, which are ascending. Neighbouring spans are read together.

    ``sizes[span]`` is the number of rows of a span. Nothing is read beyond the planned samples. MismatchError if the
    corpus has changed since it was planned.
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
                inside = list(islice(rows, sizes[span]))
            except _Unreadable as error:
                raise _changed(corpus, table, span) from error
            digest = SpanDigest()
            for row in inside:
                digest.add(row.sample)
            if len(inside) != sizes[span] or digest.value() != int(table[span][4]):
                raise _changed(corpus, table, span)
            yield span, inside


def sample_columns(rows: Sequence[Row], domains: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The columns that say which sample, or which window of a sample, each row is: see SAMPLE_COLUMNS."""
    codes: dict[str | None, int] = {domain: code for code, domain in enumerate(domains)}
    codes[None] = -1
    values: dict[str, list[Any]] = {
        "sample_id": [row.sample.id for row in rows],
        "domain": [codes[row.sample.domain] for row in rows],
        "source_row": [row.sample.source_row for row in rows],
        "source_file": [row.sample.file for row in rows],
        "source_offset": [row.sample.offset for row in rows],
        "source_digest": [row.sample.digest() for row in rows],
        "window_start": [row.window_start for row in rows],
        "n_tokens": [row.n_tokens for row in rows],
    }
    dtypes = {name: object if dtype is str else dtype for name, dtype in SAMPLE_COLUMNS.items()}
    return {name: np.array(values[name], dtype=dtype) for name, dtype in dtypes.items()}


class _Unreadable(MismatchError):
    """The corpus cannot be read any more, although it could be when it was planned."""


def _unless_unreadable(corpus: Corpus, start: Position) -> Iterator[Sample]:
    try:
        yield from corpus.samples(start)
    except CorpusError as error:
        raise _Unreadable(str(error)) from error


def other_places(part: Part, table: NDArray[np.int64], source: Mapping[str, Any], store: Path) -> MismatchError:
    """The error for a corpus with the samples of ``part`` at other places. Rows refer to their samples by place.

    ``table`` is the span table of that corpus, and ``source`` the manifest section that names it.
    """
    stored, recorded = span_table(part), part.manifest["source"]
    different = [
        (f"source.{name}", recorded[name], source[name]) for name in ("form", "data") if recorded[name] != source[name]
    ]
    if stored.shape == table.shape:
        span = int(np.flatnonzero((stored != table).any(axis=1))[0])
        columns = zip(COLUMNS, stored[span].tolist(), table[span].tolist(), strict=True)
        different += [(f"span {span} begins at {name}", old, new) for name, old, new in columns if old != new]
    return MismatchError(
        f"part {part.name!r} of {store} was built from the same samples in another form or file, in which they lie at "
        f"other places; nothing was changed:\n{difference_lines(different)}\n"
        f"Give the corpus it was begun with to continue it, `data={recorded['data']}`, or another `name` for a new "
        "one"
    )


def _changed(corpus: Corpus, table: NDArray[np.int64], span: int) -> MismatchError:
    return MismatchError(
        f"{corpus.source} has changed since it was planned: the samples from row {table[span][0]} on are not those "
        f"of span {span}. Restore the corpus, or begin anew under another name"
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
