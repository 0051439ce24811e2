"""Val batches: their form, their number of samples, and the loss of each sample.

Legend: B samples of a batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from indexer.encode.losses import next_token_losses, next_token_losses_plainly
from indexer.encode.modes import forward_options

ValLosses = Callable[[nn.Module, Any], Tensor]
"""(model, val batch) to the loss of each of its samples, (samples of the batch,)."""


class ValLossError(UsageError):
    """Val samples whose loss is not finite: ``indexes`` are their places in the order of the val batches."""

    def __init__(self, indexes: list[int], named: list[str] | None = None) -> None:
        self.indexes = indexes
        which = indexes[:5] if named is None else ", ".join(named[:5])
        super().__init__(f"the loss of val sample(s) {which} is not finite; leave them out of the val set")


def language_model_losses(model: nn.Module, batch: Any) -> Tensor:
    """(B,): mean next-token loss of each sample of a val batch; NaN if a sample has no target.

    ``batch`` is a mapping with input_ids, labels and optionally attention_mask, or a tuple of them in that order.
    Labels are the input ids, -100 where a token is no target. A loss of 0 without targets would dilute the mean.
    """
    if not isinstance(batch, Mapping):
        batch = dict(zip(("input_ids", "labels", "attention_mask"), batch, strict=False))
    batch = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    labels = batch.pop("labels")
    logits = model(**batch, **forward_options(model)).logits  # RWKV's cache is written in place
    # The fast form computes its gradient before the loss scale is applied, and float16 needs the scale.
    form = next_token_losses_plainly if computes_in_float16(model) else next_token_losses
    losses_B, targets_B = form(logits, labels)
    absent_B = targets_B == 0
    return losses_B.masked_fill(absent_B, torch.nan) if bool(absent_B.any()) else losses_B


def computes_in_float16(model: nn.Module) -> bool:
    """Whether the weights or the autocast are float16."""
    first = next(model.parameters())
    kind = first.device.type
    return first.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )


def target_counts(labels_BT: Tensor) -> Tensor:
    """(B,) int64: targets of each sample under the next-token shift."""
    return (labels_BT[:, 1:] != -100).sum(1)


def batches_of(val_data: Any) -> list[Any]:
    """The val set as a list of batches; empty for None. UsageError for an empty list."""
    if val_data is None:
        return []
    batches = val_data if isinstance(val_data, list) else [val_data]
    if not batches:
        raise UsageError("the val set has no samples")
    return batches


def size_of(batch: Any) -> int:
    """Samples in a val batch: the length of its first tensor. UsageError if it holds no tensor."""
    first = batch
    while not isinstance(first, Tensor):
        if isinstance(first, Mapping) and len(first):
            first = next(iter(first.values()))
        elif isinstance(first, Sequence) and not isinstance(first, str | bytes) and len(first):
            first = first[0]
        else:
            raise UsageError(
                f"a val batch holds tensors whose first axis is the samples, and not a {type(batch).__name__}"
            )
    return len(first)


def target_losses(model: nn.Module, batch: Any) -> Tensor:
    """(B,): mean loss of each sample of a val batch of nanoGPT's form, (tokens, targets); NaN without a target.

    ``model(tokens, targets)`` returns (logits, loss). Targets stand at the place of the token before them, and are -1
    where there is none.
    """
    device = next(model.parameters()).device
    tokens, targets_BT = (tensor.to(device) for tensor in batch)
    logits_BTV = model(tokens, targets_BT)[0]
    losses_BT = torch.nn.functional.cross_entropy(
        logits_BTV.float().transpose(1, 2), targets_BT, ignore_index=-1, reduction="none"
    )
    counts_B = (targets_BT != -1).sum(1)
    means_B: Tensor = losses_BT.sum(1) / counts_B.clamp_min(1)
    return means_B.masked_fill(counts_B == 0, torch.nan)


def default_losses(model: nn.Module) -> ValLosses:
    """:func:`language_model_losses`; :func:`target_losses` for a model whose forward takes ``targets``, as nanoGPT's.

    UsageError for any other model that is no language model of transformers.
    """
    if hasattr(model, "get_output_embeddings"):
        return language_model_losses
    if "targets" in inspect.signature(model.forward).parameters:
        return target_losses
    raise UsageError(
        f"{type(model).__name__} is not a language model of transformers: give `val_losses=f`, where f(model, "
        "batch) is the loss of each sample of a val batch, shape (samples,)"
    )
