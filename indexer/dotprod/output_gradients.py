"""Whether the watched loss alone goes backward: the gradients at the model's output must be its own.

Legend: N rows of an output, V numbers of each (of a language model: the vocabulary), S random sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from indexer.dotprod.forward_record import ForwardRecord, tensors_in
from indexer.dotprod.loss_forms import CHUNK_NUMBERS
from indexer.dotprod.loss_graph import gradient_at, output_index, path_to

TOLERANCE, NARROW_TOLERANCE = 1e-4, 0.05
"""Relative. The expected gradient is multiplied by the upstream one afterwards, so it is rounded differently."""

SUMS = 4
"""Random sums of each row: keeping the whole gradient would take as much memory as the logits."""


class OutputGradients:
    """Compares the gradients at the model's output, in one backward pass, with those of the watched loss.

    It compares a few random sums of each row. A tensor is left out if a custom operation lies between it and the
    loss: the backward of such an operation may run only once.
    """

    def __init__(self, loss: Tensor, passes: Iterable[ForwardRecord], *, narrow: bool) -> None:
        """Make it between the forward passes of a batch and the backward pass of ``loss``."""
        self._tolerance = NARROW_TOLERANCE if narrow else TOLERANCE
        self._gradients: list[_OutputGradient] = []
        for record in passes:
            for name, tensor in tensors_in(record.output).items():
                if tensor.grad_fn is not None and tensor.is_floating_point() and record.unchanged(tensor):
                    self._expect(loss, name, tensor)
        # Last, because computing the expected gradients runs backward through the same nodes.
        self._handles: list[RemovableHandle] = [gradient.listen() for gradient in self._gradients]

    def _expect(self, loss: Tensor, name: str, tensor: Tensor) -> None:
        path = path_to(loss, tensor)
        if path.node is None:
            self._gradients.append(_OutputGradient(name, tensor.grad_fn, tensor, torch.zeros_like(tensor)))
        elif path.native:
            rows = tensor.numel() // tensor.shape[-1] if tensor.dim() else 1
            scale = float(min(4096, max(1, rows)))  # float16 would lose small gradients
            gradient = gradient_at(loss, path.node, tensor, scale)
            if gradient is not None:
                self._gradients.append(_OutputGradient(name, path.node, tensor, gradient, scale))

    def refuse(self, model: nn.Module, upstream: Tensor) -> None:
        """UsageError if a gradient at the output was not ``upstream`` times that of the watched loss."""
        for gradient in self._gradients:
            error = gradient.error(upstream)
            if error > self._tolerance:
                off = "that loss sends nothing there" if error == float("inf") else f"{100 * error:.2g} % off"
                raise UsageError(
                    f"{gradient.name} of the output of {type(model).__name__} took part in the backward pass beside "
                    f"the watched loss (what came there is not that loss's gradient: {off}). Another term goes "
                    "backward, and no sample's share of it is known. If it is a mean over samples, give the engine "
                    "`val_losses` with that term in it and watch the whole loss: watch(loss, weights=…, batch=batch). "
                    "If it is one of the whole batch (a router's), train without it (output_router_logits=False)"
                )

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._gradients = [], []


class _OutputGradient:
    """The gradient at one tensor of the output: what is expected, and the sum of what arrives."""

    def __init__(self, name: str, node: Any, tensor: Tensor, gradient: Tensor, scale: float = 1.0) -> None:
        """``node`` made ``tensor``; ``gradient`` is ``scale`` times that of the watched loss there."""
        self.name = name
        self._node: Any = node
        self._index = output_index(node, tensor)
        self._shape = gradient.shape
        self._expected = _sums(gradient) / scale
        self._received: Tensor | None = None

    def listen(self) -> RemovableHandle:
        """Put the hook on the node, once. The node then refers to this object, so the reference back is dropped."""
        node, self._node = self._node, None
        handle: RemovableHandle = node.register_prehook(self._receive)
        return handle

    def _receive(self, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[self._index]
        if gradient is not None:
            sums = _sums(gradient.detach().reshape(self._shape))
            self._received = sums if self._received is None else self._received + sums

    def error(self, upstream: Tensor) -> float:
        """The relative error of the gradient; 0.0 if none arrived, or if one is not finite."""
        if self._received is None or not bool(self._received.isfinite().all()) or not bool(upstream.isfinite()):
            return 0.0
        expected = self._expected * upstream.to(self._expected.device)
        if not bool(expected.isfinite().all()):
            return 0.0
        gap, size = float((self._received - expected).norm()), float(expected.norm())
        return gap / size if size else (float("inf") if gap else 0.0)


def _sums(x: Tensor) -> Tensor:
    """(N, SUMS) float64: random sums of each row along the last axis. The length of a row seeds the random weights."""
    x_NV = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    random_VS = torch.randn(x_NV.shape[1], SUMS, generator=torch.Generator().manual_seed(x_NV.shape[1]))
    random_VS = random_VS.to(x.device).double()
    chunks = torch.split(x_NV, max(1, CHUNK_NUMBERS // max(1, x_NV.shape[1])))
    return torch.cat([chunk.double() @ random_VS for chunk in chunks])
