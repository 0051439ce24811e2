"""Removal: does the val loss rise if training leaves out the samples that a method ranks highest?

Legend: V val samples, N samples of the corpus, R random removals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The mean val loss of a model that was trained without the samples that a method ranks highest."""

    method: str
    loss: float
    change: float
    """``loss`` minus the mean loss of trainings without as many random samples. Above 0, the method found samples that
    help.
    """
    deviation: float | None
    """Standard deviation of the losses of the random trainings; None if there is only one."""
    groups: dict[str, float]
    """``change`` of each val group."""


def without_best(scores_N: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """(N,): false for the ``count`` samples with the highest scores; of equal ones the first."""
    mask = np.ones(len(scores_N), dtype=bool)
    mask[np.argsort(-scores_N, kind="stable")[:count]] = False
    return mask


def removal_of(
    method: str, losses_V: NDArray[np.float64], random: Sequence[NDArray[np.float64]], groups: Mapping[str, list[int]]
) -> Removal:
    """The result of one method, from its val losses and those of the ``random`` removals, (V,) each."""
    random_RV = np.stack(random)
    means_R = random_RV.mean(1)
    return Removal(
        method=method,
        loss=float(losses_V.mean()),
        change=float(losses_V.mean() - means_R.mean()),
        deviation=float(means_R.std(ddof=1)) if len(means_R) > 1 else None,
        groups={name: float((losses_V - random_RV.mean(0))[places].mean()) for name, places in groups.items()},
    )
