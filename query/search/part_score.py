"""The score of a row as a sum over parts. A :class:`Term` is one part's share: its queries, weight and row scale.

score(row, query) = Σ over parts of weight · ⟨query, row⟩ ÷ length(row). The length is 1 for the dot product; for the
cosine it is the row's length in the metric. Usually there is one part; several parts are successive checkpoints
(TracIn, Pruthi et al. 2020; LESS, Xia et al. 2024).

Legend: Q queries, R rows of a span, D numbers of a vector, G blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.settings.shared import Metric as Metric
from ghoststore.store import Part
from query.search.second_moment import DampedInverse

LEAST_DIFFERENCE = 1e-5
"""Of two gradients, relative to the longer: float32 gradients of the same samples, in other batches, differ by less."""


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
        minus_D: Tensor | None = None,
    ) -> Term:
        """Restrict ``queries_QD`` to the blocks ``groups`` (default: all) and precondition them. For the cosine, also
        scale each to length 1 in the metric. ``minus_D`` is subtracted from each, see :func:`contrasted`.

        UsageError for a query that is not finite, or is zero in these blocks. ``names`` are what the error calls the
        queries.
        """
        mask = mask_of(part, groups)
        queries = queries_QD.double() * mask
        finite = torch.isfinite(queries).all(1)
        if not bool(finite.all()):
            raise UsageError(
                f"{_label_of(~finite, names)} is not finite: the val set's gradient has NaN or infinite numbers"
            )

        def lengths_of(vectors_QD: Tensor, applied_QD: Tensor) -> Tensor:
            return (vectors_QD * applied_QD).sum(1).clamp_min(0).sqrt()

        def applied_to(vectors_QD: Tensor) -> Tensor:
            return preconditioner.apply(vectors_QD) if preconditioner is not None else vectors_QD

        applied = applied_to(queries)
        lengths = lengths_of(queries, applied)
        if bool((lengths == 0).any()):
            where = "" if groups is None else " in these layers"
            raise UsageError(
                f"{_label_of(lengths == 0, names)} is zero{where}: every row would score the same. Leave it out of the "
                "val set" + ("" if groups is None else ", or choose other layers")
            )
        if minus_D is not None:
            queries = contrasted(
                queries, minus_D.double() * mask, lambda vectors: lengths_of(vectors, applied_to(vectors)), names
            )
            applied = applied_to(queries)
            lengths = lengths_of(queries, applied)
        if metric == "cosine":
            applied = applied / lengths.unsqueeze(1)
        return cls(part, applied, metric, weight, groups, preconditioner)

    @property
    def lengths(self) -> NDArray[np.float64]:
        """(Q,): Euclidean lengths of the queries, times the absolute weight. The same bits on any number of threads,
        which torch's norm of one query would not have.
        """
        return np.asarray(np.sqrt(np.square(self.queries_QD.numpy()).sum(1)) * abs(self.weight))

    @property
    def mask(self) -> Tensor:
        """(D,) float64: 1 in the chosen blocks, 0 elsewhere."""
        return mask_of(self.part, self.groups)

    def with_queries(self, queries_QD: Tensor) -> Term:
        """The same term with other queries, which must be preconditioned and scaled already."""
        return Term(self.part, queries_QD, self.metric, self.weight, self.groups, self.preconditioner)


def contrasted(
    queries_QD: Tensor,
    minus_D: Tensor,
    lengths_of: Callable[[Tensor], Tensor] = lambda vectors_QD: vectors_QD.norm(dim=1),
    names: Sequence[str] | None = None,
) -> Tensor:
    """(Q, D): each query less ``minus_D``. ``lengths_of`` gives the lengths of (Q, D) vectors in the metric of scores.

    UsageError where the difference is no more than rounding, and for a ``minus_D`` that is zero or not finite.
    """
    one_minus = minus_D.unsqueeze(0)
    length_of_minus = lengths_of(one_minus)
    if not bool(torch.isfinite(minus_D).all()) or not float(length_of_minus) > 0:
        raise UsageError(
            "the mean gradient of `minus` is zero, or not finite: nothing to be far from. Leave `minus` out"
        )
    difference_QD = queries_QD - one_minus
    longer_Q = torch.maximum(lengths_of(queries_QD), length_of_minus)
    same_Q = lengths_of(difference_QD) <= LEAST_DIFFERENCE * longer_Q
    if bool(same_Q.any()):
        raise UsageError(
            f"{_label_of(same_Q, names)} and the mean of `minus` have the same gradient, up to rounding: their "
            "difference tells no rows apart. Give `minus` another val set, or leave it out"
        )
    return difference_QD


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
