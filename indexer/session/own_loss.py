"""The loss that a causal language model returns by itself: where it is, and what it is of.

Legend: B samples of a micro-batch, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from indexer.dotprod import target_counts
from indexer.dotprod.fused_head import mean_loss, token_log_probs
from indexer.dotprod.segments import Segments


class OwnLoss(NamedTuple):
    """A loss Σ_i weights[i]·ℓ_i, ℓ_i the mean over sample i's own targets."""

    loss: Tensor
    labels: Tensor
    """(B, T)."""
    weights: Tensor
    """(B,) float64."""
    divisor: float
    """What the sum over targets was divided by: the targets of the batch, or of the whole step."""
    log_probs: Tensor | None = None
    """(B, T - 1) of a fused head: the loss that goes backward is computed from them outside the model."""


def own_loss(output: Any, labels_BT: Any, items: Any = None, segments: Segments | None = None) -> OwnLoss | None:
    """What the loss in a model's ``output`` is of, if it is what it should be: the engine's watch() holds it against
    the logits. ``items`` is ``num_items_in_batch``, where the model was given it; ``segments`` those of packed rows. Of
    a fused head it is the mean of its log-probabilities.

    None where the model returned no loss that goes through a backward pass, or was given no labels of tokens.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(labels_BT, Tensor) or labels_BT.dim() != 2:
        return None
    log_probs = token_log_probs(output)
    if log_probs is not None:
        loss, items = mean_loss(log_probs, labels_BT), None
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return None
    counts_B = target_counts(labels_BT) if segments is None else segments.target_counts(labels_BT)
    counts_B = counts_B.to(loss.device).double()
    divisor = float(counts_B.sum().clamp_min(1) if items is None else items)
    return OwnLoss(loss, labels_BT, counts_B / divisor, divisor, log_probs)


def tokens_in(kwargs: Mapping[str, Any]) -> int:
    """Tokens of a language model's batch, without padding where there is a mask to tell."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int((mask != 0).sum())
    return ids.numel() if isinstance(ids, Tensor) else 0
