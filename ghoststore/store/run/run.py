"""A run: what one training run wrote of itself, step by step, and which samples it trained on.

Legend: S steps, R ranks, B samples of one rank's step, N rows of the row table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.store.base.manifest import RUN, Manifest, refuse_differences
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.rows import RowTable, RunRows, write_rows
from ghoststore.store.run.writer import RunWriter
from ghoststore.store.spans.group import Spanned, create, create_array
from ghoststore.store.spans.reader import stream

__all__ = ["RowTable", "Run", "RunLayout", "RunRows", "RunWriter", "create_run"]


class Run(Spanned[RunLayout]):
    """One training run, as it stood when it was opened or last reloaded.

    Opened by :meth:`ghoststore.Store.run`, while it is written too. Opening is cheap: neither arrays nor the row
    table are read.
    """

    kind = RUN
    unit = "steps"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.rows = RunRows(self)
        """The row table."""

    @classmethod
    def layout_of(cls, storage: Mapping[str, Any]) -> RunLayout:
        return RunLayout.of(storage)

    @property
    def steps(self) -> int:
        """Committed steps."""
        return self.length

    def reload(self) -> list[int]:
        """Look again which spans are committed; those that were not before, in order."""
        before = set(self.spans)
        self.spans = self._committed()
        self._borne_out = False
        return [span for span in self.spans if span not in before]

    def committed_steps(self, spans: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Numbers, from 0, of the steps of ``spans`` (default: every committed one), in their order."""
        self.bear_out(spans)
        chosen = [self.layout.span_of(span) for span in (self.spans if spans is None else spans)]
        return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in chosen)]).astype(np.int64)

    def read_committed(self, array: str, spans: Sequence[int] | None = None) -> NDArray[Any]:
        """One step array over ``spans`` (default: every committed one), end to end along axis 0.

        Which steps these are says :meth:`committed_steps`. UsageError for a span that is not committed, CorruptError
        naming the file that is not what was committed.
        """
        chosen = list(self.spans if spans is None else spans)
        absent = sorted(set(chosen) - set(self.spans))
        if absent:
            raise UsageError(f"spans {absent[:5]} of run {self.name!r} are not committed")
        spec = self.spec(array)
        self.check_sizes(spec, chosen)
        numbers = np.empty((len(self.committed_steps(chosen)), *spec.columns), dtype=spec.dtype)
        place = 0
        for chunk in stream(self, array, chosen):
            numbers[place : place + len(chunk.data)] = chunk.data
            place += len(chunk.data)
        return numbers

    def summarize(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
        """Samples by what became of their score, and tokens.

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
    """Make a run with no steps yet, in one step: it appears whole or not at all. If it exists, it is opened.

    ``manifest`` is plain JSON with the sections of a run (``docs/format.md``), ``storage`` that of
    :meth:`RunLayout.to_json`. MismatchError with both values if the run exists with other identity sections,
    UsageError if manifest or rows cannot be, BusyError if another process is making it.
    """
    try:
        wanted: Manifest = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the manifest of run {path.name!r} is not plain JSON: {error}") from error
    lacking = [name for name in (*RUN.identity, *RUN.description) if name not in wanted]
    if lacking:
        raise UsageError(f"the manifest of run {path.name!r} lacks the sections {lacking}")
    try:
        layout, domains = RunLayout.of(wanted["storage"]), len(wanted["corpus"]["domains"] or [])
    except (KeyError, TypeError) as error:
        raise UsageError(f"the manifest of run {path.name!r} lacks {error!r} in its storage or corpus") from error
    columns = rows.checked(layout, domains)

    def fill(group: zarr.Group) -> None:
        write_rows(group, layout, columns)
        for spec in layout.arrays():
            create_array(group, spec, layout.length)

    create(path, RUN, wanted, fill)
    run = Run(path)
    refuse_differences(run.manifest, wanted, f"run {path.name!r} of {path.parent.parent}", RUN)
    return run
