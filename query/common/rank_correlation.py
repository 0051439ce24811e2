"""Spearman's rank correlation, many at once.

Legend: Q pairs, M numbers of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def spearman(x_QM: NDArray[np.floating[Any]], y_QM: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(Q,): the correlation of each row of ``x_QM`` with the same row of ``y_QM``; 0 if all numbers of a
    row are equal.
    """
    x, y = (values - values.mean(1, keepdims=True) for values in (mean_ranks(x_QM), mean_ranks(y_QM)))
    lengths = np.sqrt(np.square(x).sum(1) * np.square(y).sum(1))
    return np.asarray(np.where(lengths > 0, (x * y).sum(1) / np.where(lengths > 0, lengths, 1.0), 0.0))


def mean_ranks(values_QM: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(Q, M): the rank of each number in its row, from 1; equal numbers share the mean of theirs."""
    order = np.argsort(values_QM, axis=1, kind="stable")
    ordered = np.take_along_axis(values_QM, order, axis=1)
    place = np.arange(values_QM.shape[1])
    edge = np.ones((len(values_QM), 1), dtype=bool)
    steps = ordered[:, 1:] != ordered[:, :-1]
    # For each number, the first and the last place of the equal numbers around it.
    first = np.maximum.accumulate(np.where(np.hstack([edge, steps]), place, 0), axis=1)
    last = np.where(np.hstack([steps, edge]), place, len(place))[:, ::-1]
    last = np.minimum.accumulate(last, axis=1)[:, ::-1]
    ranks = np.empty(values_QM.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=1)
    return ranks
