"""Exact search: every committed row against every query, streamed, with a running top k.

Legend: Q queries, R rows of a chunk, D numbers of a vector, G blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.progress import Task
from ghoststore.store import Part
from ghoststore.store.reader import read_span, stream
from ghoststore.store.status import FIRST_UNUSABLE

Metric = Literal["dot", "cosine"]
Exact = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]

PAIRS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best rows of each query, best first. Where fewer rows exist, ``rows`` ends in -1."""

    rows: NDArray[np.int64]
    """(Q, k)."""
    scores: NDArray[np.float64]
    """(Q, k)."""


class RunningTopK:
    """The k largest scores seen so far of each of Q queries; equal scores by lower row.

    Candidates are screened by cheap scores and their error bound, and scored again in float64: so the result is that
    of the exact scores, and equal rows have equal scores wherever they stand.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = np.full((queries, k), -np.inf)
        self.rows = np.full((queries, k), -1, dtype=np.int64)

    def add(
        self, cheap_RQ: Tensor, slack_R: Tensor, usable_R: Tensor, first_row: int, exact: Exact, sign: float = 1.0
    ) -> None:
        """Rows ``first_row`` … with scores that lie within ``slack_R`` of ``cheap_RQ``; in ascending order of rows.

        ``exact(places, queries)`` times ``sign`` gives the scores of pairs, float64.
        """
        if self.k == 0:
            return
        bound_Q = torch.from_numpy(self.scores[:, -1].astype(np.float32)).to(cheap_RQ.device)
        highest_RQ = cheap_RQ + slack_R.unsqueeze(1)
        candidate_RQ = (highest_RQ >= bound_Q) & usable_R.unsqueeze(1)
        if int(candidate_RQ.sum()) > 4 * candidate_RQ.shape[1] * self.k:
            # Many: ask for no less than what k rows of this chunk reach for sure.
            lowest_RQ = (cheap_RQ - slack_R.unsqueeze(1)).masked_fill_(~usable_R.unsqueeze(1), -torch.inf)
            reached_Q = lowest_RQ.topk(min(self.k, len(lowest_RQ)), dim=0).values[-1]
            if self.k <= len(lowest_RQ):
                candidate_RQ &= highest_RQ >= reached_Q
        place, query = (x.cpu().numpy() for x in candidate_RQ.nonzero(as_tuple=True))
        if len(place):
            self._merge(place + first_row, query, exact(place, query) * sign)

    def _merge(self, row: NDArray[np.int64], query: NDArray[np.int64], score: NDArray[np.float64]) -> None:
        """Keep the k best of what is kept and these rows, by query, falling score, rising row."""
        touched, column = np.unique(query, return_inverse=True)
        all_query = np.concatenate([np.repeat(np.arange(len(touched)), self.k), column])
        all_score = np.concatenate([self.scores[touched].ravel(), score])
        all_row = np.concatenate([self.rows[touched].ravel(), row])
        order = np.lexsort((all_row, -all_score, all_query))
        starts = np.searchsorted(all_query[order], np.arange(len(touched)))
        kept = order[starts[:, None] + np.arange(self.k)]
        self.scores[touched], self.rows[touched] = all_score[kept], all_row[kept]


def product_error(dimension: int) -> float:
    """Bound of the error of a float32 product of two vectors of length 1, in any order of summation.

    n·u with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and a few u for the
    roundings of query, scale and bound.
    """
    return (dimension + 8) * 2.0**-24


def as_tensor(data: NDArray[Any], dtype: str) -> Tensor:
    """Stored numbers as a tensor that shares their memory; ``dtype`` is the manifest's."""
    if dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


