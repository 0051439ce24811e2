"""The naive projection: one dense gaussian matrix for the whole gradient. Far too dear to build with; a yardstick.

Legend: B gradients, N numbers that are left, n numbers of a piece of a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghoststore.errors import UsageError
from indexer.projection import draws

MATRIX_NUMBERS = 1 << 24
"""Of the matrix, in memory at once."""
MOST_NUMBERS = 1 << 36
"""Of the whole matrix: some minutes of drawing."""


class DenseProjection:
    """P with E[PᵀP] = I, (N, all numbers of a gradient), drawn column by column again whenever it is used.

    UsageError for a matrix that would take too long to draw.
    """

    def __init__(self, dimension: int, numbers: int, seed: int) -> None:
        if dimension < 1:
            raise UsageError(f"`reference=naive_proj_layers={dimension}`: at least one number must be left")
        if dimension * numbers > MOST_NUMBERS:
            raise UsageError(
                f"`reference=naive_proj_layers={dimension}`: a dense matrix of {dimension:,} × {numbers:,} numbers is "
                f"drawn; at most {MOST_NUMBERS:,} are. Give at most {MOST_NUMBERS // numbers:,}, or full_layers, "
                "which is exact"
            )
        self.dimension, self._seed = dimension, seed

    def __call__(self, gradients: Sequence[Sequence[Tensor]]) -> Tensor:
        """(B, N) float64 of B gradients, each a list of flat pieces of the same lengths."""
        projected_BN = torch.zeros(len(gradients), self.dimension, dtype=torch.float64)
        width = max(1, MATRIX_NUMBERS // self.dimension)
        for place, piece in enumerate(gradients[0]):
            for start in range(0, len(piece), width):
                columns = slice(start, min(start + width, len(piece)))
                key = f"ghoststore/1|dense|seed={self._seed}|piece={place}|start={start}|numbers={self.dimension}"
                matrix_Nn = torch.from_numpy(draws.gaussian(key, self.dimension, columns.stop - start))
                some_Bn = torch.stack([gradient[place][columns].cpu() for gradient in gradients])
                projected_BN += (some_Bn @ matrix_Nn.t()).double()
        return projected_BN
