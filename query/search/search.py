"""Exact search: every committed row against every query, streamed, with a running top k.

Legend: Q queries, R rows of a piece, D numbers of a vector, G blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.progress import Task
from ghoststore.store import Part
from ghoststore.store.part.status import FIRST_UNUSABLE
from ghoststore.store.spans.reader import read_span
from query.search.part_score import Metric, Term
from query.search.second_moment import DampedInverse
from query.search.vectors import PartVectors, side_by_side

Combine = Literal["max"]
Exact = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]

PAIRS_AT_ONCE = 1024
PIECE = 2048
"""Most numbers of one float32 product. Products of longer vectors are sums of such, in float64: the bound of the error
grows with the numbers of one product, and what it does not rule out is scored in float64, pair by pair.
"""
SAFE = 2.0**90
"""Largest length and factor of a row whose products certainly stay in the range of float32; its inverse is
the least.
"""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best rows of each query, best first. With fewer than k rows, ``rows`` ends in -1."""

    rows: NDArray[np.int64]
    """(Q, k)."""
    scores: NDArray[np.float64]
    """(Q, k)."""


class RunningTopK:
    """The k largest scores so far, for each of Q queries; equal scores by lower row.

    Cheap scores and their error bound rule out most rows; the remaining ones are scored in float64. So the result is
    that of exact scores, and equal rows have equal scores wherever they stand.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf)
        self.rows = np.full((queries, k), -1, dtype=np.int64)

    def add(
        self, cheap_RQ: Tensor, slack_RQ: Tensor, usable_R: Tensor, first_row: int, exact: Exact, sign: float = 1.0
    ) -> None:
        """Add the rows from ``first_row`` on, whose scores lie within ``slack_RQ`` of ``cheap_RQ``.

        Calls must come in ascending order of rows. ``exact(places, queries)`` times ``sign`` gives the scores of pairs,
        float64.
        """
        if self.k == 0:
            return
        bound_Q = torch.from_numpy(self.scores[:, -1].astype(np.float32)).to(cheap_RQ.device)
        highest_RQ = cheap_RQ + slack_RQ
        candidate_RQ = (highest_RQ >= bound_Q) & usable_R.unsqueeze(1)
        if int(candidate_RQ.sum()) > 4 * candidate_RQ.shape[1] * self.k:
            # Too many, as in a first chunk: leave out rows that stay below what k rows of this chunk surely reach.
            lowest_RQ = (cheap_RQ - slack_RQ).masked_fill_(~usable_R.unsqueeze(1), -torch.inf)
            reached_Q = lowest_RQ.topk(min(self.k, len(lowest_RQ)), dim=0).values[-1]
            if self.k <= len(lowest_RQ):
                candidate_RQ &= highest_RQ >= reached_Q
        place, query = (x.cpu().numpy() for x in candidate_RQ.nonzero(as_tuple=True))
        if len(place):
            self._merge(place + first_row, query, exact(place, query) * sign)

    def _merge(self, row: NDArray[np.int64], query: NDArray[np.int64], score: NDArray[np.float64]) -> None:
        """Merge these rows into the k best of each query: higher score first, then lower row."""
        touched, column = np.unique(query, return_inverse=True)
        all_query = np.concatenate([np.repeat(np.arange(len(touched)), self.k), column])
        all_score = np.concatenate([self.scores[touched].ravel(), score])
        all_row = np.concatenate([self.rows[touched].ravel(), row])
        order = np.lexsort((all_row, -all_score, all_query))
        starts = np.searchsorted(all_query[order], np.arange(len(touched)))
        best = order[starts[:, None] + np.arange(self.k)]
        self.scores[touched], self.rows[touched] = all_score[best], all_row[best]


class RowFacts:
    """Whether rows are usable, their lengths and their scale factors. Holds one span at a time."""

    def __init__(
        self,
        part: Part,
        groups: Sequence[int] | None = None,
        metric: Metric = "dot",
        weight: float = 1.0,
        preconditioner: DampedInverse | None = None,
    ) -> None:
        self._part, self._metric, self._weight, self._preconditioner = part, metric, weight, preconditioner
        self._columns: slice | NDArray[np.int64] = slice(None) if groups is None else np.asarray(groups, dtype=np.int64)
        self._span = -1
        self._usable = np.zeros(0, dtype=bool)
        self._length = np.zeros(0)
        self._factor = np.zeros(0)

    @classmethod
    def for_term(cls, term: Term) -> RowFacts:
        """The facts that the scores of ``term`` need."""
        return cls(term.part, term.groups, term.metric, term.weight, term.preconditioner)

    def of(self, start: int, stop: int) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
        """(usable, Euclidean length, factor) of the rows ``start`` to ``stop``, which must lie in one span.

        A row's score is its product with the query, times the factor. The cosine of a row of length zero is 0.
        """
        part = self._part
        span = start // part.layout.span_rows
        if span != self._span:
            self._read(span)
        first, _ = part.layout.span_of(span)
        inside = slice(start - first, stop - first)
        return self._usable[inside], self._length[inside], self._factor[inside]

    def _read(self, span: int) -> None:
        status, norm = (read_span(self._part, name, span) for name in ("status", "norm"))
        self._usable = status < FIRST_UNUSABLE
        self._length = np.sqrt(np.square(norm[:, self._columns], dtype=np.float64).sum(1))
        if self._metric == "cosine":
            length = self._length
            if self._preconditioner is not None:
                length = np.sqrt(self._preconditioner.squares(span)[:, self._columns].sum(1))
            self._factor = self._weight / np.where(length > 0, length, 1.0)
        else:
            self._factor = np.full(len(status), self._weight)
        self._span = span


def shared_spans(terms: Sequence[Term]) -> list[int]:
    """Spans that are committed in every part."""
    return sorted(set.intersection(*(set(term.part.spans) for term in terms)))


def searched_spans(terms: Sequence[Term], allowed_N: NDArray[np.bool_] | None) -> list[int]:
    """Of the :func:`shared_spans` those with an allowed row (None: all rows are allowed)."""
    spans, layout = shared_spans(terms), terms[0].part.layout
    if allowed_N is None:
        return spans
    return [span for span in spans if allowed_N[slice(*layout.span_of(span))].any()]


def product_error(dimension: int) -> float:
    """Largest error of a float32 inner product of two vectors of length 1, in any order of summation.

    It is n·u with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and a few u more for
    the roundings of query, scale and bound.
    """
    return (dimension + 8) * 2.0**-24


def cheap_products(rows_RD: Tensor, query_DQ: Tensor) -> Tensor:
    """(R, Q) float32: products of rows and queries, with the error of pieces of at most :data:`PIECE` numbers.

    By Cauchy and Schwarz the errors of the pieces add up to no more than one piece's bound for the whole lengths.
    """
    dimension = rows_RD.shape[1]
    if dimension <= PIECE:
        return rows_RD @ query_DQ
    total_RQ = torch.zeros(len(rows_RD), query_DQ.shape[1], dtype=torch.float64, device=rows_RD.device)
    for start in range(0, dimension, PIECE):
        total_RQ += rows_RD[:, start : start + PIECE] @ query_DQ[start : start + PIECE]
    return total_RQ.float()


def _out_of_range(numbers_R: Tensor) -> Tensor:
    """(R,): whether a number other than zero is so large or small that float32 products overflow or lose digits."""
    size_R = numbers_R.abs()
    return (size_R != 0) & ~((size_R >= 1 / SAFE) & (size_R <= SAFE))


def pair_scores(
    rows_RD: Tensor, factor_R: Tensor, unit_QD: Tensor, places: NDArray[np.int64], queries: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each pair of a row and a query their product times the row's factor, float64.

    Computed pair by pair, so that a score does not depend on the other rows of the chunk.
    """
    scores = np.empty(len(places))
    for first in range(0, len(places), PAIRS_AT_ONCE):
        batch = slice(first, first + PAIRS_AT_ONCE)
        row, query = torch.from_numpy(places[batch]), torch.from_numpy(queries[batch])
        products = (rows_RD[row].double() * unit_QD[query]).sum(1) * factor_R[row]
        scores[batch] = products.cpu().numpy()
    return scores


