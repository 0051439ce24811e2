"""Two-stage ranking, ``ghoststore query --rerank``: candidates by the stored vectors, ranked by exact scores.

Vectors stored in few bits bring the best rows near the top, but not in the right order. So the first stage takes more
candidates than rows are wanted, and the second scores them by gradients that the model computes again: whole ones
(:mod:`query.ask.second_stage`), or vectors as the part has them, but not rounded.

Legend: Q queries, M candidates of a query, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.option import given
from ghoststore.store import Part
from query.ann.index import AnnIndex
from query.ask.blend import ranked_among
from query.ask.question import Question
from query.ask.scorer import Scorer
from query.ask.second_stage import Reranking, exact_scores
from query.search.part_score import Metric
from query.search.top_k import Ranking

BYTES_AT_ONCE = 64 << 20
"""Bytes of recomputed vectors in memory."""


def refuse_rerank(question: Question, how: Reranking, top_k: int, bottom_k: int) -> None:
    """UsageError for fewer candidates than rows to return, and for scores that are not the product with one vector."""
    assert how.rerank is not None
    if how.rerank < max(top_k, bottom_k):
        raise UsageError(f"`rerank={how.rerank}` is fewer than the rows asked for, {max(top_k, bottom_k)}")
    if question.precondition != "none":
        raise UsageError(
            "`rerank` scores in the metric that the part was built in, and `precondition` is another one: leave "
            "`precondition` out, and query a part that was built with `precondition=kronecker`, the default"
        )
    for option in given(question, ("with_scores", "lexical", "combine")):
        raise UsageError(
            f"`rerank` scores rows by one product with each query; it cannot be used with {option}: leave one of the "
            "two out"
        )


def refuse_part(how: Reranking, parts: Sequence[Part], metric: Metric) -> None:
    """UsageError for a second stage over several checkpoints, for one that the part, or its model, does not fit, or
    that gives no ``metric``, which is the question's or the part's own.
    """
    part = parts[0]
    if how.rerank is not None and len(parts) > 1:
        raise UsageError(
            "`rerank` scores rows by one product with each query; it cannot be used with several parts that are "
            "summed: name those of one checkpoint"
        )
    if how.rerank_with == "ekfac" and part.manifest["projection"]["precondition"] == "none":
        raise UsageError(
            f"`rerank_with=ekfac` measures the eigenvalues of K-FAC's factors, and part {part.name!r} has none: give "
            "`rerank_with=exact`, or query a part that was built with `precondition=kronecker`"
        )
    if how.rerank_damping is not None and how.damping(part) is None:
        raise UsageError(
            f"`rerank_damping` is of K-FAC's factors, and part {part.name!r} has none: leave it out, or query a part "
            "that was built with `precondition=kronecker`"
        )
    if how.rerank_with == "cg" and part.manifest["dtype"]["model"] == "float16":
        raise UsageError(
            f"`rerank_with=cg` needs a model of float32 or bfloat16, and that of part {part.name!r} is float16: give "
            "`rerank_with=exact`"
        )
    if how.rerank_with == "cg" and metric == "cosine":
        raise UsageError(
            "`rerank_with=cg` gives no `metric=cosine`: the length of a row under the inverse of the Gauss-Newton "
            "matrix is not known. Give `metric=dot`"
        )


def rank_anew(
    scorer: Scorer, how: Reranking, top_k: int, bottom_k: int, progress: Progress, index: AnnIndex | None = None
) -> tuple[Ranking, Ranking]:
    """The best and the worst rows of each ranking of ``scorer``, by exact scores.

    The stored vectors, or ``index``, give ``how.rerank`` candidates for each; the model recomputes their gradients.
    ``scorer`` must keep its model and val sets.
    """
    count = how.rerank
    assert count is not None
    first_stage = scorer.rank(count if top_k else 0, count if bottom_k else 0, progress, index=index)
    counts = tuple(min(k, ranking.rows.shape[1]) for ranking, k in zip(first_stage, (top_k, bottom_k), strict=True))
    if how.rerank_with == "vectors":
        best, worst = _by_vectors(scorer, first_stage, counts)
        return best, worst
    rows = np.concatenate([ranking.rows for ranking in first_stage], axis=1)
    union = np.unique(rows[rows >= 0])
    scores_QU = exact_scores(scorer, how, union, progress)
    best, worst = (
        _among(np.sort(ranking.rows, axis=1), union, scores_QU, k, sign)
        for ranking, k, sign in zip(first_stage, counts, (1.0, -1.0), strict=True)
    )
    return best, worst


def _among(
    rows_QM: NDArray[np.int64], union_U: NDArray[np.int64], scores_QU: NDArray[np.float64], top_k: int, sign: float
) -> Ranking:
    """The best of each query's own candidates, by the scores of all candidates."""
    if not len(union_U):
        return Ranking(np.full((len(rows_QM), top_k), -1, dtype=np.int64), np.full((len(rows_QM), top_k), np.nan))
    place_QM = np.minimum(np.searchsorted(union_U, rows_QM), len(union_U) - 1)
    scores_QM = np.where(rows_QM >= 0, np.take_along_axis(scores_QU, place_QM, axis=1), np.nan)
    return ranked_among(rows_QM, scores_QM, top_k, sign)


def _by_vectors(scorer: Scorer, first_stage: tuple[Ranking, Ranking], counts: tuple[int, ...]) -> list[Ranking]:
    """The best and the worst rows by recomputed vectors of the part."""
    (term,), encoder = scorer.terms, scorer.encoder
    assert encoder is not None
    rankings = [
        rerank(
            ranking,
            term.queries_QD,
            metric=term.metric,
            top_k=count,
            recompute=lambda rows: encoder.recompute(rows) * term.mask,
            sign=sign,
        )
        for ranking, count, sign in zip(first_stage, counts, (1.0, -1.0), strict=True)
    ]
    if term.metric == "dot":
        return rankings
    lengths = term.lengths[:, None]  # below 1 for a mean of several queries of length 1
    return [Ranking(ranking.rows, ranking.scores * lengths) for ranking in rankings]


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
    return ranked_among(rows_QM, scores_QM, top_k, sign)
