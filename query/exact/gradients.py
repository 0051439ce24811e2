"""Exact, unprojected gradients: each row goes through the model alone, and plain autograd differentiates its own loss.

This is the slow reference for all projected gradients. It uses no hooks, no formulas of layers, and no batches.

Legend: P numbers of a gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from indexer.encode.encoder import inputs_of
from indexer.encode.losses import Reduction, next_token_losses
from indexer.encode.modes import forward_options, refuse_randomness
from indexer.encode.tokens import Row


@dataclass(frozen=True, slots=True)
class ParameterSlice:
    """The place of one parameter's gradient in the flat vector, in the row-major order of the parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def to_json(self) -> dict[str, Any]:
        """The entry in a manifest."""
        return {**asdict(self), "shape": list(self.shape)}


class Gradient(NamedTuple):
    """The gradient of one row's loss, on the device and in the dtype of the model."""

    parts: dict[str, Tensor]
    """For each parameter its gradient, in its shape; zeros if the loss does not depend on it."""
    loss: float

    @property
    def finite(self) -> bool:
        """Whether neither the loss nor any number of the gradient is NaN or infinite."""
        numbers = all(bool(torch.isfinite(part).all()) for part in self.parts.values())
        return numbers and bool(torch.isfinite(torch.tensor(self.loss)))


class ExactGradients:
    """``ExactGradients(model)(row)`` is ∂ℓ/∂θ of one row, for the parameters ``names`` (default: all). Tied parameters
    count once.

    It changes the model: only these parameters stay trainable. UsageError for a name that is not a parameter, and for a
    model whose forward pass is random.
    """

    def __init__(
        self, model: nn.Module, names: Collection[str] | None = None, *, reduction: Reduction = "mean"
    ) -> None:
        refuse_randomness(model)
        self.model = model
        self._reduction: Reduction = reduction
        self._options = forward_options(model)
        by_name = dict(model.named_parameters())
        unknown = sorted(set(names or ()) - set(by_name))
        if unknown:
            raise UsageError(f"{type(model).__name__} has no parameter {unknown[0]!r}")
        self.parameters = {name: p for name, p in by_name.items() if names is None or name in names}
        """The parameters by name, in the order of the model."""
        model.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @property
    def slices(self) -> list[ParameterSlice]:
        """The slices of the flat vector, in the order of the model."""
        slices, start = [], 0
        for name, parameter in self.parameters.items():
            slices.append(ParameterSlice(name, tuple(parameter.shape), start, start + parameter.numel()))
            start = slices[-1].stop
        return slices

    @property
    def numbers(self) -> int:
        """P, the numbers of a gradient."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def __call__(self, row: Row) -> Gradient:
        """The gradient of ``row``, which must be usable. The row is neither padded nor batched."""
        assert row.status.usable
        device = next(iter(self.parameters.values())).device
        inputs, labels = inputs_of([row], device)
        logits = self.model(**inputs, **self._options).logits
        losses, _ = next_token_losses(logits, labels, reduction=self._reduction)
        del logits
        gradients = torch.autograd.grad(losses.sum(), list(self.parameters.values()), allow_unused=True)
        parts = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True)
        }
        return Gradient(parts, float(losses.detach()))
