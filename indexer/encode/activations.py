"""Activation functions that keep only their input for backward.

transformers' ``NewGELUActivation`` (GPT-2, GPT-J, …) consists of six operations, and autograd keeps an array as large
as the widest layer for four of them. Without weight gradients that is most of the memory of a forward pass of GPT-2.
Here the same operations run without a graph, and backward computes the derivative in one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class LeanGELU(torch.autograd.Function):
    """``LeanGELU.apply(x, function)`` is ``function(x)``, which must be the elementwise tanh form of GELU."""

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
    """While open, every ``NewGELUActivation`` of ``model`` keeps only its input. Outputs stay bit-identical."""
    from transformers.activations import NewGELUActivation  # here: a search of stored vectors does without

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
