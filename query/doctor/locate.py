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
    model: nn.Module, first_pass: Callable[[], Any], second_pass: Callable[[], Any], length: int | None = None
) -> str | None:
    """The name of the first module whose output for the first sample differs between two forward passes.

    With ``length`` only the first ``length`` positions of outputs (B, T, …) count. None if no module's output differs.
    """
    traces = (_traces(model, forward, length) for forward in (first_pass, second_pass))
    for (name, sums), (other_name, other_sums) in zip(*traces, strict=False):
        if name != other_name or not torch.allclose(sums, other_sums, rtol=TOLERANCE, atol=0, equal_nan=True):
            return name or type(model).__name__
    return None


def _traces(model: nn.Module, forward: Callable[[], Any], length: int | None) -> Traces:
    """The traces of one forward pass, of the first sample."""
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
