"""The samples (or windows) of a run that match a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Progress
from ghoststore.store.run.run import Run
from ghoststore.store.where.rows import run_matches
from query.training_scores.sums import Units


@dataclass(frozen=True, slots=True)
class ChosenUnits:
    """The units that may rank: those with a row that matches."""

    sql: str
    mask: NDArray[np.bool_]
    """(U,)."""
    count: int

    @classmethod
    def of(cls, run: Run, units: Units, where: str | None, progress: Progress) -> ChosenUnits | None:
        """The ``units`` of ``run`` that match ``where``; None without a condition.

        UsageError for what is no condition on the columns of its row table, and if none matches.
        """
        if where is None:
            return None
        matches = run_matches(run, where)
        matches.among(run, np.ones(len(run.rows), dtype=bool), "rows")
        mask = np.zeros(len(units), dtype=bool)
        mask[units.of(np.flatnonzero(matches.mask))] = True
        count = int(mask.sum())
        progress.note(f"`where`: {count:,} of {len(units):,} samples of run {run.name!r} match")
        return cls(where, mask, count)

    def settings(self) -> dict[str, Any]:
        """What the settings of a result say about it."""
        return {"where": self.sql, "rows_matching": self.count}