class _PieceScores:
    """Scores of the rows of ``terms``, piece by piece. They are scaled so that no query is longer than 1.

    With ``combine="max"`` one more column follows those of the queries: the largest score of a row.
    """

    def __init__(
        self, terms: Sequence[Term], combine: Combine | None, device: str, allowed_N: NDArray[np.bool_] | None
    ) -> None:
        self.terms, self.combine, self._allowed_N = terms, combine, allowed_N
        self.device = torch.device(device)
        lengths_Q = np.max([term.lengths for term in terms], axis=0)
        if combine:
            lengths_Q = np.full_like(lengths_Q, lengths_Q.max())  # to compare scores, all must have one scale
        self.units_Q = np.append(lengths_Q, lengths_Q[0]) if combine else lengths_Q
        """(columns,): factors that undo the scaling at the end."""
        self.queries = len(lengths_Q)
        self._unit_QD = [(term.queries_QD / torch.from_numpy(lengths_Q).unsqueeze(1)).to(self.device) for term in terms]
        self._query_DQ = [unit.float().t().contiguous() for unit in self._unit_QD]
        self._length_Q = [unit.norm(dim=1).float() for unit in self._unit_QD]
        self._facts = [RowFacts.for_term(term) for term in terms]

    @property
    def columns(self) -> int:
        """Number of rankings: one for each query, and the combined one."""
        return len(self.units_Q)

    def pieces(self) -> Iterator[_Piece]:
        """All rows that are committed in every part, in order; no span without an allowed row is read."""
        sources = [PartVectors(term.part, self.device) for term in self.terms]
        for vectors in side_by_side(sources, searched_spans(self.terms, self._allowed_N)):
            start, stop = vectors[0].start, vectors[0].stop
            facts = [fact.of(start, stop) for fact in self._facts]
            usable = np.logical_and.reduce([usable for usable, _, _ in facts])
            if self._allowed_N is not None:
                usable = usable & self._allowed_N[start:stop]
            rows, factors, lengths = [], [], []
            for chunk, (_, length, factor) in zip(vectors, facts, strict=True):
                rows.append(chunk.rows_RD)
                factors.append(torch.from_numpy(factor).to(self.device))
                lengths.append(torch.from_numpy(length).to(self.device))
            yield _Piece(self, start, stop, torch.from_numpy(usable).to(self.device), rows, factors, lengths)

    def cheap(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """(float32 scores, their largest errors), each (R, columns)."""
        cheap_RQ = slack_RQ = torch.zeros(())
        for place, rows_RD in enumerate(piece.rows):
            factor_R = piece.factors[place]
            product_RQ = cheap_products(rows_RD, self._query_DQ[place]).mul_(factor_R.float().unsqueeze(1))
            error_R = self._product_error(min(PIECE, rows_RD.shape[1])) * piece.lengths[place] * factor_R.abs()
            error_RQ = error_R.float().unsqueeze(1) * self._length_Q[place]
            wild_R = _out_of_range(piece.lengths[place]) | _out_of_range(factor_R)
            if bool(wild_R.any()):  # the bound does not hold for them: score them exactly
                product_RQ[wild_R], error_RQ[wild_R] = 0.0, torch.inf
            cheap_RQ = product_RQ if place == 0 else cheap_RQ + product_RQ
            slack_RQ = error_RQ if place == 0 else slack_RQ + error_RQ
        if len(piece.rows) > 1:
            # The sum over parts is rounded, too.
            slack_RQ = slack_RQ * (1 + 2.0**-20) + cheap_RQ.abs() * len(piece.rows) * 2.0**-23
        if not self.combine:
            return cheap_RQ, slack_RQ
        return (
            torch.cat([cheap_RQ, cheap_RQ.amax(1, keepdim=True)], dim=1),
            torch.cat([slack_RQ, slack_RQ.amax(1, keepdim=True)], dim=1),
        )

    def _product_error(self, dimension: int) -> float:
        """:func:`product_error`, plus the error of inputs rounded to TF32 where the user allows that on a GPU."""
        tf32 = self.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        return product_error(dimension) + (2.0**-9 if tf32 else 0.0)

    def exact(self, piece: _Piece, places: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores of pairs of a row of the piece and a column, float64."""
        scores = np.empty(len(places))
        single = columns < self.queries
        scores[single] = self._pairs(piece, places[single], columns[single])
        rows = places[~single]
        if len(rows):
            each = self._pairs(piece, np.repeat(rows, self.queries), np.tile(np.arange(self.queries), len(rows)))
            scores[~single] = each.reshape(len(rows), self.queries).max(1)
        return scores

    def _pairs(self, piece: _Piece, places: NDArray[np.int64], queries: NDArray[np.int64]) -> NDArray[np.float64]:
        """(pairs,) float64: the scores of pairs of a row of the piece and a query, summed over parts."""
        scores = np.zeros(len(places))
        for unit_QD, rows_RD, factor_R in zip(self._unit_QD, piece.rows, piece.factors, strict=True):
            scores += pair_scores(rows_RD, factor_R, unit_QD, places, queries)
        return scores

    def all_of(self, piece: _Piece) -> NDArray[np.float64]:
        """(Q, R) scores, summed in the order that :meth:`exact` sums in, so that equal rows have equal scores."""
        scores = np.zeros((self.queries, piece.stop - piece.start))
        for unit_QD, rows_RD, factor_R in zip(self._unit_QD, piece.rows, piece.factors, strict=True):
            wide_RD = rows_RD.double()
            for query, unit_D in enumerate(unit_QD):
                scores[query] += ((wide_RD * unit_D).sum(1) * factor_R).cpu().numpy()
        return scores


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``start`` to ``stop`` of all terms: one entry for each term in ``rows``, ``factors`` and ``lengths``."""

    scores: _PieceScores
    start: int
    stop: int
    usable_R: Tensor
    rows: list[Tensor]
    factors: list[Tensor]
    lengths: list[Tensor]

    def exact(self, places: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`_PieceScores.exact`."""
        return self.scores.exact(self, places, columns)


def search(
    terms: Sequence[Term],
    *,
    top_k: int,
    bottom_k: int = 0,
    combine: Combine | None = None,
    device: str = "cpu",
    task: Task | None = None,
    allowed_N: NDArray[np.bool_] | None = None,
) -> tuple[Ranking, Ranking]:
    """The ``top_k`` rows with the highest and the ``bottom_k`` rows with the lowest scores, for each query of
    ``terms``.

    With ``combine="max"`` one more ranking follows: by the largest score that a row has for any query. Rows that are
    not usable in every part are never returned, nor rows that are not in ``allowed_N`` (None: all are); the cosine of a
    zero row is 0.

    Reads each committed chunk once, without those of spans that have no allowed row; memory does not depend on the
    number of rows. Scores are float64 products of the stored numbers. Rows that cannot rank are ruled out first, by
    float32 products and their error bound.

    Raises CorruptError for a damaged chunk.
    """
    scores = _PieceScores(terms, combine, device, allowed_N)
    best, worst = RunningTopK(scores.columns, top_k), RunningTopK(scores.columns, bottom_k)
    for piece in scores.pieces():
        cheap_RQ, slack_RQ = scores.cheap(piece)
        best.add(cheap_RQ, slack_RQ, piece.usable_R, piece.start, piece.exact)
        worst.add(-cheap_RQ, slack_RQ, piece.usable_R, piece.start, piece.exact, sign=-1.0)
        if task:
            task.advance(piece.stop - piece.start)
    units = scores.units_Q[:, None]
    return Ranking(best.rows, best.scores * units), Ranking(worst.rows, -worst.scores * units)


def similarities(
    terms: Sequence[Term],
    *,
    device: str = "cpu",
    task: Task | None = None,
    allowed_N: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    """(Q, N) float64: the score of every row for each query, equal to that of :func:`search`; NaN for rows that are
    unusable, or not allowed.

    Memory: 8 bytes for each row and query, and one chunk. Raises CorruptError for a damaged chunk.
    """
    scores = _PieceScores(terms, None, device, allowed_N)
    terms[0].part.refuse_hollow()
    scores_QN = np.full((scores.queries, terms[0].part.layout.rows), np.nan)
    for piece in scores.pieces():
        usable = piece.usable_R.cpu().numpy()
        scores_QN[:, piece.start : piece.stop] = np.where(usable, scores.all_of(piece), np.nan)
        if task:
            task.advance(piece.stop - piece.start)
    return np.asarray(scores_QN * scores.units_Q[:, None])
