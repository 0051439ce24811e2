"""Exact search: every committed row against every query, streamed, with a running top k.

Legend: Q queries, R rows of a piece, D numbers of a vector, G blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.progress import Task
from ghoststore.store import Part
from ghoststore.store.part.status import FIRST_UNUSABLE
from query.search.part_score import Metric, Term
from query.search.products import Products, products_of
from query.search.second_moment import DampedInverse
from query.search.top_k import Pairs, Ranking, RunningTopK
from query.search.units import Unit, Units, on_threads
from query.search.vectors import DECODED_BYTES, PartVectors, SpanColumn, StoredRows, side_by_side

Combine = Literal["max"]
Result = TypeVar("Result")
Search = Callable[..., tuple[Ranking, Ranking]]
""":func:`search`, or what does the same elsewhere."""

PAIR_BYTES = 1 << 19
"""Bytes of the float64 rows of pairs that are scored at once, in the processor's cache."""
ALL_BYTES = 1 << 22
"""Bytes of the float64 rows that all queries are multiplied with: every query is read from memory once for so many."""
SAFE = 2.0**90
"""Largest length and factor of a row whose products certainly stay in the range of float32; its inverse is
the least.
"""


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
        self._status, self._norm = SpanColumn(part, "status"), SpanColumn(part, "norm")
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
        status, norm = self._status(span), self._norm(span)
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


