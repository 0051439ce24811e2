"""Measures of how well approximate scores agree with exact ones, with confidence intervals.

Legend: Q queries, R rows (a few dozen to a few hundred of each); S resamples.
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
"""The number of rows in recall@10."""
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over queries with its 95 % bootstrap interval over queries (Efron 1979, percentiles)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well scores agree with exact scores of the same queries and rows."""

    spearman: Estimate
    """Mean over queries of Spearman's rank correlation; equal scores share their mean rank."""
    sign: Estimate
    """Share of the pairs of a query and a row whose two scores have the same sign."""
    recall: Estimate
    """Mean over queries of the share of the exactly best ``at`` rows that are among the best ``at`` rows."""
    at: int
    """The number of rows in ``recall``."""
    relative_error: Estimate
    """Root mean square error, divided by the root mean square of the exact scores."""

    def to_json(self) -> dict[str, Any]:
        """The entry in results and in the record that the part keeps."""
        return asdict(self)


def agreement(score_QR: Scores, exact_QR: Scores, *, seed: int = 0) -> Agreement:
    """The agreement of ``score_QR`` with ``exact_QR``, all finite. Recall is for 10 rows, or for all if there are
    fewer.
    """
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
    """Bootstrap over queries. Every estimate uses the same draws of queries, with replacement."""

    def __init__(self, queries: int, seed: int) -> None:
        self._sample_SQ = np.random.default_rng(seed).integers(0, queries, (RESAMPLES, queries))

    def __call__(self, of_queries: Scores, statistic: Callable[[Scores], Scores]) -> Estimate:
        """The estimate of ``statistic``, which reduces axis 1 of arrays (S, Q) or (S, Q, columns)."""
        value = float(statistic(of_queries[None])[0])
        edges = np.quantile(statistic(of_queries[self._sample_SQ]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(edges[0]), float(edges[1]))


def best(scores: Scores, at: int) -> NDArray[np.int64]:
    """The places of the ``at`` largest scores; of equal ones the first."""
    return np.argsort(-scores, kind="stable")[:at]


def _mean(of_queries: Scores) -> Scores:
    return np.asarray(of_queries.mean(1))


def _root_of_ratio(squares: Scores) -> Scores:
    error, exact = np.moveaxis(squares.sum(1), -1, 0)
    return np.asarray(np.sqrt(error / np.where(exact > 0, exact, 1.0)))
