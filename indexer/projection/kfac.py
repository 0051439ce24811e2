"""The Kronecker preconditioner of a build: a metric of gradients in which common directions weigh less.

Most of a gradient's length lies in a few directions that all samples share; the other directions distinguish samples.
With H the second moment of a layer's gradients, influence functions score with gᵀ (H + λ)⁻¹ g' (Koh, Liang 2017). H is
as large as the layer squared; K-FAC keeps one factor for each side (Martens, Grosse 2015; George et al. 2018): with
gradient matrices G, H ≈ E[G Gᵀ] ⊗ E[Gᵀ G] / E|G|². A build multiplies the two sides of the projection with the inverse
square roots of the damped factors. Then plain inner products of vectors are these scores, and a query inverts nothing.

Of each factor only the leading eigenvectors are kept; all others count with their mean eigenvalue.

Legend: O, I axes of a gradient matrix, n either of them, m eigenvectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_DIRECTIONS = 128
"""Most eigenvectors m that are kept for an axis."""


@dataclass(frozen=True, slots=True)
class MomentFactor:
    """A symmetric positive (n, n) matrix F, represented by its leading eigenvectors."""

    vectors: Tensor
    """(m, n) float32, orthonormal rows, the largest eigenvalue first."""
    values: Tensor
    """(m,) float32 eigenvalues, at least 0."""
    rest: float
    """The mean of the other n - m eigenvalues; 0 if there are none."""

    @property
    def mean(self) -> float:
        """The mean eigenvalue."""
        m, n = self.vectors.shape
        return (float(self.values.double().sum()) + self.rest * (n - m)) / n

    def root_times(self, rows_RN: Tensor, damping: float) -> Tensor:
        """(R, n): each row times (F / mean + damping)^-½, computed in float64, in the dtype of ``rows_RN``."""
        mean = self.mean
        inner = (self.values.double() / mean + damping).rsqrt()
        outer = (self.rest / mean + damping) ** -0.5
        vectors, rows = self.vectors.double().to(rows_RN.device), rows_RN.double()
        scaled = rows * outer + ((rows @ vectors.t()) * (inner.to(rows.device) - outer)) @ vectors
        return torch.as_tensor(scaled.to(rows_RN.dtype))

    def count(self, damping: float) -> float:
        """How many directions are left: the trace of (F / mean) · (F / mean + damping)⁻¹."""
        m, n = self.vectors.shape
        values, rest = self.values.double() / self.mean, self.rest / self.mean
        return float((values / (values + damping)).sum()) + (n - m) * rest / (rest + damping)

    def trace_with(self, rows_RN: Tensor) -> float:
        """The trace of ``rows`` F ``rows``ᵀ."""
        rows = rows_RN.double().cpu()
        inner = (rows @ self.vectors.double().t()).square().sum(0)
        outside = max(0.0, float(rows.square().sum() - inner.sum()))
        return float(inner @ self.values.double()) + outside * self.rest

    def leading(self) -> MomentFactor:
        """This factor with only as many eigenvectors as a part keeps: see :func:`directions`."""
        m, n = self.vectors.shape
        most = directions(n)
        if m <= most:
            return self
        others = float(self.values[most:].double().sum()) + self.rest * (n - m)
        return MomentFactor(self.vectors[:most], self.values[:most], others / (n - most))

    def flat(self) -> Tensor:
        """(:func:`flat_length`,): values, rest and vectors, one after the other."""
        return torch.cat([self.values, torch.tensor([self.rest]), self.vectors.flatten()])

    @classmethod
    def of_flat(cls, numbers: Tensor, n: int) -> MomentFactor:
        """The inverse of :meth:`flat`."""
        m = directions(n)
        values, rest, vectors = torch.split(numbers, [m, 1, m * n])
        return cls(vectors.view(m, n), values, float(rest))


def directions(n: int) -> int:
    """m, the number of eigenvectors that are kept for an axis of length ``n``."""
    return min(n, MOST_DIRECTIONS)


def flat_length(n: int) -> int:
    """The length of :meth:`MomentFactor.flat` for an axis of length ``n``."""
    return directions(n) * (n + 1) + 1


@dataclass(frozen=True, slots=True)
class KroneckerPreconditioner:
    """The factors of all layers of a projection, and the damping."""

    factors: Mapping[str, tuple[MomentFactor, MomentFactor]]
    """(factor of the input side (I), of the output side (O)) by block name. The trace of each is E|G|²."""
    damping: float

    def scale(self, name: str) -> float:
        """The scalar part of H^-½, beside the inverse roots of the normalised factors: (mean square of G's
        numbers)^-½.
        """
        f_in, f_out = self.factors[name]
        return float((f_out.mean / f_in.vectors.shape[1]) ** -0.5)

    def sides(self, name: str, p_in: Tensor, p_out: Tensor) -> tuple[Tensor, Tensor]:
        """``p_in`` (J, I) and ``p_out`` (K, O), multiplied so that they project gradients in the metric."""
        f_in, f_out = self.factors[name]
        return f_in.root_times(p_in, self.damping), f_out.root_times(p_out, self.damping) * self.scale(name)

    def mean_square(self, name: str, side_in: Tensor, side_out: Tensor) -> float:
        """The mean square of the numbers of a layer's block under ``sides``, if H is what its factors say."""
        f_in, f_out = self.factors[name]
        size = f_out.mean * f_out.vectors.shape[1]
        energy = f_in.trace_with(side_in) * f_out.trace_with(side_out) / size
        return energy / (len(side_in) * len(side_out))

    def directions(self) -> float:
        """The mean squared length of a gradient of all layers in the metric, if H is what its factors say: how many
        directions it has, those that damping takes for noise left out.
        """
        return sum(f_in.count(self.damping) * f_out.count(self.damping) for f_in, f_out in self.factors.values())

    def matrix(self, name: str, g_OI: Tensor) -> Tensor:
        """(O, I): the gradient matrix ``g_OI`` in the metric. Inner products of two such matrices are the scores."""
        f_in, f_out = self.factors[name]
        half_OI = f_in.root_times(g_OI, self.damping)
        return f_out.root_times(half_OI.t(), self.damping).t() * self.scale(name)

    def digest(self) -> str:
        """The SHA-256 of the damping and all factors, as ``sha256:…``."""
        digest = hashlib.sha256(json.dumps([self.damping, list(self.factors)]).encode())
        for pair in self.factors.values():
            for factor in pair:
                digest.update(factor.flat().numpy().astype("<f4", copy=False).tobytes())
        return f"sha256:{digest.hexdigest()}"
