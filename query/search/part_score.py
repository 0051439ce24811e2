"""The score of a row as a sum over parts. A :class:`Term` is one part's share: its queries, weight and row scale.

score(row, query) = Σ over parts of weight · ⟨query, row⟩ ÷ length(row). The length is 1 for the dot product; for the
cosine it is the row's length in the metric. Usually there is one part; several parts are successive checkpoints
(TracIn, Pruthi et al. 2020; LESS, Xia et al. 2024).

Legend: Q queries, R rows of a span, D numbers of a vector, G blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.settings.shared import Metric as Metric
from ghoststore.store import Part
from query.search.second_moment import DampedInverse


@dataclass(frozen=True, slots=True)
class Term:
    """One part's share of a score. :meth:`of` makes it."""

    part: Part
    queries_QD: Tensor
    """(Q, D) float64 on the CPU: the vectors that rows are multiplied with; zero outside the chosen blocks."""
    metric: Metric
    weight: float
    groups: Sequence[int] | None
    preconditioner: DampedInverse | None

    @classmethod
    def of(
        cls,
        part: Part,
        queries_QD: Tensor,
        *,
        metric: Metric,
        weight: float = 1.0,
        groups: Sequence[int] | None = None,
        preconditioner: DampedInverse | None = None,
        names: Sequence[str] | None = None,
    ) -> Term:
        """Restrict ``queries_QD`` to the blocks ``groups`` (default: all) and precondition them. For the cosine, also
        scale each to length 1 in the metric.

        UsageError for a query that is not finite, or is zero in these blocks. ``names`` are what the error calls the
        queries.
        """
        queries = queries_QD.double() * mask_of(part, groups)
        finite = torch.isfinite(queries).all(1)
        if not bool(finite.all()):
            raise UsageError(
                f"{_label_of(~finite, names)} is not finite: the val set's gradient has NaN or infinite numbers"
            )
        applied = preconditioner.apply(queries) if preconditioner is not None else queries
        lengths = (queries * applied).sum(1).clamp_min(0).sqrt()
        if bool((lengths == 0).any()):
            where = "" if groups is None else " in these layers"
            raise UsageError(
                f"{_label_of(lengths == 0, names)} is zero{where}: every row would score the same. Leave it out of the "
                "val set" + ("" if groups is None else ", or choose other layers")
            )
        if metric == "cosine":
            applied = applied / lengths.unsqueeze(1)
        return cls(part, applied, metric, weight, groups, preconditioner)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """(Q,): Euclidean lengths of the queries, times the absolute weight."""
        return np.asarray(self.queries_QD.norm(dim=1).numpy() * abs(self.weight))

    @property
    def mask(self) -> Tensor:
        """(D,) float64: 1 in the chosen blocks, 0 elsewhere."""
        return mask_of(self.part, self.groups)

    def with_queries(self, queries_QD: Tensor) -> Term:
        """The same term with other queries, which must be preconditioned and scaled already."""
        return Term(self.part, queries_QD, self.metric, self.weight, self.groups, self.preconditioner)


def _label_of(wrong_Q: Tensor, names: Sequence[str] | None) -> str:
    """How an error calls the first query of which ``wrong_Q`` is true."""
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