class _RowFacts:
    """Whether rows can be used and how long they are, one span at a time."""

    def __init__(self, part: Part, groups: Sequence[int] | None) -> None:
        self._part = part
        self._columns: Any = slice(None) if groups is None else np.asarray(groups)
        self._span = -1
        self._usable = np.zeros(0, dtype=bool)
        self._length = np.zeros(0)

    def of(self, start: int, stop: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """(usable, length) of the rows of one chunk."""
        span = start // self._part.layout.span_rows
        if span != self._span:
            status, norm = (read_span(self._part, name, span) for name in ("status", "norm"))
            self._usable = status < FIRST_UNUSABLE
            self._length = np.sqrt(np.square(norm[:, self._columns], dtype=np.float64).sum(1))
            self._span = span
        first, _ = self._part.layout.span_of(span)
        return self._usable[start - first : stop - first], self._length[start - first : stop - first]


def search(
    part: Part,
    queries_QD: Tensor,
    *,
    metric: Metric,
    top_k: int,
    bottom_k: int = 0,
    groups: Sequence[int] | None = None,
    device: str = "cpu",
    task: Task | None = None,
) -> tuple[Ranking, Ranking]:
    """The ``top_k`` rows with the highest and the ``bottom_k`` with the lowest scores, for each query.

    ``queries_QD`` is float32. ``groups`` restricts the score to those blocks (default: all). Rows whose status
    is not usable are never returned; the cosine of a zero row is 0. Reads each committed chunk once; memory does not
    depend on the number of rows. Scores are float64 products of the stored numbers; the many that cannot matter are
    told apart by products in float32 and their error bound.

    Raises UsageError for a query that is zero or not finite, CorruptError for a damaged chunk.
    """
    target = torch.device(device)
    unit_QD, lengths = _of_length_one(part, queries_QD, groups, target)
    count = len(unit_QD)
    queries_DQ = unit_QD.float().t().contiguous()
    best, worst, facts = RunningTopK(count, top_k), RunningTopK(count, bottom_k), _RowFacts(part, groups)
    spare = torch.empty(part.layout.chunk_rows, part.layout.dimension, device=target)
    for chunk in stream(part, "vectors"):
        usable, length = facts.of(chunk.start, chunk.stop)
        factor = 1.0 / np.where(length > 0, length, 1.0) if metric == "cosine" else np.ones_like(length)
        stored_RD = as_tensor(chunk.data, part.layout.dtype).to(target)
        rows_RD = stored_RD if stored_RD.dtype == torch.float32 else spare[: len(stored_RD)].copy_(stored_RD)
        factor_R = torch.from_numpy(factor).to(target)
        cheap_RQ = (rows_RD @ queries_DQ).mul_(factor_R.float().unsqueeze(1))
        slack_R = torch.from_numpy((product_error(part.layout.dimension) * length * factor).astype(np.float32)).to(
            target
        )
        usable_R = torch.from_numpy(usable).to(target)

        def exact(
            places: NDArray[np.int64], queries: NDArray[np.int64], rows: Tensor = stored_RD, by: Tensor = factor_R
        ) -> NDArray[np.float64]:
            scores = np.empty(len(places))
            for first in range(0, len(places), PAIRS_AT_ONCE):
                part = slice(first, first + PAIRS_AT_ONCE)
                products = (rows[places[part]].double() * unit_QD[queries[part]]).sum(1) * by[places[part]]
                scores[part] = products.cpu().numpy()
            return scores

        best.add(cheap_RQ, slack_R, usable_R, chunk.start, exact)
        worst.add(-cheap_RQ, slack_R, usable_R, chunk.start, exact, sign=-1.0)
        if task:
            task.advance(chunk.stop - chunk.start)
    scale = lengths.numpy()[:, None] if metric == "dot" else 1.0
    return Ranking(best.rows, best.scores * scale), Ranking(worst.rows, -worst.scores * scale)


def similarities(
    part: Part,
    queries_QD: Tensor,
    *,
    metric: Metric,
    groups: Sequence[int] | None = None,
    device: str = "cpu",
    task: Task | None = None,
) -> NDArray[np.float64]:
    """(Q, N): the score of every row for each query, as :func:`search` has it; NaN where a row cannot be used.

    Memory: 8 bytes a row and query, and one chunk. Raises as :func:`search`.
    """
    target = torch.device(device)
    unit_QD, lengths = _of_length_one(part, queries_QD, groups, target)
    found = np.full((len(unit_QD), part.layout.rows), np.nan)
    facts = _RowFacts(part, groups)
    for chunk in stream(part, "vectors"):
        usable, length = facts.of(chunk.start, chunk.stop)
        factor = 1.0 / np.where(length > 0, length, 1.0) if metric == "cosine" else np.ones_like(length)
        rows_RD = as_tensor(chunk.data, part.layout.dtype).to(target).double()
        for query, unit_D in enumerate(unit_QD):
            # Row by row in the same order of summation as in search: equal rows have equal scores.
            scores = (rows_RD * unit_D).sum(1).cpu().numpy() * factor
            found[query, chunk.start : chunk.stop] = np.where(usable, scores, np.nan)
        if task:
            task.advance(chunk.stop - chunk.start)
    return found * (lengths.numpy()[:, None] if metric == "dot" else 1.0)


def _of_length_one(
    part: Part, queries_QD: Tensor, groups: Sequence[int] | None, target: torch.device
) -> tuple[Tensor, Tensor]:
    """(queries of length 1, float64, on ``target``; their lengths), restricted to ``groups``.

    Of length 1, no product is larger than its row is long: float32 cannot overflow. UsageError for a query that is zero
    or not finite.
    """
    if groups is not None:
        mask = torch.zeros(queries_QD.shape[1])
        for group in groups:
            _, start, stop = part.groups[group]
            mask[start:stop] = 1.0
        queries_QD = queries_QD * mask
    if not bool(torch.isfinite(queries_QD).all()):
        raise UsageError("a query vector is not finite: the val set's gradient has NaN or infinite numbers")
    lengths = queries_QD.double().norm(dim=1)
    if bool((lengths == 0).any()):
        raise UsageError("a query vector is zero: every row would score the same")
    return (queries_QD.double() / lengths.unsqueeze(1)).to(target), lengths
