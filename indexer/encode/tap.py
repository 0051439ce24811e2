"""An autograd function that changes nothing, and passes each gradient to a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from indexer.encode.modes import without_autocast
from indexer.layers.base import Seen

See = Callable[[Any, Tensor], None]
"""The callback: (what was saved of the layer's input, gradient at its output)."""


def save(ctx: Any, saved: Any) -> None:
    """Keep ``saved`` for the backward pass: a tensor with autograd, anything else as it is."""
    ctx.save_for_backward(*([saved] if isinstance(saved, Tensor) else []))
    ctx.call = None if isinstance(saved, Tensor) else saved


def restored(ctx: Any) -> Any:
    """What :func:`save` kept."""
    return ctx.saved_tensors[0] if ctx.call is None else ctx.call


def tapped(seen: Seen, saved: Any, see: See, leaf: Tensor | None) -> Seen:
    """``seen`` with a tap on its outputs."""
    outputs: tuple[Tensor, ...] = Tap.apply(saved, see, leaf, seen.rows, *seen.outputs)  # type: ignore[no-untyped-call]
    return seen.with_outputs(outputs)


class Tap(torch.autograd.Function):
    """``Tap.apply(saved, see, leaf, rows, *outputs) -> outputs``: backward calls ``see(saved, rows(gradients))`` and
    passes the gradients on unchanged.

    Autograd saves a tensor ``saved``: so gradient checkpointing drops and recomputes it, and a change in place is an
    error.
    ``leaf`` makes ``torch.autograd.grad`` reach the tap without any weight gradient; None if that is not needed.
    """

    @staticmethod
    def forward(
        ctx: Any, saved: Any, see: See, leaf: Tensor | None, rows: Callable[..., Tensor], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        save(ctx, saved)
        ctx.see, ctx.rows = see, rows
        ctx.set_materialize_grads(False)
        # detach, not a view: the next module may modify y in place (ReLU(inplace=True)), as it may without the tap.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        some = next((gradient for gradient in gradients if gradient is not None), None)
        if some is None:
            return None, None, None, None, *gradients
        with torch.no_grad(), without_autocast(some.device.type):
            ctx.see(restored(ctx), ctx.rows([None if dy is None else dy.detach() for dy in gradients]))
        return None, None, some.new_zeros(()) if ctx.needs_input_grad[2] else None, None, *gradients
