"""One rank's part of a step's update: which rows it trains on, in which micro-batches, and how each counts.

Legend: R ranks, B candidates of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from indexer.session.ranks import Ranks
from indexer.training.data import TrainingRows


class Part(NamedTuple):
    """One micro-batch."""

    rows: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    """Of each row; None: every row counts alike."""


def even(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """``weights`` divided by the largest one: only ratios count, and sums of them stay in the range of float32."""
    largest = weights.max().astype(np.float64)
    return weights if largest == 1 else (weights / largest).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Share:
    """The micro-batches of one rank."""

    parts: list[Part]
    targets: float
    """What its losses are divided by: the targets of all ranks, each times the weight of its row, over the number of
    ranks, for gradients are averaged."""
    tokens: int
    """Of all ranks, padding aside."""

    @classmethod
    def drawn(cls, rows: TrainingRows, of_step: NDArray[np.int64], ranks: Ranks, micro_batches: int) -> Share:
        """Every row of the step, in equal micro-batches."""
        own = np.split(of_step, ranks.count)[ranks.rank]
        return cls(
            [Part(part) for part in np.split(own, micro_batches)],
            rows.targets_of(of_step) / ranks.count,
            int(rows.length[of_step].sum()),
        )

    @classmethod
    def chosen(
        cls,
        rows: TrainingRows,
        of_step: NDArray[np.int64],
        weights_RB: NDArray[np.float32],
        ranks: Ranks,
        batch_size: int,
        *,
        anew: bool,
    ) -> Share:
        """The rows with a weight above 0, in their order, at most ``batch_size`` in a micro-batch. They are dealt out
        ``anew`` to the ranks, or each rank has its own.
        """
        of_step_RB = of_step.reshape(weights_RB.shape)
        taken_RB = weights_RB > 0
        taken, weights = of_step_RB[taken_RB], weights_RB[taken_RB]
        plain = bool((weights == 1).all())
        counted = rows.target_counts(taken)
        targets = float(counted.sum()) if plain else float((counted * weights.astype(np.float64)).sum())
        shares = np.array_split(np.arange(len(taken)), ranks.count)
        if not anew:
            shares = np.split(np.arange(len(taken)), np.cumsum(taken_RB.sum(1))[:-1])
        own = shares[ranks.rank]
        if not len(own):
            # This rank has none; the others wait for its part of the gradient, which is zero.
            parts = [Part(taken[:1], np.zeros(1, dtype=np.float32))]
        else:
            cuts = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
            parts = [Part(taken[cut], None if plain else weights[cut]) for cut in cuts]
        return cls(parts, targets / ranks.count, int(rows.length[taken].sum()))
