"""Tail patch: does one training step on the highest-ranked samples lower the loss of a val group more than on random
samples?

After Chang et al. 2024, "Scalable influence and fact tracing for large language model pretraining", section 4.

Legend: G val groups, N samples of the corpus, R random steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from indexer.training.patch import Patch


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPatch:
    """How much one step on the best samples of a method lowers the loss, in nats a token."""

    method: str
    gain: float
    """Mean over val groups."""
    random: float
    """The gain of random samples."""
    deviation: float | None
    """Standard deviation of ``random`` over repeats; None if there is only one."""
    groups: dict[str, float]
    """The gain of each val group."""


class TailPatches:
    """Tail patches for one set of val groups. The steps on random samples are taken once, for all methods."""

    def __init__(self, patch: Patch, groups: Mapping[str, list[int]], *, count: int, repeats: int, seed: int) -> None:
        self._patch, self._groups, self._count = patch, groups, count
        self._before = {name: patch.val.losses(patch.model, places).mean() for name, places in groups.items()}
        rng = np.random.default_rng(seed)
        usable = np.array([s for s in range(patch.samples) if patch.usable(s)])
        random_RG = [
            [self._gain(name, rng.choice(usable, min(count, len(usable)), replace=False).tolist()) for name in groups]
            for _ in range(repeats)
        ]
        means_R = np.mean(random_RG, axis=1)
        self._random = float(means_R.mean())
        self._deviation = float(means_R.std(ddof=1)) if repeats > 1 else None

    def of(self, method: str, scores_GN: NDArray[np.float64]) -> TailPatch:
        """The result of a method with these scores: one step for each group on its ``count`` best samples."""
        gains = {}
        for name, scores_N in zip(self._groups, scores_GN, strict=True):
            order = np.argsort(-scores_N, kind="stable")
            best = [int(sample) for sample in order if self._patch.usable(int(sample))][: self._count]
            gains[name] = self._gain(name, best)
        return TailPatch(
            method=method,
            gain=float(np.mean(list(gains.values()))),
            random=self._random,
            deviation=self._deviation,
            groups=gains,
        )

    def _gain(self, group: str, samples: list[int]) -> float:
        return float(self._before[group] - self._patch.losses_after(samples, self._groups[group]).mean())
