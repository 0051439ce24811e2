"""A ranking by exact scores, out of the candidates of a cheaper one.

Codes of few bits bring the best rows near the top, not into their order: so more are asked for than are wanted, and
these are scored again by exact vectors.

Legend: Q queries, M candidates of a query, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from query.ask.blend import rankings_of
from query.search.part_score import Metric
from query.search.search import Ranking

BYTES_AT_ONCE = 64 << 20
"""Exact vectors in memory."""


def rerank(
    candidates: Ranking,
    queries_QD: Tensor,
    *,
    metric: Metric,
    top_k: int,
    rows_again: Callable[[NDArray[np.int64]], Tensor],
    sign: float = 1.0,
) -> Ranking:
    """The ``top_k`` of each query's candidates by the exact score of the row, times ``sign``; equal ones by lower row.

    ``candidates`` are in any order, -1 for none. ``rows_again(rows)`` gives their exact vectors, (rows, D) float32, as
    :class:`query.ask.recompute.RowsAgain` does; each row that is a candidate of any query is asked for once. Scores are
    float64; the cosine of a row of length zero is 0.
    """
    rows_QM = np.sort(candidates.rows, axis=1)
    union = np.unique(rows_QM[rows_QM >= 0])
    scores_QM = np.full(rows_QM.shape, np.nan)
    queries = queries_QD.double()
    if metric == "cosine":
        queries = queries / queries.norm(dim=1, keepdim=True)
    at_once = max(1, BYTES_AT_ONCE // (4 * queries.shape[1]))
    for start in range(0, len(union), at_once):
        some = union[start : start + at_once]
        vectors = rows_again(some).double()
        scores = queries @ vectors.T
        if metric == "cosine":
            scores /= vectors.norm(dim=1).clamp_min(np.finfo(np.float64).tiny)
        query, place = np.nonzero((rows_QM >= some[0]) & (rows_QM <= some[-1]))
        scores_QM[query, place] = scores.numpy()[query, np.searchsorted(some, rows_QM[query, place])]
    best = rankings_of(scores_QM, top_k, sign)
    rows = np.where(best.rows >= 0, np.take_along_axis(rows_QM, np.maximum(best.rows, 0), axis=1), -1)
    return Ranking(rows, best.scores)
