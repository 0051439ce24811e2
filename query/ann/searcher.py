"""Searching with an index: vectors as they go into FAISS, the candidates it finds, and their exact scores.

Legend: Q queries, R rows (or queries), D numbers of a vector, d numbers of a vector in FAISS, C candidates of a query.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import CorruptError
from indexer.projection.sketch import Sketch
from query.ann.engine import Engine
from query.ann.rows import CheckedRows
from query.search.part_score import Metric, Term
from query.search.search import pair_scores
from query.search.top_k import Ranking

OVERSAMPLE = 4
"""Least number of candidates for each row of the ranking."""
BATCH_BYTES = 32 << 20
"""Bytes of float32 rows in memory at once."""


def front_key(dimension: int) -> str:
    """The seed text of the sketch of vectors of ``dimension`` numbers."""
    return f"ghoststore/1|index|front|n={dimension}"


class Front:
    """Turns vectors into what goes into FAISS: scaled (to length 1 for the cosine) and, with a ``key``, sketched to d
    numbers.

    The sketch keeps inner products in expectation, with a standard error of about ‖x‖‖y‖/√d.
    """

    def __init__(self, dimension: int, front_dimension: int, key: str | None, metric: Metric, scale: float) -> None:
        self.metric, self.scale = metric, scale
        self._sketch = None if key is None else Sketch(key, dimension, front_dimension)

    def rows(self, rows_RD: Tensor) -> NDArray[np.float32]:
        """(R, d) float32, contiguous: rows to add to FAISS."""
        if self.metric == "cosine":
            return self._sketched(_unit(rows_RD))
        return self._sketched(rows_RD * self.scale)

    def queries(self, queries_RD: Tensor) -> NDArray[np.float32]:
        """(R, d) float32: queries for FAISS, each scaled to length 1, because lengths do not change a ranking."""
        return self._sketched(_unit(queries_RD).float())

    def _sketched(self, rows_RD: Tensor) -> NDArray[np.float32]:
        numbers_Rd = rows_RD if self._sketch is None else self._sketch(rows_RD)
        return np.ascontiguousarray(numbers_Rd.numpy(), dtype=np.float32)


def _unit(rows_RD: Tensor) -> Tensor:
    length_R = torch.linalg.vector_norm(rows_RD, dim=1, keepdim=True, dtype=torch.float64)
    return rows_RD / torch.where(length_R > 0, length_R, 1.0).to(rows_RD.dtype)


def power_of_two(length: float) -> float:
    """The power of two that scales a vector of that ``length`` to about 1; 1 for length zero."""
    return 2.0 ** -round(math.log2(length)) if length > 0 else 1.0


class Searcher:
    """Ranks the candidates of an index as ``query.search.search.search`` ranks all rows, with bit-identical scores."""

    def __init__(self, engine: Engine, front: Front, rows: CheckedRows, candidates: int) -> None:
        self.engine, self.front, self.rows = engine, front, rows
        self.candidates = candidates

    def search(
        self, term: Term, *, top_k: int, bottom_k: int = 0, wanted: int | None = None
    ) -> tuple[Ranking, Ranking]:
        """The best ``top_k`` and the worst ``bottom_k`` candidates for each query of ``term``; equal scores by lower
        row.

        The search is as wide as one for ``wanted`` rows (default: ``top_k`` or ``bottom_k``), and wider for a query
        that would get fewer than that. If there are fewer rows, ``rows`` ends in -1. Raises CorruptError for a damaged
        row.
        """
        best, worst = self._best(term, top_k, 1.0, wanted), self._best(term, bottom_k, -1.0, wanted)
        assert best is not None
        assert worst is not None
        return best, worst

    def search_among(
        self, term: Term, allowed_N: NDArray[np.bool_], *, top_k: int, bottom_k: int = 0
    ) -> tuple[Ranking, Ranking] | None:
        """:meth:`search` among the allowed rows of the part; None if the index cannot filter.

        Where no more of them are allowed than candidates are scored for a query, all are: the ranking is exact.
        """
        allowed_P = allowed_N[self.rows.table["row"]]
        best = self._best(term, top_k, 1.0, None, allowed_P)
        worst = None if best is None else self._best(term, bottom_k, -1.0, None, allowed_P)
        return None if best is None or worst is None else (best, worst)

    def _best(
        self, term: Term, k: int, sign: float, wanted: int | None, allowed_P: NDArray[np.bool_] | None = None
    ) -> Ranking | None:
        """The ``k`` candidates of each query with the highest ``sign`` × score, among the allowed places of the table
        (None: all are). None if the index cannot filter.
        """
        queries = len(term.queries_QD)
        rows_Qk, scores_Qk = np.full((queries, k), -1, dtype=np.int64), np.full((queries, k), -sign * np.inf)
        if k == 0 or queries == 0:
            return Ranking(rows_Qk, scores_Qk)
        signed = sign if term.weight >= 0 else -sign
        wanted = k if wanted is None else wanted
        places_QC = self._candidates(self.front.queries(term.queries_QD * signed), wanted, allowed_P)
        if places_QC is None:
            return None
        if places_QC.max(initial=-1) >= len(self.rows.table):
            raise CorruptError("the index names rows that it does not have; `ghoststore index … --rebuild`")
        scores_QC = self._scores(term, places_QC)
        rows_QC = np.where(places_QC >= 0, self.rows.table["row"][places_QC], -1)
        count = min(k, places_QC.shape[1])
        # Entries without a candidate come last, whatever the sign.
        order_QC = np.lexsort((rows_QC, -sign * scores_QC, places_QC < 0), axis=1)[:, :count]
        rows_Qk[:, :count] = np.take_along_axis(rows_QC, order_QC, axis=1)
        best_QC = np.take_along_axis(scores_QC, order_QC, axis=1)
        scores_Qk[:, :count] = np.where(rows_Qk[:, :count] >= 0, best_QC, -sign * np.inf)
        return Ranking(rows_Qk, scores_Qk)

    def _candidates(
        self, queries_Qd: NDArray[np.float32], wanted: int, allowed_P: NDArray[np.bool_] | None
    ) -> NDArray[np.int64] | None:
        """(Q, C) places of candidates among the allowed ones (None: all are), -1 where there are no more. None if the
        index cannot filter.

        The lists or the graph that the index looks at may hold fewer than ``wanted`` rows: a query that gets fewer
        is searched for in more of them, until it has enough or there are no more.
        """
        count, effort = max(self.candidates, OVERSAMPLE * wanted), self.engine.effort
        if allowed_P is not None and (allowed := int(allowed_P.sum())) <= count:
            return np.broadcast_to(np.flatnonzero(allowed_P), (len(queries_Qd), allowed)).copy()
        places_QC = self._searched(queries_Qd, count, allowed_P)
        if places_QC is None:
            return None
        enough = min(wanted, places_QC.shape[1])
        try:
            for wider in self.engine.efforts():
                (short,) = np.nonzero((places_QC >= 0).sum(1) < enough)
                if not len(short):
                    break
                if wider is not None and effort is not None and wider > effort:
                    self.engine.set_effort(wider)
                    wider_QC = self._searched(queries_Qd[short], count, allowed_P)
                    assert wider_QC is not None
                    places_QC[short] = wider_QC
        finally:
            self.engine.set_effort(effort)
        return places_QC

    def _searched(
        self, queries_Qd: NDArray[np.float32], count: int, allowed_P: NDArray[np.bool_] | None
    ) -> NDArray[np.int64] | None:
        """(Q, count) places that the index gives for its present effort; None if it cannot filter."""
        if allowed_P is None:
            return self.engine.search(queries_Qd, count)
        return self.engine.search_among(queries_Qd, count, allowed_P)

    def _scores(self, term: Term, places_QC: NDArray[np.int64]) -> NDArray[np.float64]:
        """(Q, C) float64: the exact scores of the candidates. Each row is read once."""
        units_Q = term.lengths
        unit_QD = term.queries_QD / torch.from_numpy(units_Q).unsqueeze(1)
        query, column = np.nonzero(places_QC >= 0)
        places, place_of_pair = np.unique(places_QC[query, column], return_inverse=True)
        pairs = np.argsort(place_of_pair, kind="stable")
        scores_QC = np.zeros(places_QC.shape)
        batch = max(1, BATCH_BYTES // (4 * unit_QD.shape[1]))
        for first in range(0, len(places), batch):
            batch_places = places[first : first + batch]
            begin, end = np.searchsorted(place_of_pair[pairs], (first, first + len(batch_places)))
            batch_pairs = pairs[begin:end]
            queries = query[batch_pairs]
            scores_QC[queries, column[batch_pairs]] = pair_scores(
                self.rows.read(batch_places),
                self._factors(term, batch_places),
                unit_QD,
                place_of_pair[batch_pairs] - first,
                queries,
            )
        return np.asarray(scores_QC * units_Q[:, None])

    def _factors(self, term: Term, places: NDArray[np.int64]) -> Tensor:
        """The factors of rows, equal to those of ``query.search.search.RowFacts``."""
        length = self.rows.table["length"][places]
        scaled = term.weight / np.where(length > 0, length, 1.0)
        return torch.from_numpy(scaled if term.metric == "cosine" else np.full(len(places), term.weight))
