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

from indexer.projection import Projection
from indexer.selection import Block

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


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """float64 gradients by name of a scalar loss; tied parameters appear once, under their first name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter).double() if gradient is None else gradient.to_dense().double()
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def gradients_alone(model: nn.Module, count: int, loss_of: LossOf) -> list[dict[str, Tensor]]:
    """The gradients of ``count`` samples, each run alone. ``model`` is copied; its flags and gradients stay."""
    model = deepcopy(model).requires_grad_(True)
    return [gradients_of(model, loss_of(model, sample)) for sample in range(count)]


def gradient_matrix(block: Block, gradients: dict[str, Tensor]) -> Tensor:
    """(O, I) of one block: [weight | biases of its uses], a norm's γ above its β as one column.

    A bias of a use that sees the block flipped (a head tied to an embedding) is one more row.
    """
    weight = gradients[block.parameters[0]]
    if not block.is_matrix:
        return torch.cat([gradients[name] for name in block.parameters]).unsqueeze(1)
    if block.type in ("conv1d", "embedding"):
        weight = weight.t()
    seen = set()
    for use in block.uses:
        if use.bias is None or use.bias in seen:
            continue
        seen.add(use.bias)
        bias = gradients[use.bias]
        if (use.type == "embedding") == (block.type == "embedding"):
            column = torch.zeros(weight.shape[0], dtype=torch.float64)
            column[: len(bias)] = bias
            weight = torch.cat([weight, column.unsqueeze(1)], dim=1)
        else:
            row = torch.zeros(weight.shape[1], dtype=torch.float64)
            row[: len(bias)] = bias
            weight = torch.cat([weight, row.unsqueeze(0)], dim=0)
    return weight


def naive(model: nn.Module, projection: Projection, count: int, loss_of: LossOf) -> Naive:
    """The vectors of ``count`` samples. ``model`` is left alone."""
    plan = projection.plan
    blocks: dict[str, list[Tensor]] = {layer.block.name: [] for layer in plan.layers}
    norms: dict[str, list[Tensor]] = {layer.block.name: [] for layer in plan.layers}
    gradients = gradients_alone(model, count, loss_of)
    for of_sample in gradients:
        for layer in plan.layers:
            p_in, p_out = projection.sides[layer.block.name]
            matrix = gradient_matrix(layer.block, of_sample)
            blocks[layer.block.name].append(p_out.double() @ matrix @ p_in.double().t())
            norms[layer.block.name].append(matrix.norm())
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
