"""The leading directions of a val gradient, in its place: two thin products instead of one with the whole matrix.

The gradient of a matrix over a handful of val samples is nearly of low rank. Random projections with one power
iteration find its range (Halko, Martinsson, Tropp 2011, algorithm 4.4), and what is left out is measured: where it is
too much, the whole gradient is used.

Legend: B samples, M positions, R and C rows and columns of the parameter as it is stored, G val gradients, K
directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from indexer.dotprod.routes import product_dtype
from indexer.layers.base import at_least_float
from indexer.layers.factors import Outer

DIRECTIONS = 64
"""Directions of a val gradient that are used."""
LEFT_OUT = 0.01
"""Largest share of a val gradient's squared length outside them. Scores are off by far less: what is left out of a val
gradient has little to do with the gradients of samples (docs/scores.md).
"""
PASSES = 4
"""Products with the whole gradient that finding the directions takes."""
SHIFT = 1e-12
"""Added to a Gram matrix, relative to its trace, so that it has a Cholesky factor (Fukaya et al. 2020)."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """G matrices (R, C), each rows · columnsᵀ."""

    rows_GRK: Tensor
    columns_GCK: Tensor

    def dense(self) -> Tensor:
        """(G, R, C): the matrices."""
        return self.rows_GRK @ self.columns_GCK.transpose(1, 2)


def low_rank(gradients: Sequence[Tensor]) -> list[LowRank | None]:
    """The leading directions of the val gradients of each parameter, (G, R, C); None where they leave out more than
    LEFT_OUT of one. R and C are larger than DIRECTIONS.

    The random start is always the same, so equal gradients give equal results on one kind of device.
    """
    if not gradients:
        return []
    tall = [
        gradient if gradient.shape[0] >= gradient.shape[1] else gradient.t()
        for gradient_GRC in gradients
        for gradient in gradient_GRC
    ]
    starts = {matrix.shape: _start(matrix) for matrix in tall}
    bases = _orthonormal([matrix.t() @ starts[matrix.shape] for matrix in tall])
    bases = _orthonormal([matrix.t() @ (matrix @ basis) for matrix, basis in zip(tall, bases, strict=True)])
    along = [matrix @ basis for matrix, basis in zip(tall, bases, strict=True)]
    whole, inside = (torch.stack([x.square().sum(dtype=torch.float64) for x in of]) for of in (tall, along))
    close = iter((whole - inside <= LEFT_OUT * whole).tolist())  # one wait for the device
    pairs = iter(zip(along, bases, strict=True))
    found: list[LowRank | None] = []
    for gradient_GRC in gradients:
        is_tall = gradient_GRC.shape[1] >= gradient_GRC.shape[2]
        sides = [pair if is_tall else pair[::-1] for _, pair in zip(gradient_GRC, pairs, strict=False)]
        enough = [next(close) for _ in sides]
        found.append(LowRank(*(torch.stack(side) for side in zip(*sides, strict=True))) if all(enough) else None)
    return found


def _start(tall: Tensor) -> Tensor:
    generator = torch.Generator(tall.device).manual_seed(0)
    return torch.randn(len(tall), DIRECTIONS, generator=generator, device=tall.device, dtype=tall.dtype)


def _orthonormal(spans: list[Tensor]) -> list[Tensor]:
    """Nearly orthonormal columns with the span of each of ``spans`` (N, K). Those that add next to nothing are shorter.

    By a Cholesky factorisation of all of them at once: one QR after the other would keep a GPU waiting.
    """
    wide = [span.double() for span in spans]
    gram_PKK = torch.stack([span.t() @ span for span in wide])
    trace_P = gram_PKK.diagonal(dim1=1, dim2=2).sum(1)
    eye_KK = torch.eye(DIRECTIONS, dtype=torch.float64, device=gram_PKK.device)
    shift_P11 = (SHIFT * trace_P + torch.finfo(torch.float64).tiny).view(-1, 1, 1)  # a gradient may be zero
    factor_PKK = torch.linalg.cholesky_ex(gram_PKK + shift_P11 * eye_KK).L
    inverse_PKK = torch.linalg.solve_triangular(factor_PKK, eye_KK.expand_as(factor_PKK), upper=False)
    return [(x @ inverse.t()).to(span.dtype) for x, inverse, span in zip(wide, inverse_PKK, spans, strict=True)]


def low_rank_dots(factors: Outer, val: LowRank) -> Tensor:
    """(B, G), at least float32: inner products of each sample's gradient with the G val gradients."""
    dtype = product_dtype(factors.columns.dtype)
    columns = factors.columns.to(dtype)
    dots = []
    for rows_RK, columns_CK in zip(val.rows_GRK, val.columns_GCK, strict=True):
        if factors.is_lookup:
            left = torch.nn.functional.embedding(factors.rows, rows_RK)
        else:
            left = factors.rows.to(dtype) @ rows_RK.to(dtype)
        right = columns @ columns_CK.to(dtype)
        dots.append(torch.linalg.vecdot(at_least_float(left).flatten(1), at_least_float(right).flatten(1)))
    return torch.stack(dots, dim=1)


def low_rank_flops(shape: torch.Size, *, tokens: int, val_tokens: int, groups: int, interval: int) -> float:
    """Multiply-adds of a step: two thin products, and its share of forming the val gradients and their directions."""
    thin = groups * DIRECTIONS * (shape[0] + shape[1])
    found = (val_tokens + groups * PASSES * DIRECTIONS) * shape.numel()
    return tokens * thin + found / interval
