"""Curves of a run over its steps: sums in a fixed number of bins, whatever the number of steps.

Legend: K bins, E domains (the last entry is for samples without a domain).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.run.run import Run
from query.training_scores.steps import StepPiece
from query.training_scores.sums import standard_error

STEP_ARRAYS = ("train_loss", "val_loss", "tokens", "seconds", "score_seconds")
"""Arrays with one number a step whose means the bins give, beside scores and learning rate."""


class Curves:
    """``bins`` bins of equal width. The width doubles (1, 2, 4, … steps) whenever the steps no longer fit."""

    def __init__(self, run: Run, bins: int) -> None:
        assert bins % 2 == 0, bins
        self.bins = bins
        self.width = 1
        """Number of steps in a bin."""
        self.names: list[str | None] = [*run.domains, None]
        """E names of the domains."""
        domain = run.rows.read("domain", 0, len(run.rows)).astype(np.int64)
        self._domain_of_row = np.where(domain < 0, len(run.domains), domain)
        shape = (bins, len(self.names))
        self._by_domain = {name: np.zeros(shape) for name in ("times", "plain", "squares", "weighted", "negative")}
        self._by_step = {name: np.zeros((bins, 2)) for name in (*STEP_ARRAYS, "learning_rate")}

    def add(self, piece: StepPiece, counts: NDArray[np.bool_]) -> None:
        """Add steps; ``counts`` says which of their places have a score that counts."""
        while piece.stop > self.bins * self.width:
            self.fold()
        places = piece.places
        at = (places.step[counts] // self.width, self._domain_of_row[places.row[counts]])
        score = places.score[counts]
        for name, numbers in {
            "times": np.ones_like(score),
            "plain": score,
            "squares": score * score,
            "weighted": places.weight[counts] * score,
            "negative": (score < 0).astype(np.float64),
        }.items():
            np.add.at(self._by_domain[name], at, numbers)
        bins = np.arange(piece.start, piece.stop) // self.width
        for name, sums in self._by_step.items():
            values = piece.data[name].astype(np.float64)
            finite = np.isfinite(values)
            np.add.at(sums, bins[finite], np.stack([values[finite], np.ones(int(finite.sum()))], axis=1))

    def fold(self) -> None:
        """Merge each pair of neighbouring bins into one, which doubles their width."""
        half = self.bins // 2
        for sums in (*self._by_domain.values(), *self._by_step.values()):
            sums[:half] = sums[0::2] + sums[1::2]
            sums[half:] = 0.0
        self.width *= 2

    def domain_sums(self, name: str) -> NDArray[np.float64]:
        """(K, E): ``times``, ``plain`` (Σ s), ``squares`` (Σ s²), ``weighted`` (Σ weight·s) or ``negative``."""
        return self._by_domain[name]

    def mean_scores(self, domains: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(mean score, its standard error) over the ``domains`` together, each (K,); NaN for a bin without scores."""
        times, plain, squares = (self._by_domain[name][:, domains].sum(1) for name in ("times", "plain", "squares"))
        with np.errstate(invalid="ignore", divide="ignore"):
            return plain / times, standard_error(times, plain, squares)

    def mean(self, name: str) -> NDArray[np.float64]:
        """(K,): the mean over the steps of each bin of the array ``name``; NaN for a bin without a finite number."""
        total, count = self._by_step[name].T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(total / count)

    @property
    def centres(self) -> NDArray[np.float64]:
        """(K,): the middle of each bin, in steps."""
        return np.asarray((np.arange(self.bins) + 0.5) * self.width, dtype=np.float64)

    @property
    def ends(self) -> NDArray[np.float64]:
        """(K,): one past the last step of each bin."""
        return np.asarray((np.arange(self.bins) + 1.0) * self.width, dtype=np.float64)
