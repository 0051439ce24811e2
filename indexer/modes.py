"""A model in another mode for a while, and its random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def devices_of(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that ``model`` lies on."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; the random state and every module's own mode are put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=devices_of(model)):
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
