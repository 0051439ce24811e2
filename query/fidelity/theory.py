"""The theoretical error of inner products after a random projection, to draw beside the measured one.

Dense gaussian projection to k numbers: Var⟨Pg, Ph⟩ = (|g|²|h|² + ⟨g,h⟩²) / k, so the mean error of nearly orthogonal
vectors is √(2 / (πk)) |g||h|.

Kronecker projection P_out G P_inᵀ of gradient matrices, both gaussian, a = 1/k_in and b = 1/k_out (0 for an axis that
is not projected). Taking E[B X B] = X + a (Xᵀ + tr(X) I) for the Wishart matrix B = P_inᵀ P_in, and the same for P_out:

    Var = (a + b) tr((HᵀG)²) + a |HᵀG|² + b |GHᵀ|² + ab (|HᵀG|² + |GHᵀ|² + |G|²|H|² + ⟨G,H⟩²)

For G = H of rank one and length 1 this is (1 + 2a)(1 + 2b) - 1. Blocks are drawn independently: variances add up. A
sketch to K numbers after it adds about (|g|²|h|² + ⟨g,h⟩² + Var) / K.

Legend: O, I axes of a gradient matrix; k numbers of a projected vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MEAN_OF_NORMAL = math.sqrt(2 / math.pi)
"""Mean magnitude of a standard normal number."""


def dense_error(k: int, reference: int | None = None) -> float:
    """Mean |error| ÷ (|g||h|) of a dense gaussian projection to ``k`` numbers, for nearly orthogonal vectors.

    With ``reference`` the error is measured against another such projection, to that many numbers, instead of against
    the exact product.
    """
    return MEAN_OF_NORMAL * math.sqrt(1 / k + (0 if reference is None else 1 / reference))


@dataclass(frozen=True, slots=True)
class BlockMoments:
    """The numbers of one block of a pair of gradients G, H that the variance depends on."""

    dot: float
    """⟨G,H⟩."""
    squares: float
    """|G|²|H|²."""
    trace: float
    """tr((HᵀG)²)."""
    inner: float
    """|HᵀG|²."""
    outer: float
    """|GHᵀ|²."""
    shape: tuple[int, int]
    """(O, I)."""

    @classmethod
    def of(cls, first_OI: Tensor, second_OI: Tensor) -> BlockMoments:
        """The moments in float64. Memory: three matrices whose sides are the shorter axis."""
        g, h = first_OI.double(), second_OI.double()
        flip = g.shape[0] > g.shape[1]
        if flip:
            g, h = g.t(), h.t()
        cross = g @ h.t()
        straight = float(cross.square().sum())
        grams = float(((g @ g.t()) * (h @ h.t())).sum())
        return cls(
            dot=float((g * h).sum()),
            squares=float(g.square().sum() * h.square().sum()),
            trace=float((cross * cross.t()).sum()),
            inner=straight if flip else grams,
            outer=grams if flip else straight,
            shape=(first_OI.shape[0], first_OI.shape[1]),
        )

    def variance(self, k_out: int, k_in: int) -> float:
        """The variance of the block's inner product after a gaussian Kronecker projection to (k_out, k_in)."""
        a = 0.0 if k_in == self.shape[1] else 1 / k_in
        b = 0.0 if k_out == self.shape[0] else 1 / k_out
        cross_terms = self.inner + self.outer + self.squares + self.dot**2
        return (a + b) * self.trace + a * self.inner + b * self.outer + a * b * cross_terms


@dataclass(frozen=True, slots=True)
class PairMoments:
    """The moments of one pair of gradients, block by block."""

    blocks: list[BlockMoments]
    lengths: float
    """|g||h| over all blocks."""

    @classmethod
    def of(cls, first: Sequence[Tensor], second: Sequence[Tensor]) -> PairMoments:
        """``first`` and ``second``: the gradient matrices of two samples, block by block."""
        squares = [sum(float(m.square().sum(dtype=torch.float64)) for m in matrices) for matrices in (first, second)]
        blocks = [BlockMoments.of(g, h) for g, h in zip(first, second, strict=True)]
        return cls(blocks, math.sqrt(squares[0] * squares[1]))

    def root_variance(self, ranks: Sequence[tuple[int, int]], compress: int | None) -> float:
        """Standard deviation of the inner product ÷ (|g||h|), for blocks of (k_out, k_in) numbers."""
        variance = sum(block.variance(*rank) for block, rank in zip(self.blocks, ranks, strict=True))
        if compress is not None:
            dot = sum(block.dot for block in self.blocks)
            variance += (self.lengths**2 + dot**2 + variance) / compress
        return math.sqrt(max(variance, 0.0)) / self.lengths if self.lengths else 0.0


def kronecker_error(pairs: Sequence[PairMoments], ranks: Sequence[tuple[int, int]], compress: int | None) -> float:
    """Theoretical root mean square error ÷ (|g||h|) over ``pairs``, for blocks of ``ranks`` (k_out, k_in) and a sketch
    to ``compress`` numbers (None: no sketch).
    """
    return math.sqrt(sum(pair.root_variance(ranks, compress) ** 2 for pair in pairs) / len(pairs))
