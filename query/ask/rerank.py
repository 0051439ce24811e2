"""Two-stage ranking, ``ghoststore query --rerank``: candidates by the stored vectors, ranked by exact scores.

Vectors stored in few bits bring the best rows near the top, but not in the right order. So the first stage takes more
candidates than rows are wanted, and the second scores them by vectors that the model recomputes.

Legend: Q queries, M candidates of a query, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from query.ann.index import AnnIndex
from query.ask.blend import rankings_of
from query.ask.question import Question
from query.ask.scorer import Scorer
from query.search.part_score import Metric
from query.search.parts import part_names
from query.search.search import Ranking

BYTES_AT_ONCE = 64 << 20
"""Bytes of recomputed vectors in memory."""


def refuse_rerank(question: Question, candidates: int, top_k: int, bottom_k: int) -> None:
    """UsageError for fewer ``candidates`` than rows to return, and for scores that are not the product with
    one vector.
    """
    if candidates < max(top_k, bottom_k):
        raise UsageError(f"`rerank={candidates}` is fewer than the rows asked for, {max(top_k, bottom_k)}")
    unfit = {
        "several parts": len(part_names(question.part)) > 1,
        "`precondition`": question.precondition != "none",
        "`with_scores`": question.with_scores is not None,
        "`lexical`": question.lexical is not None,
        f"`combine={question.combine}`": question.combine != "mean",
    }
    for option, is_given in unfit.items():
        if is_given:
            raise UsageError(f"`rerank` scores rows by one product with each query; it cannot be used with {option}")


def rank_recomputed(
    scorer: Scorer, candidates: int, top_k: int, bottom_k: int, progress: Progress, index: AnnIndex | None = None
) -> tuple[Ranking, Ranking]:
    """The best and the worst rows of each ranking of ``scorer``, by exact scores.

    The stored vectors, or ``index``, give ``candidates`` rows for each; the model recomputes their gradients.
    ``scorer`` must keep its model.
    """
    (term,), encoder = scorer.terms, scorer.encoder
    assert encoder is not None
    first_stage = scorer.rank(candidates if top_k else 0, candidates if bottom_k else 0, progress, index=index)
    best, worst = (
        rerank(
            ranking,
            term.queries_QD,
            metric=term.metric,
            top_k=min(count, ranking.rows.shape[1]),
            recompute=lambda rows: encoder.recompute(rows) * term.mask,
            sign=sign,
        )
        for ranking, count, sign in zip(first_stage, (top_k, bottom_k), (1.0, -1.0), strict=True)
    )
    if term.metric == "dot":
        return best, worst
    lengths = term.lengths[:, None]  # below 1 for a mean of several queries of length 1
    return Ranking(best.rows, best.scores * lengths), Ranking(worst.rows, worst.scores * lengths)


def rerank(
    candidates: Ranking,
    queries_QD: Tensor,
    *,
    metric: Metric,
    top_k: int,
    recompute: Callable[[NDArray[np.int64]], Tensor],
    sign: float = 1.0,
) -> Ranking:
    """The ``top_k`` candidates of each query with the highest exact score × ``sign``; equal scores by lower row.

    ``candidates`` are in any order; -1 stands for none. ``recompute(rows)`` returns exact vectors, (rows, D) float32,
    as :meth:`query.ask.encoder.PartEncoder.recompute` does. It is called once for each row, even if several queries
    share a candidate. Scores are float64; the cosine of a row of length zero is 0.
    """
    rows_QM = np.sort(candidates.rows, axis=1)
    union = np.unique(rows_QM[rows_QM >= 0])
    scores_QM = np.full(rows_QM.shape, np.nan)
    queries = queries_QD.double()
    if metric == "cosine":
        queries = queries / queries.norm(dim=1, keepdim=True)
    at_once = max(1, BYTES_AT_ONCE // (4 * queries.shape[1]))
    for start in range(0, len(union), at_once):
        batch = union[start : start + at_once]
        vectors = recompute(batch).double()
        scores = queries @ vectors.T
        if metric == "cosine":
            scores /= vectors.norm(dim=1).clamp_min(np.finfo(np.float64).tiny)
        query, place = np.nonzero((rows_QM >= batch[0]) & (rows_QM <= batch[-1]))
        scores_QM[query, place] = scores.numpy()[query, np.searchsorted(batch, rows_QM[query, place])]
    best = rankings_of(scores_QM, top_k, sign)
    rows = np.where(best.rows >= 0, np.take_along_axis(rows_QM, np.maximum(best.rows, 0), axis=1), -1)
    return Ranking(rows, best.scores)
