"""Eigenvalue correction of a part's Kronecker preconditioner (EK-FAC; George et al. 2018; Grosse et al. 2023).

K-FAC takes the eigenvalues of the second moment H of a layer's gradients to be products of its factors' eigenvalues.
EK-FAC keeps the eigenvectors and measures: the eigenvalue of a pair of directions is the mean square of the gradient's
number there. Of each axis the part keeps the leading directions; all others together count as one, as in the factors.

Legend: O, I axes of a gradient matrix, K, J leading directions of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ghoststore.progress import Task
from indexer.encode.tokens import Row
from indexer.projection.blocks import Block
from indexer.projection.kfac import KroneckerPreconditioner
from query.exact.layer_gradients import Half, Passes


class _Corners(NamedTuple):
    """A gradient matrix in four: leading × leading, leading × other, other × leading, and other × other directions."""

    both_KJ: Tensor
    out_KI: Tensor
    in_OJ: Tensor
    rest_OI: Tensor


@dataclass(frozen=True, slots=True)
class _Basis:
    """The leading directions of the output (K, O) and the input axis (J, I)."""

    out_KO: Tensor
    in_JI: Tensor

    def corners(self, g_OI: Tensor) -> _Corners:
        """The parts of one gradient matrix, or of each of (b, O, I)."""
        out_KI, in_OJ = self.out_KO @ g_OI, g_OI @ self.in_JI.t()
        both_KJ = out_KI @ self.in_JI.t()
        out_KI = out_KI - both_KJ @ self.in_JI
        rest_OI = g_OI - in_OJ @ self.in_JI - self.out_KO.t() @ out_KI
        return _Corners(both_KJ, out_KI, in_OJ - self.out_KO.t() @ both_KJ, rest_OI)


class _Moments(NamedTuple):
    """The mean squares of the numbers of the four corners: one for each leading direction, or pair of them."""

    both_KJ: Tensor
    out_K1: Tensor
    in_1J: Tensor
    rest: Tensor


def eigen_corrected(
    passes: Passes, preconditioner: KroneckerPreconditioner, rows: Sequence[Row], damping: float, task: Task
) -> Half:
    """The metric whose eigenvalues are measured on ``rows``, in one pass. ``damping`` is relative to the mean of H.

    Memory: (K + 1)·(J + 1) numbers a block.
    """
    blocks, device = passes.layers.blocks, passes.layers.device
    bases = [_basis(preconditioner, block, device) for block in blocks]
    sums: list[_Moments | None] = [None] * len(blocks)

    def see(place: int, samples: Tensor, matrices: Tensor) -> None:
        corners = bases[place].corners(matrices)
        squares = _Moments(
            corners.both_KJ.square().double().sum(0),
            corners.out_KI.square().double().sum((0, 2)).unsqueeze(1),
            corners.in_OJ.square().double().sum((0, 1)).unsqueeze(0),
            corners.rest_OI.square().double().sum(),
        )
        total = sums[place]
        sums[place] = squares if total is None else _Moments(*(a + b for a, b in zip(total, squares, strict=True)))

    passes.layers.over(rows, see, passes.batch_tokens, task, padding=passes.padding)
    weights = {}
    for block, basis, total in zip(blocks, bases, sums, strict=True):
        assert total is not None
        weights[block.name] = (basis, _weights(block, basis, total, len(rows), damping))

    def half(block: Block, g_OI: Tensor) -> Tensor:
        basis, weight = weights[block.name]
        corners = basis.corners(g_OI)
        leading_KI = (corners.both_KJ * weight.both_KJ.to(g_OI.dtype)) @ basis.in_JI
        leading_KI = leading_KI + corners.out_KI * weight.out_K1.to(g_OI.dtype)
        others_OI = (corners.in_OJ * weight.in_1J.to(g_OI.dtype)) @ basis.in_JI
        return basis.out_KO.t() @ leading_KI + others_OI + corners.rest_OI * weight.rest.to(g_OI.dtype)

    return half


def _basis(preconditioner: KroneckerPreconditioner, block: Block, device: torch.device) -> _Basis:
    f_in, f_out = preconditioner.factors[block.name]
    return _Basis(f_out.vectors.to(device), f_in.vectors.to(device))


def _weights(block: Block, basis: _Basis, squares: _Moments, rows: int, damping: float) -> _Moments:
    """(mean square + damping × mean of all)^-½ for each corner."""
    k, j = len(basis.out_KO), len(basis.in_JI)
    others_out, others_in = max(1, block.n_out - k), max(1, block.n_in - j)
    total = sum(float(square.sum()) for square in squares)
    floor = damping * total / (rows * block.n_out * block.n_in)
    sizes = (1, others_in, others_out, others_out * others_in)
    return _Moments(*((square / (rows * size) + floor).rsqrt() for square, size in zip(squares, sizes, strict=True)))
