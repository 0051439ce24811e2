"""Gradients and words as one score, ``ghoststore query --lexical``: the blend, and the search for its best rows.

score = (1 − W)·z(similarity) + W·z(BM25), z over the rows that rank. Fused by z-scores and not by ranks: where a row
shares no word with the val set its BM25 is 0, as that of most rows, and it keeps the place that its gradient gives it.
Ranks throw away by how much the best rows lead, and lose these rows (docs/design/0016-words-and-tokens.md has the
measurements).

Legend: Q rankings, N rows of a part, K some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Task
from query.ask.blend import ranked_among, standard
from query.search.part_score import Term
from query.search.search import Combine, search
from query.search.some_rows import pair_similarities, similarities_at
from query.search.top_k import Ranking

FUSION = "(1-W)·z(similarity) + W·z(BM25)"
SAMPLED, STRETCHES = 1024, 64
"""Rows whose similarities give the standard deviation, and in how many stretches they lie."""


class Hybrid:
    """Similarities, BM25 and their blend, by :data:`FUSION`.

    The mean and the standard deviation of similarities are those of :func:`sampled` rows, so that no score but theirs
    and those of the rows that rank must be computed; where no row of these differs from another, BM25 alone ranks. Of
    BM25 they are over all rows that rank. Where all of these have the same BM25, similarity alone ranks.
    """

    def __init__(
        self,
        lexical_QN: NDArray[np.float64],
        weight: float,
        ranked_N: NDArray[np.bool_],
        sample_QK: NDArray[np.float64],
    ) -> None:
        """``ranked_N`` are the rows that rank, ``sample_QK`` the similarities of those that are :func:`sampled`."""
        self.lexical, self.weight, self._ranked_N = lexical_QN, weight, ranked_N
        self.similarity = np.full(lexical_QN.shape, np.nan)
        """(Q, N): of rows whose similarity is known."""
        self._of_similarity = np.array([standard(similarity_K) for similarity_K in sample_QK])
        self._of_words = np.array([standard(words_N[ranked_N]) for words_N in lexical_QN])

    @classmethod
    def of(cls, similarity_QN: NDArray[np.float64], lexical_QN: NDArray[np.float64], weight: float) -> Hybrid:
        """Of rows whose similarities are all known; NaN for those that do not rank."""
        ranked_N = np.isfinite(similarity_QN[0])
        hybrid = cls(lexical_QN, weight, ranked_N, similarity_QN[:, sampled(ranked_N)])
        hybrid.similarity[:] = similarity_QN
        return hybrid

    @property
    def scores(self) -> NDArray[np.float64]:
        """(Q, N): the blend; NaN where the similarity is not known."""
        words_QN = np.where(self._ranked_N, self.lexical, np.nan)
        return (1 - self.weight) * _z(self.similarity, self._of_similarity) + self.weight * _z(words_QN, self._of_words)

    @property
    def words_alone(self) -> bool:
        """Whether similarity has no part in a ranking."""
        return self.weight == 1 or bool((self._of_similarity[:, 1] == 0).any())

    @property
    def added(self) -> NDArray[np.float64]:
        """(Q, N): what ranks rows as the blend does when it is added to their similarities."""
        return self._steps()[:, None] * self.lexical

    def in_similarities(self, scores_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        """(Q,): one blend of each ranking, as the similarity with what is :attr:`added`."""
        mean_Q, deviation_Q = self._of_similarity.T
        return np.asarray(mean_Q + deviation_Q * scores_Q / (1 - self.weight) + self._steps() * self._of_words[:, 0])

    def _steps(self) -> NDArray[np.float64]:
        inverse_Q = _inverse(self._of_words[:, 1])
        return np.asarray(self.weight / (1 - self.weight) * self._of_similarity[:, 1] * inverse_Q)

    def settings(self) -> dict[str, Any]:
        """What the settings of a result say about the blend."""
        return {"lexical": self.weight, "hybrid": FUSION}


def few(ranked_N: NDArray[np.bool_]) -> bool:
    """Whether all rows that rank are :func:`sampled`: their scores are needed anyway."""
    return int(np.count_nonzero(ranked_N)) <= SAMPLED


def sampled(ranked_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(K,): all rows of ``ranked_N``, or where they are many some of them: stretches of neighbours, evenly spread."""
    rows = np.flatnonzero(ranked_N)
    if few(ranked_N):
        return rows
    firsts = np.arange(STRETCHES) * (len(rows) - SAMPLED // STRETCHES) // (STRETCHES - 1)
    return np.asarray(rows[(firsts[:, None] + np.arange(SAMPLED // STRETCHES)).ravel()])


def _inverse(deviation_Q: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.where(deviation_Q > 0, 1 / np.where(deviation_Q > 0, deviation_Q, 1.0), 0.0))


def _z(numbers_QN: NDArray[np.float64], standard_Q2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standardised; 0 where the deviation is."""
    return np.asarray((numbers_QN - standard_Q2[:, :1]) * _inverse(standard_Q2[:, 1])[:, None])


class HybridSearch:
    """Ranks rows by the blend, without the similarities of all of them."""

    def __init__(
        self,
        terms: Sequence[Term],
        lexical_QN: NDArray[np.float64],
        weight: float,
        ranked_N: NDArray[np.bool_],
        *,
        by_rows: bool,
        device: str,
    ) -> None:
        """``lexical_QN`` is of the rankings. With ``by_rows`` the first of them is by the largest similarity that a row
        has for any query.
        """
        terms[0].part.refuse_hollow()
        self._terms, self._ranked_N, self._by_rows, self._device = terms, ranked_N, by_rows, device
        self.hybrid = Hybrid(lexical_QN, weight, ranked_N, self._similarities(sampled(ranked_N)))

    def rank(self, top_k: int, bottom_k: int, task: Task) -> tuple[Ranking, Ranking]:
        """The best and the worst rows of each ranking; their similarities are then those of :attr:`hybrid`."""
        found = search(
            self._terms,
            top_k=top_k,
            bottom_k=bottom_k,
            combine=self._combine,
            device=self._device,
            task=task,
            allowed_N=self._ranked_N,
            added_CN=self.added(),
        )
        rows_QK = [np.sort(np.roll(ranking.rows, int(self._by_rows), axis=0)) for ranking in found]
        for own_QK in rows_QK:
            self._find_similarities(own_QK)
        scores_QN = self.hybrid.scores
        rankings = []
        for own_QK, sign in zip(rows_QK, (1.0, -1.0), strict=True):
            own = np.where(own_QK >= 0, np.take_along_axis(scores_QN, own_QK, axis=1), np.nan)
            rankings.append(ranked_among(own_QK, own, own_QK.shape[1], sign))
        best, worst = rankings
        return best, worst

    def _find_similarities(self, rows_QK: NDArray[np.int64]) -> None:
        """Of the rows of each ranking, into :attr:`hybrid`."""
        query, place = np.nonzero(rows_QK >= 0)
        row = rows_QK[query, place]
        order = np.argsort(row, kind="stable")
        query, row = query[order], row[order]
        column = (query - 1) % len(rows_QK) if self._by_rows else query  # a search has the one over all queries last
        self.hybrid.similarity[query, row] = pair_similarities(
            self._terms, row, column, combine=self._combine, device=self._device
        )

    @property
    def _combine(self) -> Combine | None:
        return "max" if self._by_rows else None

    def added(self) -> NDArray[np.float64]:
        """What is added to similarities, as a search has its rankings: the one over all queries last."""
        added_QN = self.hybrid.added
        return np.roll(added_QN, -1, axis=0) if self._by_rows else added_QN

    def _similarities(self, rows_K: NDArray[np.int64]) -> NDArray[np.float64]:
        scores = similarities_at(self._terms, rows_K, device=self._device)
        return np.concatenate([scores.max(0, keepdims=True), scores]) if self._by_rows else scores
