"""Activation functions that keep only their input for backward.

transformers' ``NewGELUActivation`` (GPT-2, GPT-J, …) is written out in six operations, and autograd keeps an array as
large as the widest layer for four of them: most of what a forward pass of GPT-2 holds when no weight gradient is
wanted. Here the same operations run, without a graph, and backward uses the derivative in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation


class LeanGELU(torch.autograd.Function):
    """``LeanGELU.apply(x, function)``: ``function(x)``, which must be the tanh form of GELU, element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        (x,) = ctx.saved_tensors
        dx = torch.ops.aten.gelu_backward(dy, x.to(dy.dtype), approximate="tanh")
        return dx.to(x.dtype), None


def _lean_forward(module: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = LeanGELU.apply(x, partial(type(module).forward, module))  # type: ignore[no-untyped-call]
    return output


@contextmanager
def lean_activations(model: nn.Module) -> Iterator[None]:
    """While open, every ``NewGELUActivation`` of ``model`` keeps its input alone; its outputs stay the same bits."""
    changed = [
        module for module in model.modules() if type(module) is NewGELUActivation and "forward" not in vars(module)
    ]
    try:
        for module in changed:
            module.forward = partial(_lean_forward, module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)
