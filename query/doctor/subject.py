"""The subject of the checks: the model, its rows and projection, and the vectors of rows in any batches.

Legend: B samples, D numbers of a vector, K and J the ranks of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ghoststore.machine import available_memory
from indexer.encode.encoder import RowEncoder, pad
from indexer.encode.losses import Reduction, next_token_losses_plainly
from indexer.encode.plain import all_trainable, gradients_of, plain_blocks
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from query.doctor.models import Models

PLAIN_ROWS = 8
"""Most rows whose gradient is computed by plain autograd, and which are encoded in different batches."""
HEADROOM = 1.2
"""Free memory that a check wants, in multiples of what it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainGradient:
    """The gradient of one row by plain autograd, in a batch of one."""

    blocks: dict[str, Tensor]
    """(K, J) float32 by block name, on the model's device."""
    squares: dict[str, float]
    """Squared norm of the gradient of every parameter, by name."""


class Vectors(NamedTuple):
    """The vectors and losses of B rows, on the CPU."""

    vectors: Tensor
    """(B, D) float32."""
    losses: Tensor
    """(B,) float32."""

    @property
    def not_finite(self) -> int:
        """Number of rows whose vector or loss is NaN or infinite."""
        return int((~(torch.isfinite(self.vectors).all(1) & torch.isfinite(self.losses))).sum())


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model under examination."""

    models: Models
    model: Any
    """The reference, in float32."""
    rows: Sequence[Row]
    projection: Projection
    kernels: tuple[str, ...] | None
    """The attention kernels to examine; None for all that are available."""
    reduction: Reduction
    store: Path

    @property
    def plan(self) -> ProjectionPlan:
        """Layers and ranks of the projection."""
        return self.projection.plan

    @property
    def few(self) -> Sequence[Row]:
        """At most PLAIN_ROWS rows, from the shortest to the longest."""
        return [self.rows[place] for place in self.few_places]

    @property
    def few_places(self) -> list[int]:
        """The places of :attr:`few` in :attr:`rows`."""
        step = max(1.0, (len(self.rows) - 1) / (PLAIN_ROWS - 1))
        return [round(place * step) for place in range(min(PLAIN_ROWS, len(self.rows)))]

    def lacks_memory(self, bytes_a_number: int, what: str) -> str | None:
        """A phrase that says that ``what``, with ``bytes_a_number`` for each number of the model, does not fit into
        memory; None if it does.
        """
        needed, free = bytes_a_number * self.plan.total, available_memory(self.models.device)
        if free is None or needed * HEADROOM < free:
            return None
        return f"{what} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of {self.models.device} are free"

    def encode(
        self,
        model: Any,
        rows: Sequence[Row],
        batches: Sequence[Sequence[int]],
        projection: Projection | None = None,
    ) -> Vectors:
        """Vectors and losses of ``rows``, in their order. ``batches`` are the places of the rows that are computed
        together.
        """
        by_place: dict[int, tuple[Tensor, Tensor]] = {}
        projection = projection or self.projection
        with RowEncoder(model, projection, reduction=self.reduction, find_uses=False) as encoder:
            for batch in batches:
                vectors, losses = encoder([rows[place] for place in batch])
                by_place.update(zip(batch, zip(vectors.cpu(), losses.cpu(), strict=True), strict=True))
        vectors_B, losses_B = zip(*(by_place[place] for place in range(len(rows))), strict=True)
        return Vectors(torch.stack(vectors_B), torch.stack(losses_B))

    def alone(self, model: Any, rows: Sequence[Row], projection: Projection | None = None) -> Vectors:
        """Vectors and losses of ``rows``, each computed in a batch of its own."""
        return self.encode(model, rows, [[place] for place in range(len(rows))], projection)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """(B, T, V): the logits of the reference for ``rows`` in one padded batch, without a graph."""
        with torch.no_grad():
            logits: Tensor = self._forward(rows)[0]
        return logits

    @cached_property
    def exact(self) -> Vectors:
        """The vectors of all rows by the reference, each in a batch of its own."""
        return self.alone(self.model, self.rows)

    @cached_property
    def plain(self) -> list[PlainGradient]:
        """The gradients of :attr:`few` by plain autograd. Needs as much memory as the weights, beside these."""
        plain = []
        with all_trainable(self.model):
            for row in self.few:
                logits, labels = self._forward([row])
                (loss,), _ = next_token_losses_plainly(logits, labels, reduction=self.reduction)
                gradients = gradients_of(self.model, loss)
                squares = {name: float(vector_norm(g, dtype=torch.float64)) ** 2 for name, g in gradients.items()}
                plain.append(PlainGradient(blocks=plain_blocks(self.projection, gradients), squares=squares))
        return plain

    def _forward(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        ids, labels, mask = (x.to(device) for x in pad(rows))
        return self.model(input_ids=ids, attention_mask=mask).logits, labels
