"""Where in a model two forward passes part: the first module whose output is not the same for one sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Relative, of sums of an output in float32."""

Traces = list[tuple[str, Tensor]]
"""Of each module in the order in which they finish: its name, and (3,) sums of its output."""


def first_difference(
    model: nn.Module, one: Callable[[], Any], other: Callable[[], Any], length: int | None = None
) -> str | None:
    """The name of the first module whose output for the first sample differs between two forward passes.

    With ``length`` only the first so many positions of outputs (B, T, …) count. None if no module's output differs.
    """
    for (name, first), (same, second) in zip(_traces(model, one, length), _traces(model, other, length), strict=False):
        if name != same or not torch.allclose(first, second, rtol=TOLERANCE, atol=0, equal_nan=True):
            return name or type(model).__name__
    return None


def _traces(model: nn.Module, forward: Callable[[], Any], length: int | None) -> Traces:
    traces: Traces = []

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) and output else output
        if isinstance(y, Tensor) and y.dim() >= 2 and y.is_floating_point():
            values = y[0].detach().double()[:length].flatten()
            # Sums of absolute values and their weighted kin: cheap to keep, and moved by any change.
            weights = torch.linspace(1, 2, len(values), dtype=torch.float64, device=values.device)
            traces.append((name, torch.stack([f.sum() for f in (values.abs(), weights * values.abs(), values**2)])))

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(partial(note, name)).remove)
        forward()
    return traces
