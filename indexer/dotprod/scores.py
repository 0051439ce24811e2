"""What the engine gives for one batch.

Legend: B samples of a batch, G val groups, D numbers of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What :meth:`GradDotProdEngine.collect` gives for one batch; float64 on the model's device."""

    total: Tensor
    """(B,): ⟨∇ℓ_i, ∇L_val⟩ in the metric asked for, L_val the mean over all val samples. NaN where a sample has no
    share in the loss, or the optimizer no metric yet; not finite where the batch's gradients left float16's range.
    """
    groups: Tensor
    """(B, G): against the mean of each val group; one column without groups."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """(B,) by parameter; they sum to ``total``. Empty in the sketched mode."""
    blocks: dict[str, Tensor] = field(default_factory=dict)
    """(B,) by module that owns the parameters (a tied parameter: the first). Empty under a global sketch."""
    pairs: Tensor | None = None
    """(B, B): ⟨∇ℓ_i, ∇ℓ_j⟩, where asked for."""
    vectors: Tensor | None = None
    """(B, D) float32: projected gradients of the samples, in the sketched mode, and where they are kept."""
    val_vector: Tensor | None = None
    """(D,) float64: that of the val gradient, without a metric, where there are ``vectors`` and val samples."""
    val_age: int = 0
    """Optimizer steps since the val gradient was computed."""
    seconds: float = 0.0
    """Time spent on scoring in this batch, val pass included (host time)."""


def divide(value: Tensor, scale_B: Tensor) -> Tensor:
    """``value`` (B, …) float64 divided by the scale of each sample; NaN where a sample has no share in the loss."""
    return value / scale_B.masked_fill(scale_B == 0, torch.nan).unsqueeze(1)
