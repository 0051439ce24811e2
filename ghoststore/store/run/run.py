"""A run: the record of a training run, step by step, and the samples that it trained on.

Legend: S steps, R ranks, B samples of one rank's step, N rows of the row table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.base.manifest import RUN, Manifest, refuse_differences
from ghoststore.store.base.records import FileRecord
from ghoststore.store.run.journal import FOLDER, Journal, read_journals
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.pieces import side_by_side
from ghoststore.store.run.ranges import Steps, count, inside, merged, without
from ghoststore.store.run.rows import RowTable, RunRows, write_rows
from ghoststore.store.run.skipped import read_skipped
from ghoststore.store.run.writer import RunWriter
from ghoststore.store.spans.commits import Commit
from ghoststore.store.spans.group import Spanned, create, create_array

__all__ = ["RowTable", "Run", "RunLayout", "RunRows", "RunWriter", "create_run"]


class Run(Spanned[RunLayout]):
    """A training run in the state in which it was opened or last reloaded.

    Open it with :meth:`ghoststore.Store.run`, also while it is written. Opening is cheap: it reads neither arrays nor
    the row table. Steps of a span that is not full yet are in its journal; every method of reading sees both.
    """

    kind = RUN
    unit = "steps"

    def __init__(self, path: Path) -> None:
        self.journals: dict[int, Journal] = {}
        """By span, the journals of spans without a record."""
        self.skipped: list[Steps] = []
        """Ranges of steps that the writer gave up."""
        self.skipped_problem: str | None = None
        """What is wrong with the file of skipped steps; None if nothing is."""
        self._ranges: list[Steps] | None = None
        super().__init__(path)
        self.rows = RunRows(self)
        """The row table."""

    @classmethod
    def layout_of(cls, storage: Mapping[str, Any]) -> RunLayout:
        return RunLayout.of(storage)

    def _committed(self) -> list[int]:
        while True:
            skipped = self._read_skipped()
            # Before the records: a span that is committed in between has lost its journal, and has a record then.
            journals = read_journals(self, self.journals)
            spans = super()._committed()
            if skipped == self._read_skipped():
                break  # else steps in a record may have been given up, or have come after all, in between
        self.skipped, self.skipped_problem = skipped
        recorded = set(spans)
        self.journals = {span: journal for span, journal in journals.items() if span not in recorded}
        self._ranges = None
        return spans

    def _read_skipped(self) -> tuple[list[Steps], str | None]:
        """The steps that were given up, and what is wrong with the file that lists them."""
        try:
            return read_skipped(self.path, self.layout), None
        except CorruptError as error:
            return [], str(error)

    @property
    def ranges(self) -> list[Steps]:
        """Committed steps: (first, one past the last) of each piece without a gap, in order.

        CorruptError if a journal is damaged: steps must not be left out silently.
        """
        if self._ranges is None:
            if self.skipped_problem is not None:
                raise CorruptError(self.skipped_problem)
            for journal in self.journals.values():
                journal.check()
            recorded = without(merged(map(self.layout.span_of, self.spans)), self.skipped)
            self._ranges = merged([*recorded, *(steps for j in self.journals.values() for steps in j.steps)])
        return self._ranges

    @property
    def length(self) -> int:
        """Committed steps."""
        return count(self.ranges)

    @property
    def steps(self) -> int:
        """Committed steps."""
        return self.length

    @property
    def complete(self) -> bool:
        """Whether every step is committed."""
        return self.length == self.layout.steps

    def reload(self) -> list[Steps]:
        """Read again which steps are committed. Returns the ranges of new ones, in order."""
        earlier = self.ranges
        self.spans = self._committed()
        self._sizes_checked = False
        return without(self.ranges, earlier)

    def commits(self) -> Iterator[Commit]:
        """The record of each span, and a record in the same form for each save interval of a journal."""
        yield from super().commits()
        for journal in self.journals.values():
            journal.check()
            file = str(journal.path.relative_to(self.path))
            for entry in journal.entries:
                yield Commit(
                    span=journal.span,
                    start=entry.start,
                    stop=entry.stop,
                    statuses=entry.statuses,
                    tokens=entry.tokens,
                    files={file: FileRecord(bytes=entry.size, sha256=entry.digest.hex())},
                )

    def fingerprint(self) -> str:
        """SHA-256 of the manifest, every commit record and the journals. It identifies what a cache covers."""
        recorded = super().fingerprint()
        if not self.journals and not self.skipped:
            return recorded
        digest = hashlib.sha256(f"{recorded}:{self.skipped}".encode())
        for span, journal in sorted(self.journals.items()):
            digest.update(f"{span}:".encode() + b"".join(entry.digest for entry in journal.entries))
        return digest.hexdigest()

    def committed_steps(self, spans: Sequence[int] | None = None) -> NDArray[np.int64]:
        """The committed steps, numbered from 0, or those of ``spans``, in their order."""
        chosen = self._of_spans(spans)
        self.bear_out(self._recorded(chosen))
        return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in chosen)]).astype(np.int64)

    def read_committed(self, array: str, spans: Sequence[int] | None = None) -> NDArray[Any]:
        """A step array over all committed steps, or those of ``spans``, concatenated along axis 0.

        :meth:`committed_steps` gives the steps. UsageError for a span without a committed step, CorruptError naming a
        damaged file.
        """
        return self._together(array, self._of_spans(spans))

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Steps ``start`` to ``stop`` of one array; of an array of some steps only, those among them.

        CorruptError naming a damaged file. UsageError if a step is not committed.
        """
        gap = without([(start, stop)], self.ranges)
        if not gap and any(inside(journal.steps, (start, stop)) for journal in self.journals.values()):
            return self._together(name, [(start, stop)])
        return super().read(name, start, stop)

    def _of_spans(self, spans: Sequence[int] | None) -> list[Steps]:
        """Ranges of the committed steps of ``spans``, in their order. UsageError for a span without any."""
        if spans is None:
            return self.ranges
        ranges_of_spans = [inside(self.ranges, self.layout.span_of(span)) for span in spans]
        absent = sorted(span for span, ranges in zip(spans, ranges_of_spans, strict=True) if not ranges)
        if absent:
            raise UsageError(f"spans {absent[:5]} of run {self.name!r} are not committed")
        return [steps for ranges in ranges_of_spans for steps in ranges]

    def _recorded(self, ranges: Sequence[Steps]) -> list[int]:
        """The spans with a record that have steps in ``ranges``."""
        length = self.layout.span_steps
        spans = {span for start, stop in ranges for span in range(start // length, -(-stop // length))}
        return sorted(spans.intersection(self.spans))

    def _together(self, array: str, ranges: Sequence[Steps]) -> NDArray[Any]:
        """One array over ``ranges``, concatenated."""
        spec = self.spec(array)
        self.check_sizes(spec, self._recorded(ranges))
        entries = sum(last - first for first, last in (spec.entries(*steps) for steps in ranges))
        numbers = np.empty((entries, *spec.columns), dtype=spec.dtype)
        offset = 0
        for piece in side_by_side(self, [array], ranges):
            data = piece.data[array]
            numbers[offset : offset + len(data)] = data
            offset += len(data)
        return numbers

    def summarize(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
        """Counts of samples by the status of their score, and tokens.

        scored: a finite score; unscored: NaN; not_finite: an infinite one.
        """
        score = arrays["score"][arrays["sample"] >= 0]
        counts = {
            "scored": int(np.isfinite(score).sum()),
            "unscored": int(np.isnan(score).sum()),
            "not_finite": int(np.isinf(score).sum()),
        }
        return counts, int(arrays["tokens"].sum())


def create_run(path: Path, manifest: Manifest, rows: RowTable) -> Run:
    """Make an empty run in one step: it appears whole or not at all. If it exists, open it.

    ``manifest`` is plain JSON with the sections of a run (``docs/format.md``), ``storage`` that of
    :meth:`RunLayout.to_json`. MismatchError with both values if the run exists with other identity sections,
    UsageError for an impossible manifest or row table.
    """
    try:
        plain: Manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the manifest of run {path.name!r} is not plain JSON: {error}") from error
    lacking = [name for name in (*RUN.identity, *RUN.description) if name not in plain]
    if lacking:
        raise UsageError(f"the manifest of run {path.name!r} lacks the sections {lacking}")
    try:
        layout, domains = RunLayout.of(plain["storage"]), len(plain["corpus"]["domains"] or [])
    except (KeyError, TypeError) as error:
        raise UsageError(f"the manifest of run {path.name!r} lacks {error!r} in its storage or corpus") from error
    columns = rows.checked(layout, domains)

    def fill(group: zarr.Group) -> None:
        write_rows(group, layout, columns)
        if layout.save_steps is not None:
            group.create_group(FOLDER)
        for spec in layout.arrays():
            create_array(group, spec, spec.count(layout.length))

    create(path, plain, fill)
    run = Run(path)
    refuse_differences(run.manifest, plain, f"run {path.name!r} of {path.parent.parent}", RUN)
    return run
