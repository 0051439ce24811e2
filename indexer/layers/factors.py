"""Factors of each sample's gradient of one parameter, for exact inner products without forming the gradient.

Legend: B samples, M positions of one sample, R and C rows and columns of the parameter as it is stored, N its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outer:
    """The gradients Σ_m rows_m columns_mᵀ of a matrix (R, C), one for each sample."""

    rows: Tensor
    """(B, M, R); or (B, M) int64 indexes of one-hot rows (an embedding's ids)."""
    columns: Tensor
    """(B, M, C)."""

    @property
    def is_lookup(self) -> bool:
        """Whether ``rows`` are indexes."""
        return self.rows.dim() == 2

    def of(self, samples: Tensor | slice) -> Outer:
        """The factors of some samples."""
        return Outer(self.rows[samples], self.columns[samples])


@dataclass(frozen=True, slots=True)
class Vector:
    """The gradients of a vector, which are formed: (B, N) float32 (float64 for a float64 model)."""

    values: Tensor

    def of(self, samples: Tensor | slice) -> Vector:
        """The gradients of some samples."""
        return Vector(self.values[samples])


Factors: TypeAlias = Outer | Vector


def summed_gradient(factors: Factors, like: Tensor) -> Tensor:
    """The gradient of all samples together, at least float32, of a parameter of the shape of ``like``."""
    if isinstance(factors, Vector):
        return factors.values.sum(0).view_as(like)
    columns = factors.columns.flatten(0, 1).to(torch.promote_types(like.dtype, torch.float32))
    if not factors.is_lookup:
        return factors.rows.flatten(0, 1).to(columns.dtype).t() @ columns
    into = torch.zeros(like.shape, dtype=columns.dtype, device=columns.device)
    add_rows(into, factors.rows.flatten(), columns)
    return into


def add_rows(into: Tensor, rows_N: Tensor, values_NK: Tensor) -> None:
    """Add each value to its row of ``into``, in place, in the same order in every run.

    On a GPU ``index_add_`` adds with atomics, in any order; ``index_put_`` sorts.
    """
    if into.is_cuda:
        into.index_put_((rows_N,), values_NK, accumulate=True)
    else:
        into.index_add_(0, rows_N, values_NK)
