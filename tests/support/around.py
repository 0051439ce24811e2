"""A model around one layer, so that what comes before and after it has gradients, too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Around(nn.Module):
    """A layer between two linears; ``call`` says how it is called."""

    width = 6

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(self.width, self.width), layer, nn.Linear(self.width, 3)
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.call(self.layer, torch.tanh(self.first(x)))))
