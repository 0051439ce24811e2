"""How the scores of a run spread over its steps: quantiles, means, means by domain and val group, what steps kept.

Kept for each bin of steps are counts of scores in buckets that are 1/32 wide relative to their lower edge (the first
bits of a float32), so memory grows neither with the steps nor with the scores, bins merge without loss, and a quantile
is off by at most 1/64 of itself.

Legend: K bins of steps, C buckets, G val groups, P places of some steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.store.run.run import Run
from query.training_scores.curves import Curves
from query.training_scores.frame import DomainMeans, ScoreSpread
from query.training_scores.steps import ScoreColumn, StepPiece

BINS = 64
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DROPPED_BITS = 18
"""Of the 23 bits of a float32's fraction: the others tell 32 buckets in each power of two."""
BUCKETS = 0x7F800000 >> DROPPED_BITS
"""C of each sign: below the bits of infinity."""


class Spread:
    """``BINS`` bins of equal width, which doubles whenever the steps no longer fit, as in `Curves`. Memory: 4 MB."""

    def __init__(self, run: Run) -> None:
        self._width = 1
        self._groups = run.layout.groups
        self._counts = np.zeros((BINS, 2 * BUCKETS), dtype=np.uint32)
        """(K, 2·C): scores, from the lowest to the highest bucket."""
        self._curves = Curves(run, BINS)
        self._of_groups = np.zeros((BINS, len(self._groups), 2))
        """(K, G, 2): sum and number of the scores for each group."""
        self._kept = np.zeros((BINS, 2)) if run.layout.weights else None
        """(K, 2): candidates, and those that were trained on."""

    @property
    def also(self) -> tuple[str, ...]:
        """Arrays that the pieces must have beside the score."""
        return ("group_score",) if self._groups else ()

    def add(self, piece: StepPiece, counts: NDArray[np.bool_]) -> None:
        """Add steps; ``counts`` says which of their places have a score that counts."""
        while piece.stop > BINS * self._width:
            self._fold()
        bins = piece.places.step // self._width
        self._curves.add(piece, counts)
        np.add.at(self._counts, (bins[counts], bucket_of(piece.places.score[counts])), 1)
        for place, score in enumerate(self._group_scores(piece)):
            finite = counts & np.isfinite(score)
            pairs = np.stack([score[finite], np.ones(int(finite.sum()))], axis=1)
            np.add.at(self._of_groups[:, place], bins[finite], pairs)
        if self._kept is not None:
            filled = piece.data["sample"] >= 0
            trained = filled & (piece.data["weight"] > 0)
            numbers = np.stack([places.reshape(len(filled), -1).sum(1) for places in (filled, trained)], axis=1)
            np.add.at(self._kept, np.arange(piece.start, piece.stop) // self._width, numbers)

    def _group_scores(self, piece: StepPiece) -> list[NDArray[np.float64]]:
        """(P,) for each group: the scores for it, at the places of ``piece``."""
        if not self._groups:
            return []
        places = piece.data["sample"] >= 0
        if self._kept is not None:
            places &= piece.data["weight"] > 0
        scores = piece.data["group_score"]
        return [ScoreColumn("group_score", (place,)).of(scores)[places] for place in range(len(self._groups))]

    def _fold(self) -> None:
        """Merge each pair of neighbouring bins into one."""
        half = BINS // 2
        all_sums: list[NDArray[Any]] = [self._counts, self._of_groups, *([] if self._kept is None else [self._kept])]
        for sums in all_sums:
            sums[:half] = sums[0::2] + sums[1::2]
            sums[half:] = 0
        self._width *= 2

    def frame(self) -> ScoreSpread:
        """What a frame says of it."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self._of_groups[..., 0] / self._of_groups[..., 1]
            kept = None if self._kept is None else self._kept[:, 1] / self._kept[:, 0]
            times = self._curves.domain_sums("times")
            weighted = self._curves.domain_sums("weighted") / times
        mean, _ = self._curves.mean_scores(range(times.shape[1]))
        known = times.any(1) if self._kept is None else self._kept[:, 0] > 0
        filled = int(np.flatnonzero(known)[-1]) + 1 if known.any() else 0
        return ScoreSpread(
            steps=((np.arange(filled) + 0.5) * self._width).tolist(),
            mean=finite_list(mean[:filled]),
            quantiles=list(QUANTILES),
            bands=[finite_list(band[:filled]) for band in self._bands()],
            domains=[
                DomainMeans(domain=name, mean=finite_list(weighted[:filled, place]))
                for place, name in enumerate(self._curves.names)
                if times[:, place].any()
            ],
            groups={name: finite_list(means[:filled, place]) for place, name in enumerate(self._groups)},
            kept_share=None if kept is None else finite_list(kept[:filled]),
        )

    def _bands(self) -> list[NDArray[np.float64]]:
        """(K,) for each quantile q: the middle of the bucket that holds the smallest score with at least q of all at
        or below it.
        """
        upto = self._counts.cumsum(1, dtype=np.int64)
        total = upto[:, -1]
        bands = []
        for quantile in QUANTILES:
            wanted = np.maximum(np.ceil(quantile * total), 1)
            bands.append(
                np.where(total > 0, MIDDLES[(upto < wanted[:, None]).sum(1).clip(max=2 * BUCKETS - 1)], np.nan)
            )
        return bands


def bucket_of(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """(P,) places among the 2·C buckets. A number beyond float32 goes to the bucket at the end."""
    largest = np.finfo(np.float32).max
    size = np.minimum(np.abs(scores), largest).astype(np.float32)
    place = (size.view(np.int32) >> DROPPED_BITS).astype(np.int64)
    return np.where(scores < 0, BUCKETS - 1 - place, BUCKETS + place)


def _middles() -> NDArray[np.float64]:
    edges = (np.arange(BUCKETS + 1, dtype=np.int64) << DROPPED_BITS).astype(np.int32).view(np.float32)
    lower, upper = edges[:-1].astype(np.float64), edges[1:].astype(np.float64)
    upper[-1] = np.finfo(np.float32).max  # in the place of infinity
    middle = (lower + upper) / 2
    middle[0] = 0.0
    return np.concatenate([-middle[::-1], middle])


MIDDLES = _middles()
"""(2·C,): the number that stands for each bucket."""


def finite_list(values: NDArray[np.float64]) -> list[float | None]:
    """``values``, with None for what is no number."""
    return [value if np.isfinite(value) else None for value in values.tolist()]
