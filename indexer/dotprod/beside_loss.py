"""What goes backward beside the watched loss: what comes to the model's output, against what that loss sends there.

Legend: N places of an output, V numbers of each (of a language model: words), S random sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from indexer.dotprod.forward_seen import Seen, tensors_in
from indexer.dotprod.loss_forms import CHUNK_NUMBERS
from indexer.dotprod.loss_graph import gradient_at, place_at, way_to

TOLERANCE, NARROW_TOLERANCE = 1e-4, 0.05
"""Relative: a gradient that is multiplied with another number is rounded another way."""

SUMS = 4
"""Of each place: a gradient as large as the logits is not kept."""


class BesideLoss:
    """Watches one backward pass at the tensors of the output, by a few random sums of each place.

    A tensor that only a custom operation leads to from the loss is left alone: its backward may run only once.
    """

    def __init__(self, loss: Tensor, passes: Iterable[Seen], *, narrow: bool) -> None:
        """After the forward passes of a batch, before the backward pass of ``loss``."""
        self._tolerance = NARROW_TOLERANCE if narrow else TOLERANCE
        self._arrivals: list[_Arrivals] = []
        for seen in passes:
            for name, tensor in tensors_in(seen.output).items():
                if tensor.grad_fn is not None and tensor.is_floating_point() and seen.unchanged(tensor):
                    self._await(loss, name, tensor)
        # Now that every gradient is had: the passes above are not to be seen.
        self._handles: list[RemovableHandle] = [arrivals.listen() for arrivals in self._arrivals]

    def _await(self, loss: Tensor, name: str, tensor: Tensor) -> None:
        way = way_to(loss, tensor)
        if way.logits is None:
            self._arrivals.append(_Arrivals(name, tensor.grad_fn, tensor, torch.zeros_like(tensor)))
        elif way.native:
            rows = tensor.numel() // tensor.shape[-1] if tensor.dim() else 1
            scale = float(min(4096, max(1, rows)))  # float16 would lose small ones
            gradient = gradient_at(loss, way.logits, tensor, scale)
            if gradient is not None:
                self._arrivals.append(_Arrivals(name, way.logits, tensor, gradient, scale))

    def refuse(self, model: nn.Module, upstream: Tensor) -> None:
        """UsageError if anything came to the output but ``upstream`` times the gradient of the watched loss."""
        for arrivals in self._arrivals:
            error = arrivals.error(upstream)
            if error > self._tolerance:
                off = "that loss sends nothing there" if error == float("inf") else f"{100 * error:.2g} % off"
                raise UsageError(
                    f"{arrivals.name} of the output of {type(model).__name__} took part in the backward pass beside "
                    f"the watched loss (what came there is not that loss's gradient: {off}). Another term goes "
                    "backward, and no sample's share of it is known. If it is a mean over samples, give the engine "
                    "val_losses with that term in it and watch the whole loss: watch(loss, weights=…, batch=batch). "
                    "If it is one of the whole batch (a router's), train without it (output_router_logits=False)"
                )

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._arrivals = [], []


class _Arrivals:
    """The gradients that come to one node of the graph, which it hands on."""

    def __init__(self, name: str, node: Any, tensor: Tensor, gradient: Tensor, scale: float = 1.0) -> None:
        """``node`` is where ``tensor`` comes from; ``gradient`` is ``scale`` times that of the watched loss at it."""
        self.name = name
        self._node: Any = node
        self._place = place_at(node, tensor)
        self._shape = gradient.shape
        self._expected = _sums(gradient) / scale
        self._arrived: Tensor | None = None

    def listen(self) -> RemovableHandle:
        """From now on, and once: the node holds this, so this lets go of the node."""
        node, self._node = self._node, None
        handle: RemovableHandle = node.register_prehook(self._came)
        return handle

    def _came(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self._place]
        if gradient is not None:
            sums = _sums(gradient.detach().reshape(self._shape))
            self._arrived = sums if self._arrived is None else self._arrived + sums

    def error(self, upstream: Tensor) -> float:
        """Relative; 0.0 where nothing came, or what is not finite."""
        if self._arrived is None or not bool(self._arrived.isfinite().all()) or not bool(upstream.isfinite()):
            return 0.0
        expected = self._expected * upstream.to(self._expected.device)
        if not bool(expected.isfinite().all()):
            return 0.0
        gap, size = float((self._arrived - expected).norm()), float(expected.norm())
        return gap / size if size else (float("inf") if gap else 0.0)


def _sums(x: Tensor) -> Tensor:
    """(N, SUMS) float64: of each of the N rows along the last axis, random sums; the same for rows of one length."""
    x_NV = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    random_VS = torch.randn(x_NV.shape[1], SUMS, generator=torch.Generator().manual_seed(x_NV.shape[1]))
    random_VS = random_VS.to(x.device).double()
    parts = torch.split(x_NV, max(1, CHUNK_NUMBERS // max(1, x_NV.shape[1])))
    return torch.cat([part.double() @ random_VS for part in parts])
