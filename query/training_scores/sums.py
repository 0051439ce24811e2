"""Running sums of scores for each sample, in one pass over the steps. Memory does not grow with the number of steps.

Legend: N rows of the row table, U units (samples, or windows), P places of some steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.settings.store import Unit as Unit
from ghoststore.settings.store import Value as Value
from ghoststore.store.run.run import Run
from query.training_scores.steps import Places

WEIGHTED = ("cumulative", "mean")
"""Values in which a score counts with the weight of its step."""


class Units:
    """The units that are ranked: samples, or the windows that long samples were cut into."""

    def __init__(self, run: Run, unit: Unit) -> None:
        self._run = run
        rows = len(run.rows)
        run.rows.bear_out()
        self.of_row: NDArray[np.int64] | None = None
        """(N,): the unit of each row; None if every row is a unit of its own."""
        self.first_row: NDArray[np.int64] = np.arange(rows)
        """(U,): the first row of each unit."""
        if unit == "sample":
            source = run.rows.read("source_row", 0, rows)
            if rows > 1 and not bool((source[1:] > source[:-1]).all()):
                _, self.first_row, self.of_row = np.unique(source, return_index=True, return_inverse=True)

    def __len__(self) -> int:
        return len(self.first_row)

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The unit of each of ``rows``."""
        return rows if self.of_row is None else self.of_row[rows]

    @property
    def domain(self) -> NDArray[np.int16]:
        """(U,): place in the run's ``domains``, -1 for none."""
        return np.asarray(self._run.rows.read("domain", 0, len(self._run.rows))[self.first_row], dtype=np.int16)


@dataclass(slots=True)
class Tally:
    """How often samples were trained on, and how many of their scores count."""

    times: int = 0
    """Places with a sample."""
    scored: int = 0
    """Scores that count: finite, and with a learning rate where the value needs one."""
    negative: int = 0
    """Of these, below 0."""
    unscored: int = 0
    """NaN: not scored, or not a number."""
    not_finite: int = 0
    """Infinite."""
    without_learning_rate: int = 0
    """Left out because their step has no finite learning rate, or no finite weight of another kind."""
    not_chosen: int = 0
    """Candidates that their step did not train on."""

    @property
    def negative_share(self) -> float | None:
        """Share of negative scores among those that count; None without any."""
        return self.negative / self.scored if self.scored else None


class ScoreSums:
    """Sums over the scores of each unit. Only finite numbers enter. Memory: about 45 bytes a unit."""

    def __init__(self, units: int, *, weighted: bool = True) -> None:
        self.tally = Tally()
        self._needs_weight = weighted
        self.weighted: NDArray[np.float64] = np.zeros(units)
        """(U,): Σ weight·s."""
        self.plain: NDArray[np.float64] = np.zeros(units)
        """(U,): Σ s."""
        self.squares: NDArray[np.float64] = np.zeros(units)
        """(U,): Σ s²."""
        self.last: NDArray[np.float64] = np.full(units, np.nan)
        """(U,): the newest score."""
        self.last_step: NDArray[np.int64] = np.full(units, -1)
        self.times: NDArray[np.int32] = np.zeros(units, dtype=np.int32)
        """(U,): number of scores that count."""
        self.negative: NDArray[np.int32] = np.zeros(units, dtype=np.int32)
        self.seen: NDArray[np.bool_] = np.zeros(units, dtype=bool)

    def add(self, places: Places, unit: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Count ``places``, of the units ``unit``, each with its weight; (P,): which of them count."""
        score = places.score
        with np.errstate(invalid="ignore", over="ignore"):
            weighted = places.weight * score
        finite = np.isfinite(score)
        counts = finite & np.isfinite(weighted) if self._needs_weight else finite
        self.tally.times += len(score)
        self.tally.scored += int(counts.sum())
        self.tally.negative += int((score[counts] < 0).sum())
        self.tally.unscored += int(np.isnan(score).sum())
        self.tally.not_finite += int(np.isinf(score).sum())
        self.tally.without_learning_rate += int((finite & ~counts).sum())
        self.seen[unit] = True
        unit, score, weighted, step = unit[counts], score[counts], weighted[counts], places.step[counts]
        np.add.at(self.weighted, unit, weighted)
        np.add.at(self.plain, unit, score)
        np.add.at(self.squares, unit, score * score)
        np.add.at(self.times, unit, 1)
        np.add.at(self.negative, unit, score < 0)
        newer = step >= self.last_step[unit]  # an older step may come later, when a gap is filled
        self.last[unit[newer]], self.last_step[unit[newer]] = score[newer], step[newer]
        return counts

    def values(self, kind: Value) -> NDArray[np.float64]:
        """(U,): the value of each unit; NaN without a score."""
        if kind == "last":
            return self.last
        values = self.plain if kind == "sum" else self.weighted
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.times > 0, values / self.times if kind == "mean" else values, np.nan)


def best(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The places of the ``k`` largest finite values, largest first; equal values by lower place."""
    places = np.flatnonzero(np.isfinite(values))
    if 0 < k < len(places):
        least = np.partition(values[places], -k)[-k]
        places = places[values[places] >= least]
    return places[np.lexsort((places, -values[places]))][:k]


def standard_error(count: Any, total: Any, squares: Any) -> NDArray[np.float64]:
    """Standard error of the mean of ``count`` numbers, from their sum and the sum of their squares; NaN for fewer than
    two.
    """
    n = np.asarray(count, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(squares - np.square(total) / n, 0.0) / (n - 1)
        return np.where(n > 1, np.sqrt(variance / n), np.nan)
