"""What a ranking sums: for each part, its queries, its weight, and how rows are scaled.

score(row, query) = Σ over parts of weight · ⟨query, row⟩ ÷ length(row), where the length is 1 for the dot product, and
that of the row in the metric for the cosine. One part is the plain case; several are successive checkpoints (TracIn,
Pruthi et al. 2020; LESS, Xia et al. 2024).

Legend: Q queries, R rows of a span, D numbers of a vector, G blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.settings.shared import Metric as Metric
from ghoststore.store import Part
from ghoststore.store.part.status import FIRST_UNUSABLE
from ghoststore.store.spans.reader import read_span


class Preconditioner(Protocol):
    """A symmetric positive operator A, block by block: scores are qᵀ A g instead of qᵀ g."""

    def apply(self, vectors_QD: Tensor) -> Tensor:
        """A times each row, (Q, D) float64."""

    def squares(self, span: int) -> NDArray[np.float64]:
        """(R, G): gᵀ A g of each row of a span, block by block."""

    def halved(self, rows_RD: Tensor) -> Tensor:
        """(R, D) float64: each row times a B with BᵀB = A, block by block; products of these are gᵀ A g'."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part's share of a score. Made by :meth:`of`."""

    part: Part
    queries_QD: Tensor
    """(Q, D) float64 on the CPU: what rows are multiplied with; zero outside the chosen blocks."""
    metric: Metric
    weight: float
    groups: Sequence[int] | None
    preconditioner: Preconditioner | None

    @classmethod
    def of(
        cls,
        part: Part,
        queries_QD: Tensor,
        *,
        metric: Metric,
        weight: float = 1.0,
        groups: Sequence[int] | None = None,
        preconditioner: Preconditioner | None = None,
        names: Sequence[str] | None = None,
    ) -> Term:
        """Restrict ``queries_QD`` to the blocks ``groups`` (default: all), precondition them, and, for the cosine,
        scale each to length 1 in the metric.

        UsageError for a query that is not finite or is zero there, by its place in ``names``.
        """
        queries = queries_QD.double() * mask_of(part, groups)
        whole = torch.isfinite(queries).all(1)
        if not bool(whole.all()):
            raise UsageError(
                f"{_which(~whole, names)} is not finite: the val set's gradient has NaN or infinite numbers"
            )
        applied = preconditioner.apply(queries) if preconditioner is not None else queries
        lengths = (queries * applied).sum(1).clamp_min(0).sqrt()
        if bool((lengths == 0).any()):
            where = "" if groups is None else " in these layers"
            raise UsageError(
                f"{_which(lengths == 0, names)} is zero{where}: every row would score the same. Leave it out of the "
                "val set" + ("" if groups is None else ", or choose other layers")
            )
        if metric == "cosine":
            applied = applied / lengths.unsqueeze(1)
        return cls(part, applied, metric, weight, groups, preconditioner)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """(Q,): Euclidean lengths of the queries times the weight."""
        return np.asarray(self.queries_QD.norm(dim=1).numpy() * abs(self.weight))

    @property
    def mask(self) -> Tensor:
        """(D,) float64: 1 in the chosen blocks, 0 elsewhere."""
        return mask_of(self.part, self.groups)

    def with_queries(self, queries_QD: Tensor) -> Term:
        """The same term for other, finished queries."""
        return Term(self.part, queries_QD, self.metric, self.weight, self.groups, self.preconditioner)


def _which(wrong_Q: Tensor, names: Sequence[str] | None) -> str:
    place = int(wrong_Q.nonzero()[0])
    return "a query vector" if names is None else f"the query {names[place]!r}"


def mask_of(part: Part, groups: Sequence[int] | None) -> Tensor:
    """(D,) float64: 1 in the blocks ``groups`` (None: all), 0 elsewhere."""
    if groups is None:
        return torch.ones(part.layout.dimension, dtype=torch.float64)
    mask = torch.zeros(part.layout.dimension, dtype=torch.float64)
    for group in groups:
        _, start, stop = part.groups[group]
        mask[start:stop] = 1.0
    return mask


class RowFacts:
    """Whether rows can be used, how long they are and how they are scaled, one span at a time."""

    def __init__(
        self,
        part: Part,
        groups: Sequence[int] | None = None,
        metric: Metric = "dot",
        weight: float = 1.0,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self._part, self._metric, self._weight, self._preconditioner = part, metric, weight, preconditioner
        self._columns: slice | NDArray[np.int64] = slice(None) if groups is None else np.asarray(groups, dtype=np.int64)
        self._span = -1
        self._usable = np.zeros(0, dtype=bool)
        self._length = np.zeros(0)
        self._factor = np.zeros(0)

    @classmethod
    def for_term(cls, term: Term) -> RowFacts:
        """Those that scores of ``term`` need."""
        return cls(term.part, term.groups, term.metric, term.weight, term.preconditioner)

    def of(self, start: int, stop: int) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
        """(usable, Euclidean length, factor) of rows of one span: a row's score is its product times the factor.

        The cosine of a row of length zero is 0.
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
