"""The slow, obvious vector that the engines must equal: a loop over samples of plain autograd.

Legend: B samples, D numbers of a vector, K and J the ranks of a block, O and I the axes of a gradient matrix.

Each sample is run alone, unpadded, with every parameter trainable. How gradients are laid out in a vector is written
down here a second time, from the definitions (the layers' weights and biases, see :func:`gradient_matrix`); of the
projection only its matrices are used, in float64. No hook, no side branch, no selection, no plan, no layer type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from indexer.projection.matrices import Projection
from indexer.projection.sketch import BlockSketches, Sketch

LossOf = Callable[[nn.Module, int], Tensor]
"""(model, i) to the loss of sample i alone, a scalar."""


@dataclass(frozen=True)
class Naive:
    """The oracle's answer, float64."""

    vectors: Tensor
    """(B, D)."""
    blocks: dict[str, Tensor]
    """(B, K, J) by block name, in the order of the vector, before the sketch."""
    norms: dict[str, Tensor]
    """(B,) by block name: the norm of the gradient before it is projected."""
    gradients: list[dict[str, Tensor]]
    """Of each sample: the gradient of every parameter by name, zeros where the loss does not depend on it."""

    def whole_norm(self) -> Tensor:
        """(B,): the norm of all covered gradients."""
        return torch.stack(list(self.norms.values())).square().sum(0).sqrt()


def gradients_alone(model: nn.Module, count: int, loss_of: LossOf) -> list[dict[str, Tensor]]:
    """The gradients of ``count`` samples, each run alone. ``model`` is copied; its flags and gradients stay."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None)) is not None]
    model = deepcopy(model, {id(config): config for config in configs}).requires_grad_(True)
    return [gradients_of(model, loss_of(model, sample)) for sample in range(count)]


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """float64 by the name of each parameter; a tied one has its first name."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter).double() if gradient is None else gradient.to_dense().double()
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True)
    }


def gradient_matrix(model: nn.Module, block: str, gradients: Mapping[str, Tensor]) -> Tensor:
    """(O, I): the gradient of the module ``block`` of ``model`` and of every other that has the same weight.

    - A linear layer, y = W x + b: O outputs, I inputs, and one input more that is always 1 for each bias.
    - An embedding is a linear layer of one-hot inputs: O its width, I its entries.
    - Where one use of the weight is an embedding and another a linear layer, the outputs of one are the inputs of the
      other: a bias of that other is one output more.
    - A norm, y = γ ⊙ x̂ + β: γ's numbers above β's, one column.
    - A parameter by itself (``block`` is its path): its last axis the inputs, all others outputs; a vector one column.
    """
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    alone = dict(model.named_parameters(remove_duplicate=False)).get(block)
    if alone is not None:
        return gradients[names[id(alone)]].reshape(_matrix_of(alone))
    module = model.get_submodule(block)
    weight = module.get_parameter("weight")
    matrix = gradients[names[id(weight)]]
    if weight.dim() == 1:
        own = [gradients[names[id(p)]] for p in (weight, module._parameters.get("bias")) if p is not None]
        return torch.cat(own).unsqueeze(1)
    if isinstance(module, (Conv1D, nn.Embedding)):  # stored as (inputs, outputs)
        matrix = matrix.t()
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for user in model.modules():
        bias = user._parameters.get("bias")
        if user._parameters.get("weight") is weight and bias is not None:
            same_way = isinstance(user, nn.Embedding) == isinstance(module, nn.Embedding)
            (columns if same_way else rows)[names[id(bias)]] = gradients[names[id(bias)]]
    n_out, n_in = matrix.shape
    laid = matrix.new_zeros(n_out + len(rows), n_in + len(columns))
    laid[:n_out, :n_in] = matrix
    for place, bias in enumerate(columns.values()):
        laid[:n_out, n_in + place] = bias
    for place, bias in enumerate(rows.values()):
        laid[n_out + place, :n_in] = bias
    return laid


def _matrix_of(parameter: Tensor) -> tuple[int, int]:
    last = parameter.shape[-1] if parameter.dim() else 1
    return (-1, 1) if parameter.numel() in (last, parameter.numel() // last) else (-1, last)


def dense(sketch: Sketch | BlockSketches) -> Tensor:
    """The (K, n) matrix of a sketch, number by number."""
    if isinstance(sketch, Sketch):
        rows = torch.arange(sketch.k).repeat_interleave(sketch.width)
        matrix = torch.zeros(sketch.k, sketch.read)
        return matrix.index_put_((rows, sketch.source.cpu()), sketch.weight.cpu(), accumulate=True)
    pieces = []
    for kept, of_others in zip(sketch.kept, sketch.sketches, strict=True):
        pieces.append(nn.functional.one_hot(kept.cpu(), sketch.n).float())
        pieces += [] if of_others is None else [dense(of_others)]
    return torch.cat(pieces)


def naive(model: nn.Module, projection: Projection, count: int, loss_of: LossOf) -> Naive:
    """The vectors of ``count`` samples, blocks in the order of the model's modules. ``model`` is left alone."""
    gradients = gradients_alone(model, count, loss_of)
    blocks, norms = {}, {}
    paths = [
        *(name for name, _ in model.named_modules()),
        *(n for n, _ in model.named_parameters(remove_duplicate=False)),
    ]
    for name in [name for name in paths if name in projection.sides]:
        p_in, p_out = (torch.as_tensor(side).double() for side in projection.sides[name])
        matrices_BOI = torch.stack([gradient_matrix(model, name, of_sample) for of_sample in gradients])
        blocks[name] = p_out @ matrices_BOI @ p_in.t()
        norms[name] = matrices_BOI.flatten(1).norm(dim=1)
    vectors = torch.cat([block.flatten(1) for block in blocks.values()], dim=1)
    if projection.sketch:
        vectors = vectors @ dense(projection.sketch).double().t()
    return Naive(vectors, blocks, norms, gradients)


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


def block_errors(vectors: Tensor, expected: Naive) -> dict[str, float]:
    """The relative error of each block of plain (not sketched) vectors."""
    sizes = [block[0].numel() for block in expected.blocks.values()]
    pieces = vectors.split(sizes, dim=1)
    return {
        name: relative_error(piece, block) for piece, (name, block) in zip(pieces, expected.blocks.items(), strict=True)
    }
