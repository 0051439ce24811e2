"""The loss that a causal language model returns by itself: what it is of, held once against the plain form.

Legend: B samples of a micro-batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghoststore.errors import UsageError
from indexer.dotprod import target_counts
from indexer.losses import next_token_losses_plainly

TOLERANCE = 1e-2
"""Relative; a model may compute its loss in bfloat16."""


class OwnLoss(NamedTuple):
    """A loss Σ_i weights[i]·ℓ_i, ℓ_i the mean over sample i's own targets."""

    loss: Tensor
    weights: Tensor
    """(B,) float64."""
    divisor: float
    """What the sum over targets was divided by: the targets of the batch, or of the whole step."""


def loss_in(output: Any) -> Tensor | None:
    """The loss in a model's output, if it has one that goes through a backward pass."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def tokens_in(kwargs: Mapping[str, Any]) -> int:
    """Tokens of a language model's batch, without padding where there is a mask to tell."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int((mask != 0).sum())
    return ids.numel() if isinstance(ids, Tensor) else 0


class OwnLosses:
    """Reads the losses of one model, and holds the first against next-token cross-entropy."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._checked = False

    def read(self, output: Any, loss: Tensor, labels_BT: Tensor, items: Any = None) -> OwnLoss:
        """What ``loss`` is of. ``items`` is ``num_items_in_batch``, where the model was given it.

        UsageError, in the first batch with targets, if the loss is not Σ of next-token losses over targets ÷ their
        number: then nothing is known of its samples' shares.
        """
        counts_B = target_counts(labels_BT).to(loss.device).double()
        divisor = float(counts_B.sum().clamp_min(1) if items is None else items)
        if not self._checked and bool(torch.isfinite(loss.detach())) and bool(counts_B.any()):
            self._check(output, float(loss.detach()), labels_BT, divisor)
            self._checked = True
        return OwnLoss(loss, counts_B / divisor, divisor)

    def _check(self, output: Any, loss: float, labels_BT: Tensor, divisor: float) -> None:
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            return  # a fused loss; the engine holds its gradient against autograd's
        expected = float("nan")
        if logits.shape[:-1] == labels_BT.shape:
            with torch.no_grad(), torch.autocast(device_type=logits.device.type, enabled=False):
                sums_B, _ = next_token_losses_plainly(logits.detach(), labels_BT.to(logits.device), reduction="sum")
            expected = float(sums_B.double().sum()) / divisor
        if not abs(loss - expected) <= TOLERANCE * abs(expected) + 1e-6:
            raise UsageError(
                f"the loss that {self._model} returns ({loss:.6g}) is not the mean next-token loss over the targets "
                f"in its labels ({expected:.6g}), so the share of each sample in it is not known; "
                "compute one from the logits (no labels for the model), and say what it is of: watch(loss, weights=…)"
            )
