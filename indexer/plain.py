"""The slow, obvious vector that the engine must equal: plain autograd of one sample, then the projection's matrices.

No hook, no side branch, no layer type's formula. Needs a gradient of every parameter: as much memory as the weights.

Legend: K and J the ranks of a block, O and I the axes of a gradient matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from indexer.projection import Projection
from indexer.selection import Block


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Every parameter of ``model`` requires a gradient until the block ends; then each has its own flag back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a scalar loss by name, in the parameters' dtype, zeros where it does not depend on one.

    Tied parameters appear once, under their first name.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


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
        flipped = (use.type == "embedding") != (block.type == "embedding")
        line = bias.new_zeros(weight.shape[1] if flipped else weight.shape[0])
        line[: len(bias)] = bias
        weight = torch.cat([weight, line.unsqueeze(0) if flipped else line.unsqueeze(1)], dim=0 if flipped else 1)
    return weight


def plain_blocks(projection: Projection, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """P_out G P_inᵀ of every block by name, (K, J) in the gradients' dtype."""
    found = {}
    for layer in projection.plan.layers:
        matrix = gradient_matrix(layer.block, gradients)
        p_in, p_out = (torch.as_tensor(side).to(matrix) for side in projection.sides[layer.block.name])
        found[layer.block.name] = p_out @ matrix @ p_in.t()
    return found
