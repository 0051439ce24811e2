"""Each sample's own loss, from the logits of a batch.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghoststore.settings.shared import Reduction as Reduction

IGNORED = -100
"""The label of a token that is not a target, as usual in the field."""

CHUNK_NUMBERS = 1 << 20
"""Number of logits to process at a time, so that they stay in the cache of a core."""
GPU_CHUNK_NUMBERS = 1 << 27
"""Logits that a GPU works on at a time: enough to fill it, in half a GiB of float32 beside them."""

_MATRIX_PRODUCTS = ("MmBackward", "AddmmBackward", "LinearBackward", "BmmBackward")
_RESHAPES = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward")
_ENGINES = ("TapBackward", "SideBranchBackward")
"""Our own functions, which pass the output on and keep nothing of it."""


def _may_overwrite(logits: Tensor) -> bool:
    """Whether ``logits`` come directly from a matrix product, so that no backward needs their values."""
    node = logits.grad_fn
    while node is not None and type(node).__name__.startswith((*_RESHAPES, *_ENGINES)):
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None and type(node).__name__.startswith(_MATRIX_PRODUCTS)


class _SampleLosses(torch.autograd.Function):
    """Weighted next-token losses. The forward pass computes the gradient and writes it over the logits, if it may.

    The obvious form keeps three arrays of B·T·V numbers (logits, log-softmax, gradient); this one keeps one array.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTV: Tensor, target_BT: Tensor, weight_BT: Tensor, overwrite: bool) -> Tensor:
        batch, length, vocabulary = logits_BTV.shape
        rows = batch * length
        logits, target_N = logits_BTV.view(rows, vocabulary), target_BT.reshape(rows)
        losses_N = torch.empty(rows, dtype=torch.float32, device=logits.device)
        work = _in_few_passes if logits.is_cuda else _in_cache
        gradient = work(
            logits,
            target_N,
            weight_BT.reshape(rows, 1),
            losses_N,
            overwrite=overwrite,
            wanted=logits_BTV.requires_grad,
        )
        ctx.factor_B = None
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(logits_BTV))
        return losses_N.view(batch, length).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (upstream_B,) = gradients
        (gradient,) = ctx.saved_tensors
        # The array was multiplied in place by the factor of an earlier backward pass (of a retained graph), which is
        # divided out here. A copy would double the peak memory.
        factor_B = upstream_B if ctx.factor_B is None else upstream_B / ctx.factor_B
        if bool((factor_B == 1.0).all()):
            return gradient, None, None, None
        factor_B11 = factor_B.view(-1, 1, 1)
        if bool((upstream_B == 0.0).any()):  # multiplied in place, it could not be divided out later
            return (gradient * factor_B11).to(gradient.dtype), None, None, None
        ctx.factor_B = upstream_B
        return gradient.data.mul_(factor_B11), None, None, None


