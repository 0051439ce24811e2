"""Rankings of groups of val samples, ``group_field``, and the combined one over them.

Legend: Q queries, D numbers of a vector, N rows of a part.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from query.ask.question import COMBINED, Question
from query.search.part_score import Term
from query.search.top_k import Ranking

FUSION_CONSTANT = 60.0
"""Reciprocal rank fusion (Cormack, Clarke, Büttcher 2009): the score of a row is Σ over groups of 1 / (60 +
its rank).
"""


def combined(question: Question, terms: list[Term], names: list[str]) -> tuple[list[Term], list[str]]:
    """``terms`` and ``names`` of the groups, with the combined ranking put first.

    With ``combine="mean"`` it is one more query, the mean of all: its score is the mean of their scores.
    """
    if COMBINED in names:
        raise UsageError(
            f"a group of `group_field={question.group_field}` is called {COMBINED!r}, as the ranking over all groups "
            "is: give it another name"
        )
    if question.combine == "mean":
        terms = [term.with_queries(with_mean(term.queries_QD)) for term in terms]
        if not max(term.lengths[0] for term in terms):
            raise UsageError(
                "the groups cancel each other: the mean of their queries is zero, and every row would score the same; "
                "give `combine=max` or rank-fusion"
            )
    return terms, [COMBINED, *names]


def with_mean(queries_QD: Tensor) -> Tensor:
    """(1 + Q, D): the mean of the queries, followed by the queries."""
    return torch.cat([queries_QD.mean(0, keepdim=True), queries_QD])


def last_first(ranking: Ranking) -> Ranking:
    """The ranking with its last query moved to the front: ``search`` puts the combined one last."""
    return Ranking(np.roll(ranking.rows, 1, axis=0), np.roll(ranking.scores, 1, axis=0))


def fused(scores_QN: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1, N): reciprocal rank fusion of Q rankings, Σ 1 / (60 + rank); equal scores by lower row, NaN stays NaN."""
    total = np.zeros(scores_QN.shape[1])
    for scores_N in scores_QN:
        order = np.argsort(-scores_N, kind="stable")  # NaN last
        rank = np.empty(len(order))
        rank[order] = np.arange(1, len(order) + 1)
        total += 1.0 / (FUSION_CONSTANT + rank)
    total[np.isnan(scores_QN).any(0)] = np.nan
    return total[None]
