"""Gradients of many rows in one backward pass, layer by layer, and none of them stored.

A batch goes through the model once. As soon as the backward pass has left a layer, the gradient matrices of some of its
samples are formed, handed to a function, and dropped. Memory: the model and the activations of a batch, and TILE
numbers.

Legend: B rows of a batch, b some of them, O, I axes of a gradient matrix, Q queries, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.progress import Task
from indexer.encode.batching import batches_of
from indexer.encode.encoder import inputs_of
from indexer.encode.losses import Reduction, next_token_losses
from indexer.encode.modes import forward_options, refuse_randomness, without_autocast
from indexer.encode.tap import tapped
from indexer.encode.tokens import Row
from indexer.layers import Axis, LayerType, Sides
from indexer.layers.base import at_least_float, flatten_positions, project
from indexer.projection.blocks import Block, Use

TILE = 1 << 23
"""Numbers of gradient matrices that are formed at once: 32 MiB in float32. One matrix may have more."""

Half = Callable[[Block, Tensor], Tensor]
"""From the gradient matrix (O, I) of a block to that matrix in a metric: products of two such matrices are scores."""
Losses = Callable[..., tuple[Tensor, Tensor]]
"""As :func:`indexer.encode.losses.next_token_losses`."""
See = Callable[[int, Tensor, Tensor], None]
"""Is given the place of a block, the places of some rows (b,), and their gradient matrices (b, O, I), at least float32.
"""


@dataclass(slots=True)
class _Used:
    """One run of a module of a block in the forward pass, and what the backward pass left of it."""

    module: nn.Module
    kind: LayerType
    sides: Sides
    flipped: bool
    saved: Any
    dy: Tensor

    def gradients(self, samples: slice) -> Tensor:
        """(b, O, I): this run's share of the gradient matrices."""
        saved, dy = self.saved[samples], self.dy[samples]
        if self.kind.has_formula and self.kind.is_matrix and not self.kind.is_lookup:
            delta = project(flatten_positions(dy), self.sides.out_KO, None, dy.dtype)
            gradients = at_least_float(delta).transpose(1, 2) @ at_least_float(saved)
        else:
            gradients = self.kind.block(self.module, saved, dy, self.sides)
        return gradients.transpose(1, 2) if self.flipped else gradients


@dataclass(slots=True)
class _Batch:
    """The open batch: how often the modules of each block ran, and which runs the backward pass has reached."""

    places: Tensor
    see: See
    leaf: Tensor
    runs: dict[int, int] = field(default_factory=dict)
    used: dict[int, list[_Used]] = field(default_factory=dict)