def _in_cache(
    logits: Tensor, target_N: Tensor, weight_N1: Tensor, losses_N: Tensor, *, overwrite: bool, wanted: bool
) -> Tensor | None:
    """Fill ``losses_N``; return the gradient at ``logits`` (N, V) where it is wanted, over them if they may be
    overwritten.
    """
    rows, vocabulary = logits.shape
    gradient = (logits if overwrite else torch.empty_like(logits)) if wanted else None
    step = max(1, CHUNK_NUMBERS // vocabulary)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        index_N1 = target_N[part].clamp_min(0).unsqueeze(1)
        z = logits[part].float()
        picked, top = z.gather(1, index_N1), z.amax(1, keepdim=True)
        spare = logits.dtype != torch.float32 or gradient is logits
        p = z.sub_(top).exp_() if spare else (z - top).exp_()
        total = p.sum(1, keepdim=True)
        # A place without a target has weight 0 even where its logits are not finite.
        absent = target_N[part].unsqueeze(1) == IGNORED
        loss = (total.log() + top - picked) * weight_N1[part]
        losses_N[part] = loss.masked_fill(absent, 0.0).squeeze(1)
        if gradient is not None:
            p.mul_(weight_N1[part] / total)
            p.scatter_add_(1, index_N1, -weight_N1[part])
            p.masked_fill_(absent, 0.0)
            if p.data_ptr() != gradient[part].data_ptr():
                gradient[part] = p
    return gradient


def _in_few_passes(
    logits: Tensor, target_N: Tensor, weight_N1: Tensor, losses_N: Tensor, *, overwrite: bool, wanted: bool
) -> Tensor | None:
    """As :func:`_in_cache`, in few passes over memory: each kernel of a GPU reads or writes all logits."""
    rows, vocabulary = logits.shape
    gradient = (logits if overwrite else torch.empty_like(logits)) if wanted else None
    step = max(1, GPU_CHUNK_NUMBERS // vocabulary)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        index_N1 = target_N[part].clamp_min(0).unsqueeze(1)
        absent = target_N[part].unsqueeze(1) == IGNORED
        log_p = torch.log_softmax(logits[part], dim=1, dtype=torch.float32)
        picked = log_p.gather(1, index_N1)
        losses_N[part] = (-picked * weight_N1[part]).masked_fill(absent, 0.0).squeeze(1)
        if gradient is not None:
            torch.mul(log_p.exp_(), weight_N1[part], out=gradient[part])
            gradient[part].scatter_(1, index_N1, (torch.expm1(picked) * weight_N1[part]).to(gradient.dtype))
            # A position without a target has weight 0, even if its logits are not finite.
            gradient[part].masked_fill_(absent, 0.0)
    return gradient


def _sample_losses(logits_BTV: Tensor, target_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """(B,) float32: Σ_t weight · cross-entropy, for each sample."""
    logits_BTV = logits_BTV.contiguous()
    losses_B: Tensor = _SampleLosses.apply(logits_BTV, target_BT, weight_BT, _may_overwrite(logits_BTV))  # type: ignore[no-untyped-call]
    return losses_B


def _next_tokens(labels_BT: Tensor) -> Tensor:
    """(B, T): the label after each position, and -100 at the last one."""
    target_BT = torch.full_like(labels_BT, IGNORED)
    target_BT[:, :-1] = labels_BT[:, 1:]
    return target_BT


def next_token_losses(logits_BTV: Tensor, labels_BT: Tensor, *, reduction: Reduction = "mean") -> tuple[Tensor, Tensor]:
    """The next-token cross-entropy of each sample over its own targets, in nats.

    The logits at position t predict the label at t+1: the shift happens here, once. ``labels_BT`` are the input ids,
    with -100 for tokens that are not targets (padding, prompts).

    Returns ``(losses_B, targets_B)``. Losses are float32: the mean (or sum) over the sample's own targets, 0 without
    any. ``targets_B`` is the number of targets, int64. First-order gradients of any function of the losses are
    supported. Do not use the logits afterwards: if no backward needs them, the gradient is written over them.
    """
    target_BT = _next_tokens(labels_BT)
    is_target = target_BT != IGNORED
    targets_B = is_target.sum(1)
    weight_B = torch.ones_like(targets_B, dtype=torch.float32)
    if reduction == "mean":
        weight_B = 1.0 / targets_B.clamp_min(1).float()
    return _sample_losses(logits_BTV, target_BT, weight_B.unsqueeze(1) * is_target), targets_B


def own_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """(B,): each sample's mean loss, whose gradients a loss scaler reaches where the logits are of float16."""
    form = next_token_losses_plainly if logits_BTV.dtype == torch.float16 else next_token_losses
    return form(logits_BTV, labels_BT)[0]


def training_loss(
    logits_BTV: Tensor, labels_BT: Tensor, total_targets: float, weights_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss that training minimises: Σ over all targets of the batch, each times the weight of its sample (None: 1),
    divided by ``total_targets``.

    ``total_targets`` counts the targets of the whole step (all micro-batches; over ranks, divided by their number, for
    gradients are averaged), each times its weight. Returns the scalar and each sample's own mean loss (B,), detached,
    NaN where it has no target or weighs nothing. Logits of float16 go through float32 operations whose gradients a loss
    scaler reaches.
    """
    if logits_BTV.dtype == torch.float16:
        sums_B, targets_B = next_token_losses_plainly(logits_BTV, labels_BT, reduction="sum")
        weighted_B = sums_B if weights_B is None else sums_B * weights_B
        return weighted_B.sum() / total_targets, (sums_B / targets_B).detach()
    target_BT = _next_tokens(labels_BT)
    is_target = target_BT != IGNORED
    divisor_B = is_target.sum(1) if weights_B is None else is_target.sum(1) * weights_B
    share_BT = is_target.float() / total_targets
    shares_B = _sample_losses(logits_BTV, target_BT, share_BT if weights_B is None else share_BT * weights_B[:, None])
    return shares_B.sum(), (shares_B * (total_targets / divisor_B)).detach().nan_to_num(posinf=torch.nan)


def next_token_losses_plainly(
    logits_BTV: Tensor, labels_BT: Tensor, *, reduction: Reduction = "mean"
) -> tuple[Tensor, Tensor]:
    """The slow, obvious version of :func:`next_token_losses`, whose results must be the same."""
    flat = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().transpose(1, 2), labels_BT[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    targets_B = (labels_BT[:, 1:] != IGNORED).sum(1)
    divisor = targets_B.clamp_min(1) if reduction == "mean" else torch.ones_like(targets_B)
    return flat.sum(1) / divisor, targets_B
