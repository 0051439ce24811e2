"""How far scores are from those that they stand for, each with an interval.

Legend: Q queries, R rows, both of a few dozen to a few hundred; S resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from query.common.rank_correlation import spearman

Scores = NDArray[np.float64]
RESAMPLES = 1000
AT = 10
"""Of recall@10."""
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries, and the bootstrap interval of 95 % over queries (Efron 1979, percentiles)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of scores with exact ones, over the same queries and rows."""

    spearman: Estimate
    """Mean over queries of the rank correlation, equal scores sharing their mean rank."""
    sign: Estimate
    """Share of pairs of a query and a row whose scores have the same sign."""
    recall: Estimate
    """Mean share of a query's exact best ``at`` rows that are among its best ``at``."""
    at: int
    relative_error: Estimate
    """Root of the mean squared error, divided by the root of the mean squared exact score."""

    def to_json(self) -> dict[str, Any]:
        """As results and kept records hold it."""
        return asdict(self)


def agreement(score_QR: Scores, exact_QR: Scores, *, seed: int = 0) -> Agreement:
    """Of ``score_QR`` with ``exact_QR``; all are finite. Recall is that of 10 rows, or of all if they are fewer."""
    at = min(AT, exact_QR.shape[1])
    pairs = list(zip(score_QR, exact_QR, strict=True))
    same = np.sign(score_QR) == np.sign(exact_QR)
    squares = np.stack([np.square(score_QR - exact_QR).sum(1), np.square(exact_QR).sum(1)], axis=1)
    resample = Resampler(len(exact_QR), seed)
    return Agreement(
        spearman=resample(spearman(score_QR, exact_QR), _mean),
        sign=resample(same.mean(1), _mean),
        recall=resample(np.array([np.isin(best(exact, at), best(score, at)).mean() for score, exact in pairs]), _mean),
        at=at,
        relative_error=resample(squares, _root_of_ratio),
    )


class Resampler:
    """The same draws of queries, with replacement, for every number that is estimated."""

    def __init__(self, queries: int, seed: int) -> None:
        self._sample_SQ = np.random.default_rng(seed).integers(0, queries, (RESAMPLES, queries))

    def __call__(self, of_queries: Scores, statistic: Callable[[Scores], Scores]) -> Estimate:
        """``statistic`` reduces axis 1 of (…, Q) or (…, Q, columns)."""
        value = float(statistic(of_queries[None])[0])
        edges = np.quantile(statistic(of_queries[self._sample_SQ]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(edges[0]), float(edges[1]))


def best(scores: Scores, at: int) -> NDArray[np.int64]:
    """Places of the ``at`` largest; equal ones by place."""
    return np.argsort(-scores, kind="stable")[:at]


def _mean(of_queries: Scores) -> Scores:
    return np.asarray(of_queries.mean(1))


def _root_of_ratio(squares: Scores) -> Scores:
    error, exact = np.moveaxis(squares.sum(1), -1, 0)
    return np.asarray(np.sqrt(error / np.where(exact > 0, exact, 1.0)))
