"""The scores of one batch.

Legend: B samples of a batch, G val groups, D numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The result of :meth:`GradDotProdEngine.collect` for one batch; float64 on the model's device."""

    total: Tensor
    """(B,): ⟨∇ℓ_i, ∇L_val⟩ in the chosen metric, L_val the mean over all val samples.

    NaN if a sample has no share in the loss, or the optimizer no metric yet. Not finite if the batch's gradients
    overflowed in float16.
    """
    groups: Tensor
    """(B, G): against the mean of each val group; one column without groups."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """(B,) by parameter; they sum to ``total``. Empty in the sketched mode."""
    blocks: dict[str, Tensor] = field(default_factory=dict)
    """(B,) by the module that owns the parameters, the first of a tied parameter. Empty under a global sketch."""
    pairs: Tensor | None = None
    """(B, B): ⟨∇ℓ_i, ∇ℓ_j⟩; None without ``pairs``."""
    vectors: Tensor | None = None
    """(B, D) float32: projected gradients of the samples; None without ``projection`` and ``keep``."""
    val_vector: Tensor | None = None
    """(D,) float64: the projected val gradient, without a metric; None without ``vectors`` or val samples."""
    val_age: int = 0
    """Optimizer steps since the val gradient was computed."""
    seconds: float = 0.0
    """Host time spent on scoring in this batch, with the val pass."""


def divide(value: Tensor, scale_B: Tensor) -> Tensor:
    """Divide ``value`` (B, …) float64 by the scale of each sample. NaN if a sample has no share in the loss."""
    return value / scale_B.masked_fill(scale_B == 0, torch.nan).unsqueeze(1)
