"""Preconditioning by the second moment of the stored rows: scores qᵀ (H + λI)⁻¹ g in place of qᵀ g.

H = E[g gᵀ] over the usable rows of a part, one matrix for each block. One scan computes it, and it is cached beside the
part. It is the empirical Fisher in the projected space (LogIX, Choe et al. 2024, section 3; TRAK, Park et al. 2023,
eq. 15). λ is ``damping`` times the mean eigenvalue of H over all blocks. As λ → ∞ the ranking becomes that of the plain
scores, which are then scaled by 1/λ.

Legend: Q queries, R rows of a chunk, N rows of the part, D numbers of a vector, K numbers of a block, G blocks.
"""

from __future__ import annotations

import math
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.store import Part
from query.search.part_cache import PartCache, keep_newest
from query.search.vectors import PartVectors

DEFAULT_DAMPING = 0.1
ENOUGH_ROWS = 5
"""Rows for each number of a block that make a second moment good enough for little damping."""
LARGEST_BLOCK = 16_384
"""Most numbers of a block: its matrix then takes 2 GiB."""
DAMPINGS_KEPT = 3
"""Number of dampings whose self-influences stay in the cache, the newest ones."""


@dataclass(frozen=True, slots=True)
class SecondMoment:
    """H of one part, block by block."""

    blocks: list[Tensor]
    """G matrices (K, K), float64 on the CPU."""
    rows: int
    """Number of usable rows that it is the mean of."""

    @property
    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue over all blocks: the mean of the squared numbers of a vector."""
        return float(sum(block.trace() for block in self.blocks) / sum(len(block) for block in self.blocks))

    @classmethod
    def of(cls, part: Part, progress: Progress, device: str = "cpu") -> SecondMoment:
        """The second moment of ``part``: from the cache if that covers what is committed, else by a scan, then cached.

        UsageError for a block with more than ``LARGEST_BLOCK`` numbers, and for a part without a usable row other than
        zero.
        """
        widest = max(stop - start for _, start, stop in part.groups)
        if widest > LARGEST_BLOCK:
            raise UsageError(
                f"`precondition=second-moment`: part {part.name!r} has a block of {widest:,} numbers; a matrix of at "
                f"most {LARGEST_BLOCK:,} × {LARGEST_BLOCK:,} is made. Build a part with a sketch of each layer "
                "(`ghoststore build --proj-compress-by layer`), a smaller one (`ghoststore build --proj-compress`), or "
                "plain blocks (`ghoststore build --proj-rank-total`)"
            )
        cache = PartCache(part, "second_moment", progress)
        sizes = [stop - start for _, start, stop in part.groups]
        cached = cache.tensors({f"{place}": (size, size) for place, size in enumerate(sizes)} | {"rows": ()})
        if cached is not None:
            return cls([cached[f"{place}"] for place in range(len(part.groups))], int(cached["rows"]))
        moment = cls.scan(part, progress, device)
        tensors = {f"{place}": block for place, block in enumerate(moment.blocks)}
        cache.keep({**tensors, "rows": torch.tensor(moment.rows)})
        return moment

    @classmethod
    def scan(cls, part: Part, progress: Progress, device: str = "cpu") -> SecondMoment:
        """The second moment by one pass over the usable rows, in float64.

        Cost: R·ΣK² multiplications a chunk. Memory: the matrices and one chunk.
        """
        target = torch.device(device)
        groups = part.groups
        sums = [
            torch.zeros(stop - start, stop - start, dtype=torch.float64, device=target) for _, start, stop in groups
        ]
        usable, rows, read = torch.from_numpy(part.usable()), 0, 0
        with closing(progress.task("second moment", part.rows)) as task:
            for chunk in PartVectors(part, target).stream():
                rows_RD = chunk.rows_RD[usable[read : read + len(chunk.rows_RD)]].double()
                read += len(chunk.rows_RD)
                for total, (_, start, stop) in zip(sums, groups, strict=True):
                    block_RK = rows_RD[:, start:stop]
                    total.addmm_(block_RK.t(), block_RK)
                rows += len(rows_RD)
                task.advance(chunk.stop - chunk.start)
        moment = cls([total.cpu() / max(rows, 1) for total in sums], rows)
        if not rows or not moment.mean_eigenvalue > 0:
            raise UsageError(
                f"part {part.name!r} has no usable row whose gradient is not zero: nothing to precondition"
            )
        return moment


class DampedInverse:
    """(H + λI)⁻¹ of a part, block by block: scores are qᵀ (H + λI)⁻¹ g instead of qᵀ g.

    UsageError for a damping that is negative or not finite, and where H + λI is singular (for example ``damping`` 0 and
    fewer rows than a block has numbers).
    """

    def __init__(self, part: Part, damping: float, progress: Progress, device: str = "cpu") -> None:
        self.part, self.damping = part, float(checked_damping(damping))
        self._progress, self._device = progress, torch.device(device)
        self.moment = SecondMoment.of(part, progress, device)
        self.strength = self.damping * self.moment.mean_eigenvalue
        """λ."""
        self._factors = [
            self._factor(block, name) for block, (name, _, _) in zip(self.moment.blocks, part.groups, strict=True)
        ]
        self._squares: NDArray[np.float64] | None = None
        widest = max(stop - start for _, start, stop in part.groups)
        if self.moment.rows < ENOUGH_ROWS * widest and self.damping < 1:
            sketched = part.sketched_together
            by_layer = "`ghoststore build --proj-compress-by layer`"
            alternative = f", or a part with a sketch for each layer ({by_layer})" if sketched else ""
            progress.note(
                f"the second moment of {widest:,} numbers is estimated from {self.moment.rows:,} rows: with `damping` "
                f"{self.damping:g} noise may decide; try `damping=1`{alternative}"
            )

    def _factor(self, block_KK: Tensor, name: str) -> Tensor:
        """The Cholesky factor L of H + λI = L Lᵀ, (K, K) float64. UsageError if H + λI is singular."""
        damped = block_KK + self.strength * torch.eye(len(block_KK), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal().square()
        # A pivot as small as rounding errors counts as zero: H + λI is singular.
        if int(failed) or not float(pivots.min()) > len(damped) * 2.0**-52 * float(damped.diagonal().max()):
            raise UsageError(
                f"`damping={self.damping:g}`: the second moment of block {name!r} ({len(block_KK):,} numbers, "
                f"{self.moment.rows:,} rows) is singular, and no inverse of it exists; give a larger `damping` "
                f"({DEFAULT_DAMPING} is the default)"
            )
        return torch.as_tensor(factor)

    def apply(self, vectors_QD: Tensor) -> Tensor:
        """(Q, D) float64: (H + λI)⁻¹ q for each q of ``vectors_QD``."""
        pieces = [
            torch.cholesky_solve(vectors_QD[:, start:stop].double().t(), factor).t()
            for factor, (_, start, stop) in zip(self._factors, self.part.groups, strict=True)
        ]
        return torch.cat(pieces, dim=1)

    def whitened(self, rows_RD: Tensor) -> Tensor:
        """(R, D) float64: L⁻¹ g of each row, block by block. The inner product of two of them is gᵀ (H + λI)⁻¹ g'."""
        wide_RD = rows_RD.double()
        pieces = [
            torch.linalg.solve_triangular(factor.to(wide_RD.device), wide_RD[:, start:stop].t(), upper=False).t()
            for factor, (_, start, stop) in zip(self._factors, self.part.groups, strict=True)
        ]
        return torch.cat(pieces, dim=1)

    def squares_of(self, rows_RD: Tensor) -> Tensor:
        """(R, G): gᵀ (H + λI)⁻¹ g of each row, block by block, float64."""
        square_RD = self.whitened(rows_RD).square_()
        return torch.stack([square_RD[:, start:stop].sum(1) for _, start, stop in self.part.groups], dim=1)

    def squares(self, span: int) -> NDArray[np.float64]:
        """(R, G): :meth:`squares_of` for the rows of a committed span, from the cache."""
        start, stop = self.part.layout.span_of(span)
        return self.self_influence()[start:stop]

    def self_influence(self) -> NDArray[np.float64]:
        """(N, G): gᵀ (H + λI)⁻¹ g of every row, block by block; 0 for rows that are not committed.

        This is the self-influence of a row: its effect on its own loss. One scan computes it, and it is cached for this
        damping.
        """
        if self._squares is None:
            self.part.refuse_hollow()
            cache = PartCache(self.part, f"self_influence-{self.damping!r}", self._progress)
            self._squares = cache.rows((self.part.layout.rows, len(self.part.groups)), self._scan)
            with suppress(OSError):  # the store cannot be written
                keep_newest(self.part, f"self_influence-*{self.part.tag}", DAMPINGS_KEPT)
        return self._squares

    def _scan(self, squares_NG: NDArray[np.float64]) -> None:
        with closing(self._progress.task("self-influence", self.part.rows)) as task:
            for chunk in PartVectors(self.part, self._device).stream():
                squares_NG[chunk.start : chunk.stop] = _rounded(self.squares_of(chunk.rows_RD).cpu().numpy())
                task.advance(chunk.stop - chunk.start)


def _rounded(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """``numbers`` rounded to 26 bits, so that equal rows have equal scores: the last bits depend on a row's place in
    its chunk.
    """
    mantissa, exponent = np.frexp(numbers)
    return np.asarray(np.ldexp(np.rint(mantissa * 2.0**26) / 2.0**26, exponent))


def checked_damping(damping: float | None) -> float:
    """``damping``, by default 0.1; UsageError unless it is finite and 0 or more."""
    if damping is None:
        return DEFAULT_DAMPING
    if not (damping >= 0 and math.isfinite(damping)):
        raise UsageError(f"`damping` must be 0 or more and finite, not {damping}")
    return damping
