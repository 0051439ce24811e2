"""A score of a row as a sum over its positions: ⟨q, Σ_t block_t⟩, block_t = (P_out δ_t)(P_in x_t)ᵀ of every layer.

A vector is linear in the blocks, so ⟨q, S x⟩ = ⟨Sᵀ q, x⟩: the query is carried back through the sketch once, and each
layer multiplies its share of it with the blocks of single positions. Position t is that of the layers' input: what the
token at t adds, through all the losses behind it. It is not the loss at t.

Legend: Q queries, B rows of a batch, T positions, D numbers of a vector, K and J numbers of a block's sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError
from indexer.encode.batching import plan_batches
from indexer.encode.encoder import RowEncoder, pad
from indexer.encode.losses import next_token_losses
from indexer.encode.modes import forward_options, without_autocast
from indexer.encode.tokens import Row
from indexer.layers import LayerType, Sides
from indexer.projection.blocks import Use
from indexer.projection.matrices import Projection
from indexer.projection.plan import BlockPlan

NUMBERS_AT_ONCE = 1 << 24
"""Numbers of single positions' blocks in memory."""


class _Reached(NamedTuple):
    """What the backward pass of one use of a layer needs."""

    module: nn.Module
    layer_type: LayerType
    sides: Sides
    flipped: bool
    query_QKJ: Tensor
    positions: int


class _PositionBranch(torch.autograd.Function):
    """``apply(y, leaf_QBT, saved, reached) -> y``: the gradient of the leaf is what each position adds to each query's
    product, summed over the layers that share the leaf.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, leaf_QBT: Tensor, saved: Tensor, reached: _Reached) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.reached = reached
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        (saved,) = ctx.saved_tensors
        reached: _Reached = ctx.reached
        with without_autocast(dy.device.type):
            scores_QR = _products(reached, saved, dy.reshape(-1, *dy.shape[2:]))
        return dy, scores_QR.view(len(scores_QR), dy.shape[0], reached.positions), None, None


def _products(reached: _Reached, saved: Tensor, dy_R: Tensor) -> Tensor:
    """(Q, R) float64: the products of the queries with the block of each of R positions, some at a time."""
    query_NQ = reached.query_QKJ.flatten(1).double().t()
    at_once = max(1, NUMBERS_AT_ONCE // len(query_NQ))
    scores_RQ = torch.empty(len(dy_R), query_NQ.shape[1], dtype=torch.float64, device=dy_R.device)
    for start in range(0, len(dy_R), at_once):
        part = slice(start, start + at_once)
        block_RKJ = reached.layer_type.block(reached.module, saved[part], dy_R[part], reached.sides)
        if reached.flipped:
            block_RKJ = block_RKJ.transpose(1, 2)
        scores_RQ[part] = block_RKJ.flatten(1).double() @ query_NQ
    return scores_RQ.t()


def blocks_of(projection: Projection, queries_QD: Tensor) -> dict[str, Tensor]:
    """(Q, k_out, k_in) float32 by block name: the queries carried back through the sketch, Sᵀ q."""
    leaves = [
        torch.zeros(len(queries_QD), layer.k_out, layer.k_in, device=queries_QD.device, requires_grad=True)
        for layer in projection.plan.layers
    ]
    gradients = torch.autograd.grad((projection.assemble(leaves) * queries_QD.float()).sum(), leaves)
    return {layer.block.name: block for layer, block in zip(projection.plan.layers, gradients, strict=True)}


def _asked(model: nn.Module, projection: Projection, query_of: Mapping[str, Tensor]) -> list[BlockPlan]:
    """The layers that the queries are about. CaptureError, with all of them, if modules without a formula are among
    these.
    """
    layers = [layer for layer in projection.plan.layers if bool(query_of[layer.block.name].any())]
    uses = [use for layer in layers for use in layer.block.uses if not use.kind.has_formula]
    modules = {use.module: type(model.get_submodule(use.module)).__name__ for use in uses}
    if modules:
        raise CaptureError(
            f"no formula takes the gradients of {', '.join(dict.fromkeys(modules.values()))} apart: what each token "
            f"adds to them cannot be told. Leave them out of the question: `exclude_layers` '{','.join(modules)}'"
        )
    return layers


def position_scores(encoder: RowEncoder, rows: Sequence[Row], queries_QD: Tensor, batch_tokens: int) -> list[Tensor]:
    """For each of ``rows``, which must be usable, (Q, T) float64 on the CPU: what each of its T tokens adds to the
    product of its vector with each query. Summed over T it is that product, up to the rounding of float32.

    One forward and one backward pass of the rows. CaptureError for a layer whose second axis is not that of the
    positions.
    """
    model, projection = encoder.engine.model, encoder.engine.projection.to(encoder.device)
    query_of = blocks_of(projection, queries_QD.to(encoder.device))
    assert not rows or rows[0].source is None, "an encoder's rows have no one axis of positions"
    layers = _asked(model, projection, query_of)
    if not layers:  # queries of zeros
        return [torch.zeros(len(queries_QD), len(row.tokens), dtype=torch.float64) for row in rows]
    results: list[Tensor] = [torch.zeros(0)] * len(rows)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    leaf: list[Tensor] = []
    handles: list[RemovableHandle] = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for layer in layers:
            for use in layer.block.uses:
                module = model.get_submodule(use.module)
                hook = _hook(layer, use, module, projection, query_of, leaf)
                handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        for batch in plan_batches([len(row.tokens) for row in rows], batch_tokens, padding=encoder.padding):
            ids, labels, mask = (x.to(encoder.device) for x in pad([rows[place] for place in batch]))
            shape = (len(queries_QD), *ids.shape)
            leaf[:] = [torch.zeros(shape, dtype=torch.float64, device=encoder.device, requires_grad=True)]
            logits = encoder.model(input_ids=ids, attention_mask=mask, **forward_options(model)).logits
            losses, _ = next_token_losses(logits, labels, reduction=encoder.reduction)
            (scores_QBT,) = torch.autograd.grad(losses.sum(), leaf)
            for place, scores_QT in zip(batch, scores_QBT.unbind(1), strict=True):
                results[place] = scores_QT[:, : len(rows[place].tokens)].cpu()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return results


def _hook(
    layer: BlockPlan,
    use: Use,
    module: nn.Module,
    projection: Projection,
    query_of: Mapping[str, Tensor],
    leaf: list[Tensor],
) -> Callable[..., Any]:
    """The forward hook of one use of a layer, for the batch whose leaf stands in ``leaf``."""
    layer_type, sides = use.kind, projection.sides_of(layer.block, use, module)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
        (leaf_QBT,) = leaf
        _, batch, positions = leaf_QBT.shape
        seen = layer_type.seen(module, args, kwargs, y, batch, use.module)
        x, (y,) = seen.x, seen.outputs
        assert isinstance(x, Tensor)
        inner = y.shape[1:-1]
        if not inner or inner[0] != positions or positions in inner[1:]:
            raise CaptureError(
                f"layer {use.module!r} gave an output of shape {tuple(y.shape)} for {batch} rows of {positions} "
                "tokens: its second axis is not that of the tokens, so what each of them adds cannot be told"
            )
        with torch.no_grad(), without_autocast(y.device.type):
            saved = layer_type.keep(module, x.reshape(-1, *x.shape[2:]), sides, y.dtype)
        reached = _Reached(module, layer_type, sides, use.flipped, query_of[layer.block.name], positions)
        output: Tensor = _PositionBranch.apply(y, leaf_QBT, saved, reached)  # type: ignore[no-untyped-call]
        return seen.back((output,))

    return hook
