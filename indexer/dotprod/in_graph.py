"""The taps of one engine in a model that torch.compile compiled, one graph or many.

A compiled graph is one node of autograd: no leaf reaches its taps without all weight gradients. So the train batch
alone runs compiled; val passes, scoring passes and checks run the model as it was written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghoststore.errors import CaptureError
from indexer.dotprod.method import Method
from indexer.dotprod.open_batch import OpenBatch
from indexer.encode.graph_tap import registered, tapped
from indexer.encode.modes import without_autocast
from indexer.layers import LayerType
from indexer.layers.base import by_sample


class InGraph:
    """What a compiled graph calls, and what it reads while it is made: it is made anew when ``open`` or, for lookups of
    positions, ``size`` has another value. Nothing else of an engine may be read there.
    """

    def __init__(self, method: Method, *, copies: bool, compiled: bool) -> None:
        """``copies``: ``method`` keeps what its taps see, and a graph would use that memory for something else."""
        self.open = False
        self.size = 0
        self.compiled = compiled
        """Whether a graph is known to come, or ran."""
        self.narrow = False
        self.train: OpenBatch | None = None
        self.method, self.copies = method, copies
        self.layers: set[str] = set()
        """Those that ran in a graph in the open batch."""
        self._ran_before: set[str] = set()
        self._taps: list[_LayerTap] = []

    def add(self, name: str, kind: LayerType, ran: Callable[[str], None]) -> int:
        """The number of a new tap, for :meth:`apply`; ``ran`` is told when the layer runs."""
        self._taps.append(_LayerTap(self, name, kind, ran))
        return registered(self._taps[-1])

    def apply(self, key: int, kind: LayerType, x: Tensor, y: Tensor) -> Tensor | None:
        """In a graph that is being made: the output of a layer through tap ``key``; None without an open batch."""
        if not self.open or not torch.is_grad_enabled() or not y.requires_grad:
            return None
        if kind.is_lookup and x.dim() == 1 and self.size == 1:
            alone: Tensor = tapped(y.unsqueeze(0), x.unsqueeze(0), key)[0]
            return alone.squeeze(0)
        if kind.is_lookup and (x.dim() == 1 or (x.dim() == 2 and x.shape[0] == 1 and self.size != 1)):
            # As by_sample does; that an index of one axis is of positions, the checks outside the graph have seen.
            x = x.reshape(1, -1).expand(self.size, -1)
            y = (y if y.dim() == 3 else y.unsqueeze(0)).expand(self.size, -1, -1)
        if not kind.is_lookup and x.dim() == 2 and len(x) > self.size and len(x) % self.size == 0:
            shape = (self.size, -1)
            flat: Tensor = tapped(y.reshape(*shape, y.shape[-1]), x.reshape(*shape, x.shape[-1]), key)[0]
            return flat.flatten(0, 1)
        output: Tensor = tapped(y, x, key)[0]
        return output

    def begin(self, open_batch: OpenBatch) -> None:
        """A train batch is open."""
        self.train, self.open, self.size = open_batch, True, open_batch.rows
        self.layers = set()

    def end(self) -> None:
        """It is closed."""
        self.train, self.open = None, False

    def refuse_left_out(self, open_batch: OpenBatch) -> None:
        """CaptureError if a graph without taps ran in place of layers."""
        missing = sorted(self._ran_before - open_batch.ran)
        if not self.compiled or (open_batch.ran and not missing):
            self._ran_before |= open_batch.ran
            return
        layers = f"layer(s) {', '.join(missing[:5])}" if missing else "any scored layer"
        raise CaptureError(
            f"no tap saw {layers} run in this batch. A graph that torch.compile made while the engine was not attached "
            "leaves the taps out: call torch._dynamo.reset() now that it is attached, and run the batch anew. Layers "
            "that do not run in every batch of a compiled model look the same: leave them out with exclude_layers"
        )


class _LayerTap:
    """The tap of one layer."""

    def __init__(self, graph: InGraph, name: str, kind: LayerType, ran: Callable[[str], None]) -> None:
        self._graph, self._name, self._kind, self._ran = graph, name, kind, ran

    def forward(self, x: Tensor, y: Tensor) -> int:
        """See :class:`indexer.encode.graph_tap.GraphTap`."""
        graph, open_batch = self._graph, self._graph.train
        if open_batch is None:
            return -1
        by_sample(x, y, open_batch.rows, self._kind, self._name)
        open_batch.sized = True  # the check outside the graph has seen the axes
        graph.compiled = True
        graph.narrow |= y.dtype in (torch.float16, torch.bfloat16)
        if not open_batch.forwarded:
            graph.method.called(self._name)
        self._ran(self._name)
        graph.layers.add(self._name)
        open_batch.ran.add(self._name)
        return open_batch.serial

    def backward(self, x: Tensor, dy: Tensor, batch: int) -> None:
        """See :class:`indexer.encode.graph_tap.GraphTap`."""
        graph, open_batch = self._graph, self._graph.train
        if open_batch is None or open_batch.serial != batch:
            return  # the batch was discarded, or collected already
        with torch.no_grad(), without_autocast(dy.device.type):
            if graph.copies:
                x, dy = x.clone(), dy.clone()
            saved = graph.method.to_keep(self._name, x, dy.dtype)
            open_batch.in_time(graph.method.see_train(self._name))(saved, dy)
