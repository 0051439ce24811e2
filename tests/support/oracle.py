"""The slow, obvious vector that the engine must equal: a loop over samples of plain autograd.

Legend: B samples, D numbers of a vector, K and J the ranks of a block, O and I the axes of a gradient matrix.

Each sample is run alone, unpadded, with every parameter trainable; the gradients are laid out as
``indexer.layers.base`` documents, multiplied by the projection's matrices in float64, and sketched by the
dense matrix of the sketch. Nothing here uses a hook, a side branch or a layer type's formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from indexer.encode.plain import gradient_matrix, gradients_of, plain_blocks
from indexer.projection.matrices import Projection

LossOf = Callable[[nn.Module, int], Tensor]
"""(model, i) to the loss of sample i alone, a scalar."""


@dataclass(frozen=True)
class Naive:
    """The oracle's answer, float64."""

    vectors: Tensor
    """(B, D)."""
    blocks: dict[str, Tensor]
    """(B, K, J) by block name, before the sketch."""
    norms: dict[str, Tensor]
    """(B,) by block name: the norm of the gradient before it is projected."""
    gradients: list[dict[str, Tensor]]
    """Of each sample: the gradient of every parameter by name, zeros where the loss does not depend on it."""

    def whole_norm(self) -> Tensor:
        """(B,): the norm of all covered gradients."""
        return torch.stack(list(self.norms.values())).square().sum(0).sqrt()


def gradients_alone(model: nn.Module, count: int, loss_of: LossOf) -> list[dict[str, Tensor]]:
    """The gradients of ``count`` samples, each run alone. ``model`` is copied; its flags and gradients stay."""
    model = deepcopy(model).requires_grad_(True)
    found = [gradients_of(model, loss_of(model, sample)) for sample in range(count)]
    return [{name: gradient.double() for name, gradient in of_sample.items()} for of_sample in found]


def naive(model: nn.Module, projection: Projection, count: int, loss_of: LossOf) -> Naive:
    """The vectors of ``count`` samples. ``model`` is left alone."""
    plan = projection.plan
    blocks: dict[str, list[Tensor]] = {layer.block.name: [] for layer in plan.layers}
    norms: dict[str, list[Tensor]] = {layer.block.name: [] for layer in plan.layers}
    gradients = gradients_alone(model, count, loss_of)
    for of_sample in gradients:
        projected = plain_blocks(projection, of_sample)
        for layer in plan.layers:
            blocks[layer.block.name].append(projected[layer.block.name])
            norms[layer.block.name].append(gradient_matrix(layer.block, of_sample).norm())
    stacked = {name: torch.stack(of_block) for name, of_block in blocks.items()}
    vectors = torch.cat([block.flatten(1) for block in stacked.values()], dim=1)
    if projection.sketch:
        vectors = vectors @ projection.sketch.matrix().double().t()
    return Naive(vectors, stacked, {name: torch.stack(values) for name, values in norms.items()}, gradients)


def exact_dots(found: Naive, names: list[str]) -> Tensor:
    """(B, B): inner products of the samples' gradients of the named parameters."""
    flat = torch.stack([torch.cat([g[name].flatten() for name in names]) for g in found.gradients])
    return flat @ flat.t()


def relative_error(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """The largest ‖found - expected‖ over samples, divided by ``scale`` (default: ‖expected‖)."""
    found, expected = found.detach().double().flatten(1), expected.detach().double().flatten(1)
    assert found.shape == expected.shape, f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    scale = expected.norm(dim=1) if scale is None else scale
    difference = (found - expected).norm(dim=1)
    assert bool(torch.isfinite(difference).all()), "not finite"
    return float(torch.where(difference == 0, 0.0, difference / scale).max())


def block_errors(vectors: Tensor, projection: Projection, expected: Naive) -> dict[str, float]:
    """The relative error of each block of plain (not sketched) vectors."""
    assert projection.sketch is None
    return {
        layer.block.name: relative_error(
            vectors[:, layer.start : layer.stop], expected.blocks[layer.block.name].flatten(1)
        )
        for layer in projection.plan.layers
    }
