"""An autograd function that changes nothing, and passes each gradient to a callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from indexer.encode.modes import without_autocast

See = Callable[[Tensor, Tensor], None]
"""The callback: (what was saved of the layer's input, gradient at its output)."""


class Tap(torch.autograd.Function):
    """``Tap.apply(y, saved, see, leaf) -> y``: backward calls ``see(saved, dy)`` and passes dy on unchanged.

    Autograd saves ``saved``: so gradient checkpointing drops and recomputes it, and a change in place is an error.
    ``leaf`` makes ``torch.autograd.grad`` reach the tap without any weight gradient; None if that is not needed.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, saved: Tensor, see: See, leaf: Tensor | None) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.see = see
        ctx.set_materialize_grads(False)
        # detach, not a view: the next module may modify y in place (ReLU(inplace=True)), as it may without the tap.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        if dy is None:
            return None, None, None, None
        (saved,) = ctx.saved_tensors
        with torch.no_grad(), without_autocast(dy.device.type):
            ctx.see(saved, dy.detach())
        return dy, None, None, dy.new_zeros(()) if ctx.needs_input_grad[3] else None
