"""A sample's gradient of one parameter, not formed: what exact inner products are made of.

Legend: B samples, M positions of one sample, R and C rows and columns of the parameter as it is stored, N its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outer:
    """Gradients Σ_m rows_m columns_mᵀ of a matrix (R, C), one a sample."""

    rows: Tensor
    """(B, M, R); or (B, M) int64 where each row factor is one-hot, given by its place (an embedding's ids)."""
    columns: Tensor
    """(B, M, C)."""

    @property
    def is_lookup(self) -> bool:
        """Whether ``rows`` are places."""
        return self.rows.dim() == 2

    def of(self, samples: Tensor | slice) -> Outer:
        """Of some samples alone."""
        return Outer(self.rows[samples], self.columns[samples])


@dataclass(frozen=True, slots=True)
class Vector:
    """Gradients of a vector, formed: (B, N) float32 (float64 for a float64 model)."""

    values: Tensor

    def of(self, samples: Tensor | slice) -> Vector:
        """Of some samples alone."""
        return Vector(self.values[samples])


Factors: TypeAlias = Outer | Vector
