"""A tap inside a compiled graph: an operation that torch.compile does not look into, and that copies its input.

Its backward is another such operation: it hands the gradient to Python, wherever the compiled backward pass is.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class GraphTap(Protocol):
    """What a tap in a graph calls while the graph runs."""

    def forward(self, x: Tensor, y: Tensor) -> int:
        """The layer ran: ``x`` went in, ``y`` came out. A number that :meth:`backward` is told: of the open batch."""

    def backward(self, x: Tensor, dy: Tensor, batch: int) -> None:
        """The gradient ``dy`` came to the layer's output. Neither tensor may be kept: the graph uses its memory."""


_taps: WeakValueDictionary[int, GraphTap] = WeakValueDictionary()
_keys = count()

UNSAFE = (torch.Tag.cudagraph_unsafe,)
"""A CUDA graph would play the operations again without Python."""


def registered(tap: GraphTap) -> int:
    """The number by which graphs know ``tap``, as long as somebody holds it."""
    key = next(_keys)
    _taps[key] = tap
    return key


@torch.library.custom_op("ghoststore::tap", mutates_args=(), tags=UNSAFE)
def tapped(y: Tensor, x: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """``y`` and the number of the batch, (), int64, on the CPU."""
    tap = _taps.get(key)
    return y.clone(), torch.tensor(-1 if tap is None else tap.forward(x, y))


@tapped.register_fake
def _(y: Tensor, x: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("ghoststore::tap_backward", mutates_args=(), tags=UNSAFE)
def _seen(dy: Tensor, x: Tensor, batch: Tensor, key: int) -> Tensor:
    tap = _taps.get(key)
    if tap is not None:
        tap.backward(x, dy, int(batch))
    return dy.clone()


@_seen.register_fake
def _(dy: Tensor, x: Tensor, batch: Tensor, key: int) -> Tensor:
    return torch.empty_like(dy)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    _, x, ctx.key = inputs
    ctx.save_for_backward(x, output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, None, None]:
    x, batch = ctx.saved_tensors
    return _seen(dy, x, batch, ctx.key), None, None


tapped.register_autograd(_backward, setup_context=_setup)