def _out_of_range(numbers_R: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(R,): whether a number other than zero is so large or small that float32 products overflow or lose digits."""
    size_R = np.abs(numbers_R)
    return np.asarray((size_R != 0) & ~((size_R >= 1 / SAFE) & (size_R <= SAFE)))


def pair_scores(
    rows_RD: Tensor, factor_R: Tensor, unit_QD: Tensor, places: NDArray[np.int64], queries: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each pair of a row and a query their product times the row's factor, float64.

    Computed pair by pair, so that a score does not depend on the other rows of the piece.
    """
    scores = np.empty(len(places))
    spare_PD = unit_QD.new_empty(0)
    for batch in _batches(len(places), unit_QD.shape[1]):
        row, query = places[batch], queries[batch]
        if not spare_PD.numel():  # once, since new memory takes as long as a product
            spare_PD = unit_QD.new_empty(len(row), unit_QD.shape[1])
        if len(row) == 1:  # nothing is gathered: long vectors are read where they lie
            products_PD = spare_PD[:1].copy_(rows_RD[row[0] : row[0] + 1]).mul_(unit_QD[query[0]])
        else:
            products_PD = spare_PD[: len(row)].copy_(rows_RD[torch.from_numpy(row)])
            products_PD *= unit_QD[torch.from_numpy(query)]
        scores[batch] = (_sums(products_PD) * factor_R[torch.from_numpy(row)]).cpu().numpy()
    return scores


def _batches(pairs: int, dimension: int) -> Iterator[slice]:
    step = max(1, PAIR_BYTES // (8 * dimension))
    return (slice(first, first + step) for first in range(0, pairs, step))


def _sums(products_PD: Tensor) -> Tensor:
    """(P,): the sum of each row. Never that of one row alone: torch would divide it among threads, and round it
    otherwise than the same row among others.
    """
    if len(products_PD) == 1:
        return products_PD.expand(2, -1).sum(1)[:1]
    return products_PD.sum(1)


def units_of(terms: Sequence[Term], combine: Combine | None) -> NDArray[np.float64]:
    """(columns,): the longest length of each query, by which scores are divided while they are compared."""
    lengths_Q = np.max([term.lengths for term in terms], axis=0)
    if not combine:
        return np.asarray(lengths_Q)
    return np.full(len(lengths_Q) + 1, lengths_Q.max())  # to compare scores, all must have one scale


class PieceScores:
    """Scores of the rows of ``terms``, piece by piece. They are scaled so that no query is longer than 1.

    With ``combine="max"`` one more column follows those of the queries: the largest score of a row. ``added_CN`` has a
    number for each column and row that is added to the score.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        combine: Combine | None,
        device: str,
        allowed_N: NDArray[np.bool_] | None,
        screened: bool,
        added_CN: NDArray[np.float64] | None = None,
    ) -> None:
        self.terms, self.combine, self._allowed_N, self._added_CN = terms, combine, allowed_N, added_CN
        self.device = torch.device(device)
        self.units_Q = units_of(terms, combine)
        self.queries = len(terms[0].queries_QD)
        lengths_Q = self.units_Q[: self.queries]
        self._unit_QD = [(term.queries_QD / torch.from_numpy(lengths_Q).unsqueeze(1)).to(self.device) for term in terms]
        self._products: list[Products] = []
        """Of each term, what :meth:`cheap` needs. None without ``screened``."""
        if screened:
            self._products = [products_of(x.part, unit_QD) for x, unit_QD in zip(terms, self._unit_QD, strict=True)]

    @property
    def columns(self) -> int:
        """Number of rankings: one for each query, and the combined one."""
        return len(self.units_Q)

    def each(self, work: Callable[[Piece], Result], spans: Sequence[int]) -> Iterator[tuple[int, Result]]:
        """(rows, result) of ``work`` on each piece of ``spans``, in order, which must be committed in every part.

        On the CPU, ``work`` runs on several threads.
        """
        parts = [term.part for term in self.terms]
        if self.device.type != "cpu":
            facts = [RowFacts.for_term(term) for term in self.terms]
            for chunks in side_by_side([PartVectors(part, self.device) for part in parts], list(spans)):
                start, stop = chunks[0].start, chunks[0].stop
                rows = [
                    StoredRows("float32", chunk.rows_RD, None, part.groups)
                    for chunk, part in zip(chunks, parts, strict=True)
                ]
                products = [x.of(chunk) for x, chunk in zip(self._products, rows, strict=False)]
                yield stop - start, work(self._piece(Unit(start, stop, rows, products), facts))
            return
        for term in self.terms:
            if term.metric == "cosine" and term.preconditioner is not None:
                term.preconditioner.self_influence()  # computed once, not by every thread
        units, own = Units(parts, self._products), threading.local()

        def work_on(span: int) -> list[tuple[int, Result]]:
            if not hasattr(own, "facts"):
                own.facts = [RowFacts.for_term(term) for term in self.terms]
            return [(unit.stop - unit.start, work(self._piece(unit, own.facts))) for unit in units.of_span(span)]

        for results in on_threads(work_on, units.announced(spans)):
            yield from results

    def _piece(self, unit: Unit, facts: list[RowFacts]) -> Piece:
        start, stop = unit.start, unit.stop
        of_rows = [fact.of(start, stop) for fact in facts]
        usable = np.logical_and.reduce([usable for usable, _, _ in of_rows])
        if self._allowed_N is not None:
            usable = usable & self._allowed_N[start:stop]
        factors = [torch.from_numpy(factor).to(self.device) for _, _, factor in of_rows]
        lengths = [torch.from_numpy(length).to(self.device) for _, length, _ in of_rows]
        # Products of such numbers are not within their bound.
        wild = [torch.from_numpy(_out_of_range(length) | _out_of_range(factor)) for _, length, factor in of_rows]
        return Piece(self, unit, torch.from_numpy(usable).to(self.device), factors, lengths, wild)

    def cheap(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """(float32 scores, their largest errors), each (R, columns)."""
        cheap_RQ = slack_RQ = torch.zeros(())
        for place, (product_RQ, products) in enumerate(zip(piece.unit.products, self._products, strict=True)):
            factor_R, wild_R = piece.factors[place], piece.wild[place]
            product_RQ = product_RQ.mul_(factor_R.float().unsqueeze(1))
            error_R = piece.lengths[place] * factor_R.abs()
            error_RQ = (error_R.unsqueeze(1) * products.error_Q).float()
            if bool(wild_R.any()):  # score them exactly
                wild_R = wild_R.to(self.device)
                product_RQ[wild_R], error_RQ[wild_R] = 0.0, torch.inf
            cheap_RQ = product_RQ if place == 0 else cheap_RQ + product_RQ
            slack_RQ = error_RQ if place == 0 else slack_RQ + error_RQ
        if len(piece.unit.rows) > 1:
            # The sum over parts is rounded, too.
            slack_RQ = slack_RQ * (1 + 2.0**-20) + cheap_RQ.abs() * len(piece.unit.rows) * 2.0**-23
        if self.combine:
            cheap_RQ = torch.cat([cheap_RQ, cheap_RQ.amax(1, keepdim=True)], dim=1)
            slack_RQ = torch.cat([slack_RQ, slack_RQ.amax(1, keepdim=True)], dim=1)
        if self._added_CN is None:
            return cheap_RQ, slack_RQ
        added_CR = self._added_CN[:, piece.unit.start : piece.unit.stop] / self.units_Q[:, None]
        added_RC = torch.from_numpy(added_CR.T).to(self.device, torch.float32)
        roundings_RC = (cheap_RQ.abs() + added_RC.abs()) * 2.0**-22
        cheap_RC, slack_RC = cheap_RQ + added_RC, slack_RQ * (1 + 2.0**-20) + roundings_RC
        beyond_RC = ~cheap_RC.isfinite()  # the range of float32
        return cheap_RC.masked_fill_(beyond_RC, 0.0), slack_RC.masked_fill_(beyond_RC, torch.inf)

    def exact(self, piece: Piece, places: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores of pairs of a row of the piece and a column, float64."""
        scores = np.empty(len(places))
        single = columns < self.queries
        scores[single] = self._pairs(piece, places[single], columns[single])
        rows = places[~single]
        if len(rows):
            each = self._pairs(piece, np.repeat(rows, self.queries), np.tile(np.arange(self.queries), len(rows)))
            scores[~single] = each.reshape(len(rows), self.queries).max(1)
        if self._added_CN is not None:
            scores += self._added_CN[columns, places + piece.unit.start] / self.units_Q[columns]
        return scores

    def _pairs(self, piece: Piece, places: NDArray[np.int64], queries: NDArray[np.int64]) -> NDArray[np.float64]:
        """(pairs,) float64: the scores of pairs of a row of the piece and a query, summed over parts."""
        scores = np.zeros(len(places))
        for unit_QD, rows, factor_R in zip(self._unit_QD, piece.unit.rows, piece.factors, strict=True):
            step = max(1, DECODED_BYTES // (4 * unit_QD.shape[1]) // 4)
            for first in range(0, len(places), step):
                batch = slice(first, first + step)
                chosen, place = np.unique(places[batch], return_inverse=True)
                chosen_R = torch.from_numpy(chosen)
                rows_RD = rows.decoded(chosen_R)
                scores[batch] += pair_scores(rows_RD, factor_R[chosen_R], unit_QD, place, queries[batch])
        return scores

    def all_of(self, piece: Piece, places: Tensor | None = None) -> NDArray[np.float64]:
        """(Q, R) scores, summed in the order that :meth:`exact` sums in, so that equal rows have equal scores. With
        ``places`` of these rows of the piece alone.
        """
        count = len(piece.usable_R) if places is None else len(places)
        scores = np.zeros((self.queries, count))
        for unit_QD, rows, factor_R in zip(self._unit_QD, piece.unit.rows, piece.factors, strict=True):
            step = max(1, ALL_BYTES // (8 * unit_QD.shape[1]))
            spare_RD = unit_QD.new_empty(min(step, count), unit_QD.shape[1])
            for first in range(0, count, step):
                batch = slice(first, first + step)
                chosen = batch if places is None else places[batch]
                wide_RD = rows.decoded(chosen).double()
                products_RD = spare_RD[: len(wide_RD)]
                for query, unit_D in enumerate(unit_QD):
                    torch.mul(wide_RD, unit_D, out=products_RD)
                    scores[query, batch] += (_sums(products_RD) * factor_R[chosen]).cpu().numpy()
        return scores


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of all terms: one entry for each term in ``factors``, ``lengths`` and ``wild``."""

    scores: PieceScores
    unit: Unit
    usable_R: Tensor
    factors: list[Tensor]
    lengths: list[Tensor]
    wild: list[Tensor]
    """(R,) bool, on the CPU: whether the length or the factor of a row is :func:`_out_of_range`."""

    def exact(self, places: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """See :meth:`PieceScores.exact`."""
        return self.scores.exact(self, places, columns)


class ExactSearch:
    """:func:`search`, some spans at a time. Several on equal ``terms`` may divide the spans among them."""

    def __init__(
        self,
        terms: Sequence[Term],
        *,
        top_k: int,
        bottom_k: int = 0,
        combine: Combine | None = None,
        device: str = "cpu",
        allowed_N: NDArray[np.bool_] | None = None,
        added_CN: NDArray[np.float64] | None = None,
    ) -> None:
        self._scores = PieceScores(terms, combine, device, allowed_N, screened=True, added_CN=added_CN)
        columns = self._scores.columns
        self.best, self.worst = RunningTopK(columns, top_k), RunningTopK(columns, bottom_k)

    def over(self, spans: Sequence[int], task: Task | None = None) -> None:
        """Add the rows of ``spans``. Raises CorruptError for a damaged chunk."""

        def work(piece: Piece) -> None:
            cheap_RQ, slack_RQ = self._scores.cheap(piece)
            of_piece = piece.usable_R, piece.unit.start, piece.exact
            self.best.consider(cheap_RQ, slack_RQ, *of_piece)
            self.worst.consider(-cheap_RQ, slack_RQ, *of_piece, -1.0)

        for rows, _ in self._scores.each(work, spans):
            if task:
                task.advance(rows)

    def taken(self) -> tuple[Pairs, Pairs]:
        """The best and the worst so far, which are forgotten: what :meth:`RunningTopK.add` takes."""
        pairs = self.best.pairs(), self.worst.pairs()
        self.best, self.worst = (RunningTopK(len(x.scores), x.k) for x in (self.best, self.worst))
        return pairs

    def rankings(self) -> tuple[Ranking, Ranking]:
        """The best and the worst rows of all spans so far."""
        return self.best.ranking(self._scores.units_Q), self.worst.ranking(self._scores.units_Q, -1.0)


def search(
    terms: Sequence[Term],
    *,
    top_k: int,
    bottom_k: int = 0,
    combine: Combine | None = None,
    device: str = "cpu",
    task: Task | None = None,
    allowed_N: NDArray[np.bool_] | None = None,
    added_CN: NDArray[np.float64] | None = None,
) -> tuple[Ranking, Ranking]:
    """The ``top_k`` rows with the highest and the ``bottom_k`` rows with the lowest scores, for each query of
    ``terms``.

    With ``combine="max"`` one more ranking follows: by the largest score that a row has for any query. Rows that are
    not usable in every part are never returned, nor rows that are not in ``allowed_N`` (None: all are); the cosine of a
    zero row is 0. ``added_CN`` is added to the scores of each ranking, the one by the largest score last.

    Reads each committed chunk once, without those of spans that have no allowed row; memory does not depend on the
    number of rows. Scores are float64 products of the stored numbers. Rows that cannot rank are ruled out first, by
    float32 products and their error bound.

    Raises CorruptError for a damaged chunk.
    """
    exact = ExactSearch(
        terms, top_k=top_k, bottom_k=bottom_k, combine=combine, device=device, allowed_N=allowed_N, added_CN=added_CN
    )
    exact.over(searched_spans(terms, allowed_N), task)
    return exact.rankings()


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
    scores = PieceScores(terms, None, device, allowed_N, screened=False)
    terms[0].part.refuse_hollow()
    scores_QN = np.full((scores.queries, terms[0].part.layout.rows), np.nan)

    def work(piece: Piece) -> None:
        usable = piece.usable_R.cpu().numpy()
        scores_QN[:, piece.unit.start : piece.unit.stop] = np.where(usable, scores.all_of(piece), np.nan)

    for rows, _ in scores.each(work, searched_spans(terms, allowed_N)):
        if task:
            task.advance(rows)
    return np.asarray(scores_QN * scores.units_Q[:, None])
