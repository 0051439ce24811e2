"""The best rows so far of each query, of pieces that come in any order.

Legend: Q queries, R rows of a piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Exact = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]
Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]
"""Rows, queries and scores of pairs."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best rows of each query, best first. With fewer than k rows, ``rows`` ends in -1."""

    rows: NDArray[np.int64]
    """(Q, k)."""
    scores: NDArray[np.float64]
    """(Q, k)."""

    def cut(self, k: int) -> Ranking:
        """The first k of each query."""
        return Ranking(self.rows[:, :k], self.scores[:, :k])


class RunningTopK:
    """The k largest scores so far, for each of Q queries; equal scores by lower row.

    Cheap scores and their error bound rule out most rows; the remaining ones are scored in float64. So the result is
    that of exact scores, and equal rows have equal scores wherever they stand.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self._adding = threading.Lock()
        self.scores = np.full((queries, k), -np.inf)
        self.rows = np.full((queries, k), -1, dtype=np.int64)

    def consider(
        self, cheap_RQ: Tensor, slack_RQ: Tensor, usable_R: Tensor, first_row: int, exact: Exact, sign: float = 1.0
    ) -> None:
        """Add the pairs that may rank, of rows from ``first_row`` on. See :meth:`candidates`."""
        if self.k:
            self.add(self.candidates(cheap_RQ, slack_RQ, usable_R, first_row, exact, sign))

    def candidates(
        self, cheap_RQ: Tensor, slack_RQ: Tensor, usable_R: Tensor, first_row: int, exact: Exact, sign: float = 1.0
    ) -> Pairs:
        """(rows, queries, scores) of all pairs that may rank, of rows from ``first_row`` on.

        Their scores times ``sign`` lie within ``slack_RQ`` of ``cheap_RQ``. ``exact(places, queries)`` gives the scores
        of pairs, float64. Other threads may add pairs meanwhile: a bound that is out of date rules out less.
        """
        with np.errstate(over="ignore"):  # infinite, which no score within the range of float32 reaches
            bound_Q = torch.from_numpy(self.scores[:, -1].astype(np.float32)).to(cheap_RQ.device)
        highest_RQ = cheap_RQ + slack_RQ
        candidate_RQ = (highest_RQ >= bound_Q) & usable_R.unsqueeze(1)
        candidates = int(candidate_RQ.sum())
        if not candidates:
            none = np.zeros(0, dtype=np.int64)
            return none, none, np.zeros(0)
        if candidates > 4 * candidate_RQ.shape[1] * self.k:
            # Too many, as in a first piece: leave out rows that stay below what k rows of this piece surely reach.
            lowest_RQ = (cheap_RQ - slack_RQ).masked_fill_(~usable_R.unsqueeze(1), -torch.inf)
            reached_Q = lowest_RQ.topk(min(self.k, len(lowest_RQ)), dim=0).values[-1]
            if self.k <= len(lowest_RQ):
                candidate_RQ &= highest_RQ >= reached_Q
        place, query = (x.cpu().numpy() for x in candidate_RQ.nonzero(as_tuple=True))
        return place + first_row, query, exact(place, query) * sign

    def add(self, pairs: Pairs) -> None:
        """Merge pairs into the k best of each query: higher score first, then lower row. In any order of calls, of
        any thread.
        """
        row, query, score = pairs
        if len(row):
            with self._adding:
                self._merge(row, query, score)

    def _merge(self, row: NDArray[np.int64], query: NDArray[np.int64], score: NDArray[np.float64]) -> None:
        touched, column = np.unique(query, return_inverse=True)
        all_query = np.concatenate([np.repeat(np.arange(len(touched)), self.k), column])
        all_score = np.concatenate([self.scores[touched].ravel(), score])
        all_row = np.concatenate([self.rows[touched].ravel(), row])
        order = np.lexsort((all_row, -all_score, all_query))
        starts = np.searchsorted(all_query[order], np.arange(len(touched)))
        best = order[starts[:, None] + np.arange(self.k)]
        self.scores[touched], self.rows[touched] = all_score[best], all_row[best]

    def pairs(self) -> Pairs:
        """What :meth:`add` takes to have all that is here."""
        query, place = np.nonzero(self.rows >= 0)
        return self.rows[query, place], query, self.scores[query, place]

    def ranking(self, units_Q: NDArray[np.float64], sign: float = 1.0) -> Ranking:
        """The rows, with their scores times ``sign`` and the unit of their query."""
        return Ranking(self.rows, sign * self.scores * units_Q[:, None])
