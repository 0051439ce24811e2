"""The samples (or windows) of a run that match a condition."""

from __future__ import annotations

import numpy as np

from ghoststore.progress import Progress
from ghoststore.store.run.run import Run
from ghoststore.store.where.rows import Chosen, run_matches
from query.training_scores.sums import Units


def chosen_units(run: Run, units: Units, where: str | None, progress: Progress) -> Chosen | None:
    """The ``units`` of ``run`` with a row that matches ``where``; None without a condition.

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
    return Chosen(where, mask, count)
