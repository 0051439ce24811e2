"""Encoding rows of tokens as vectors, with a causal language model, the engine, and each row's own loss.

Legend: B rows of a batch, T tokens of the longest, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ghoststore.errors import UsageError
from ghoststore.progress import Task
from indexer.encode.batching import batches_of
from indexer.encode.engine import GradProjLoraEngine
from indexer.encode.losses import IGNORED, Reduction, next_token_losses
from indexer.encode.modes import forward_options, refuse_randomness
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class Encoded(NamedTuple):
    """The vectors and losses of B rows: on the model's device, where they may still be computing, or on the CPU."""

    vectors: Tensor
    """(B, D) float32."""
    losses: Tensor
    """(B,) float32."""


class RowEncoder:
    """``with RowEncoder(model, projection) as encoder: encoder(rows)``. The model is restored at the end of
    the block.
    """

    def __init__(
        self,
        model: Any,
        projection: Projection,
        *,
        reduction: Reduction = "mean",
        checkpointing: bool = False,
        padding: bool = True,
        beside: Projection | None = None,
        find_uses: bool = True,
    ) -> None:
        """``find_uses=False`` is for those who compare the vectors with autograd themselves."""
        self.model = model
        self.padding = padding
        """Whether rows of different lengths share a batch of :func:`encode_rows`."""
        self.reduction: Reduction = reduction
        # No check here: a build checks the model before its first row (indexer.build.model_check).
        self.engine = GradProjLoraEngine(model, projection=projection, check=False, find_uses=find_uses)
        self.beside = (
            None if beside is None else GradProjLoraEngine(model, projection=beside, check=False, find_uses=find_uses)
        )
        """Of a second projection: :meth:`hand_over` gives its blocks after those of the first."""
        self.device = next(model.parameters()).device
        self._extra = forward_options(self.engine.model)
        self._checkpointing = checkpointing
        self._changed: list[tuple[Any, bool, dict[str, Any]]] = []

    def __enter__(self) -> RowEncoder:
        self.engine.attach()
        try:
            if self.beside is not None:
                self.beside.attach()
            if self._checkpointing:
                self._enable_checkpointing()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.beside is not None:
            self.beside.detach()
        self.engine.detach()
        for module, training, before in self._changed:
            module.training = training
            for name in CHECKPOINTING:
                vars(module).pop(name, None)
            vars(module).update(before)
        self._changed = []

    def _enable_checkpointing(self) -> None:
        """Recompute activations in backward. transformers does so only in training mode, so the layers that checkpoint
        are put into that mode; the modules below them are not, so that dropout stays off.

        The attributes are set directly, because ``gradient_checkpointing_enable`` leaves a hook on the embeddings.
        """
        module: Any
        for module in self.engine.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                before = {name: vars(module)[name] for name in CHECKPOINTING if name in vars(module)}
                self._changed.append((module, module.training, before))
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                module.training = True
        if not self._changed:
            raise UsageError(f"{type(self.engine.model).__name__} does not support gradient checkpointing")
        refuse_randomness(self.engine.model)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """Vectors and losses of ``rows``, which must all be usable, in one batch padded on the right."""
        losses = self._losses(rows)
        return Encoded(self.engine.collect(losses), losses.detach())

    def hand_over(self, rows: Sequence[Row], take: Callable[[int, Tensor], None]) -> Tensor:
        """(B,): the losses of ``rows``, whose blocks ``take(place, block)`` gets one by one: see
        :meth:`GradProjLoraEngine.hand_over`.
        """
        losses = self._losses(rows)
        self.engine.hand_over(losses, take, self.beside)
        return losses.detach()

    def _losses(self, rows: Sequence[Row]) -> Tensor:
        """(B,): the losses of ``rows``, with their graph."""
        inputs, labels = inputs_of(rows, self.device)
        self.engine.prepare(len(rows))
        if self.beside is not None:
            self.beside.prepare(len(rows))
        logits = self.model(**inputs, **self._extra).logits
        return next_token_losses(logits, labels, reduction=self.reduction)[0]


def encode_rows(encoder: RowEncoder, rows: Sequence[Row], batch_tokens: int, task: Task) -> Encoded:
    """Vectors and losses of ``rows``, on the CPU, computed in batches of at most ``batch_tokens`` padded tokens.

    Rows that are not usable have zeros. Results are copied from the device once, at the end, so that it never waits.
    """
    usable = [place for place, row in enumerate(rows) if row.status.usable]
    vectors = torch.zeros(len(rows), encoder.engine.dimension, device=encoder.device)
    losses = torch.zeros(len(rows), device=encoder.device)
    task.advance(len(rows) - len(usable))
    for batch in batches_of([rows[place] for place in usable], batch_tokens, padding=encoder.padding):
        places = [usable[index] for index in batch]
        encoded = encoder([rows[place] for place in places])
        rows_of_batch = torch.tensor(places, device=encoder.device)
        vectors.index_copy_(0, rows_of_batch, encoded.vectors)
        losses.index_copy_(0, rows_of_batch, encoded.losses)
        task.advance(len(places), sum(rows[place].length for place in places))
    return Encoded(vectors.cpu(), losses.cpu())


def inputs_of(rows: Sequence[Row], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """(what the model is called with, the labels) of ``rows`` in one batch, on ``device``: see :func:`pad`. The logits
    at each place predict the label after it, in an encoder-decoder model as in a causal one.
    """
    ids, labels, mask = (x.to(device, non_blocking=True) for x in pad(rows))
    if rows[0].source is None:
        return {"input_ids": ids, "attention_mask": mask}, labels
    sources = [torch.from_numpy(row.source).long() for row in rows if row.source is not None]
    source = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)
    source_mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in sources], batch_first=True)
    # The decoder is causal: what it reads after a row's own tokens reaches none of these.
    inputs = {"input_ids": source, "attention_mask": source_mask, "decoder_input_ids": ids}
    return {name: x.to(device, non_blocking=True) for name, x in inputs.items()}, labels


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels, mask), each (B, T) int64, padded on the right with id 0, label -100, mask 0.

    Labels are the ids, -100 before a row's first target, and behind its last.
    """
    length = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(row.tokens).long()
        count = len(tokens)
        ids[place, :count] = tokens
        targets = slice(row.first_target, count if row.stop_target is None else row.stop_target)
        labels[place, targets] = tokens[targets]
        mask[place, :count] = 1
    return ids, labels, mask
