"""Finding the first module whose output differs between two forward passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest relative difference of sums of a float32 output that counts as equal."""

Traces = list[tuple[str, Tensor]]
"""(name, (3,) sums of the output) of each module, in the order in which the modules finish."""


def first_difference(
    model: nn.Module, one: Callable[[], Any], other: Callable[[], Any], length: int | None = None
) -> str | None:
    """The name of the first module whose output for the first sample differs between two forward passes.

    With ``length`` only the first ``length`` positions of outputs (B, T, …) count. None if no module's output differs.
    """
    traces = (_traces(model, forward, length) for forward in (one, other))
    for (name, first), (other_name, second) in zip(*traces, strict=False):
        if name != other_name or not torch.allclose(first, second, rtol=TOLERANCE, atol=0, equal_nan=True):
            return name or type(model).__name__
    return None


def _traces(model: nn.Module, forward: Callable[[], Any], length: int | None) -> Traces:
    traces: Traces = []

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) and output else output
        if isinstance(y, Tensor) and y.dim() >= 2 and y.is_floating_point():
            values = y[0].detach().double()[:length].flatten()
            # Sums of absolute values, plain and weighted, and of squares: small to keep, and any change changes them.
            weights = torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device)
            traces.append((name, torch.stack([f.sum() for f in (values.abs(), weights * values.abs(), values**2)])))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        forward()
    return traces