class LayerGradients:
    """``with LayerGradients(model, blocks) as layers: layers(rows, see)``.

    Every parameter is frozen inside the block, so that the backward pass computes no gradient of a whole batch.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[Block],
        *,
        reduction: Reduction = "mean",
        losses: Losses = next_token_losses,
    ) -> None:
        refuse_randomness(model)
        self.model, self.blocks = model, list(blocks)
        self.device: torch.device = next(model.parameters()).device
        self._losses, self._reduction = losses, reduction
        self._options = forward_options(model)
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self._handles: list[Any] = []
        self._batch: _Batch | None = None

    def __enter__(self) -> LayerGradients:
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        for place, block in enumerate(self.blocks):
            for use in block.uses:
                module = self.model.get_submodule(use.module)
                hook = partial(self._hook, place, use, _sides(block, use))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._handles, self._flags, self._batch = [], [], None

    @contextmanager
    def of_losses(self, losses: Losses) -> Iterator[None]:
        """Inside the block gradients are those of other ``losses``."""
        before, self._losses = self._losses, losses
        try:
            yield
        finally:
            self._losses = before

    def __call__(self, rows: Sequence[Row], see: See, places: Tensor | None = None) -> Tensor:
        """(B,) the losses of ``rows``, which must all be usable, in one batch. ``see`` is given all their gradient
        matrices, with ``places`` (default: 0 to B - 1).
        """
        inputs, labels = inputs_of(rows, self.device)
        leaf = torch.zeros((), device=self.device, requires_grad=True)
        self._batch = batch = _Batch(torch.arange(len(rows)) if places is None else places, see, leaf)
        try:
            logits = self.model(**inputs, **self._options).logits
            losses, _ = self._losses(logits, labels, reduction=self._reduction)
            del logits
            torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
            for place in list(batch.used):  # a run that the loss does not depend on had no backward pass
                self._form(place)
        finally:
            self._batch = None
        return losses.detach()

    def over(self, rows: Sequence[Row], see: See, batch_tokens: int, task: Task, *, padding: bool = True) -> None:
        """All ``rows`` in batches. ``see`` is given places in ``rows``."""
        for batch in batches_of(rows, batch_tokens, padding=padding):
            batch_rows = [rows[place] for place in batch]
            self(batch_rows, see, torch.tensor(batch))
            task.advance(len(batch), sum(row.length for row in batch_rows))

    def _hook(self, place: int, use: Use, sides: Sides, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        batch = self._batch
        if batch is None:
            return None
        kind = use.kind
        seen = kind.seen(module, args, kwargs, y, len(batch.places), use.module)
        with torch.no_grad(), without_autocast(seen.device.type):
            saved = kind.keep(module, seen.x, sides, seen.dtype)
        batch.runs[place] = batch.runs.get(place, 0) + 1

        def see(saved: Any, dy: Tensor) -> None:
            batch.used.setdefault(place, []).append(_Used(module, kind, sides, use.flipped, saved, dy))
            if len(batch.used[place]) == batch.runs[place]:
                self._form(place)

        return seen.back(tapped(seen, saved, see, batch.leaf).outputs)

    def _form(self, place: int) -> None:
        assert self._batch is not None
        uses, block, places = self._batch.used.pop(place), self.blocks[place], self._batch.places
        step = max(1, TILE // (block.n_out * block.n_in))
        with torch.no_grad():
            for start in range(0, len(places), step):
                samples = slice(start, start + step)
                matrices = uses[0].gradients(samples)
                for use in uses[1:]:
                    matrices = matrices + use.gradients(samples)
                self._batch.see(place, places[samples], matrices)


def _sides(block: Block, use: Use) -> Sides:
    """No projection of either axis."""
    size_in, size_out = (block.n_out, block.n_in) if use.flipped else (block.n_in, block.n_out)
    return Sides(Axis(size_in, use.bias_column), None, Axis(size_out))


@dataclass(frozen=True, slots=True)
class Passes:
    """How rows go through the model: by ``layers``, in batches of ``batch_tokens`` padded tokens."""

    layers: LayerGradients
    batch_tokens: int
    padding: bool = True

    def combined(self, rows: Sequence[Row], weights_QR: Tensor, task: Task) -> list[Tensor]:
        """(Q, O, I) for each block: Σ over ``rows`` of weight × gradient matrix."""
        device, queries = self.layers.device, len(weights_QR)
        sums: list[Tensor | None] = [None] * len(self.layers.blocks)

        def see(place: int, samples: Tensor, matrices: Tensor) -> None:
            weights_Qb = weights_QR[:, samples].to(device, matrices.dtype)
            total = sums[place]
            if total is None:
                total = sums[place] = matrices.new_zeros(queries, *matrices.shape[1:])
            total.view(queries, -1).addmm_(weights_Qb, matrices.flatten(1))

        self.layers.over(rows, see, self.batch_tokens, task, padding=self.padding)
        shapes = [(queries, block.n_out, block.n_in) for block in self.layers.blocks]
        return [torch.zeros(shape, device=device) if x is None else x for x, shape in zip(sums, shapes, strict=True)]

    def products(
        self, rows: Sequence[Row], queries: Sequence[Tensor], task: Task, half: Half | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """((Q, R), (R,)) float64 on the CPU: the products of ``rows`` with ``queries``, (Q, O, I) for each block, and
        the squared lengths of the rows in the metric ``half``; None in their place without one.
        """
        dots_QR = torch.zeros(len(queries[0]), len(rows), dtype=torch.float64, device=self.layers.device)
        squares_R = torch.zeros(len(rows), dtype=torch.float64, device=self.layers.device)

        def see(place: int, samples: Tensor, matrices: Tensor) -> None:
            samples = samples.to(self.layers.device)
            dots_QR[:, samples] += (queries[place].flatten(1) @ matrices.flatten(1).t()).double()
            if half is not None:
                block = self.layers.blocks[place]
                squares_R[samples] += torch.stack([half(block, g_OI).square().sum() for g_OI in matrices]).double()

        self.layers.over(rows, see, self.batch_tokens, task, padding=self.padding)
        return dots_QR.cpu(), None if half is None else squares_R.cpu()
