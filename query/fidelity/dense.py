"""The naive projection: one dense gaussian matrix for the whole gradient. Too slow for a build; used as a reference.

Legend: B gradients, N numbers after the projection, n numbers of a piece of a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghoststore.errors import UsageError
from indexer.projection import draws

MATRIX_NUMBERS = 1 << 24
"""Numbers of the matrix in memory at once."""
MOST_NUMBERS = 1 << 36
"""Most numbers of the whole matrix. Drawing them takes some minutes."""


class DenseProjection:
    """P with E[PᵀP] = I, of shape (N, all numbers of a gradient). It is drawn anew, some columns at a time, on each
    use.

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
        """(B, N) float64: the projections of B gradients, each a list of flat pieces. Pieces have the same lengths in
        all gradients.
        """
        projected_BN = torch.zeros(len(gradients), self.dimension, dtype=torch.float64)
        width = max(1, MATRIX_NUMBERS // self.dimension)
        for place, piece in enumerate(gradients[0]):
            for start in range(0, len(piece), width):
                columns = slice(start, min(start + width, len(piece)))
                key = f"ghoststore/1|dense|seed={self._seed}|piece={place}|start={start}|numbers={self.dimension}"
                matrix_Nn = torch.from_numpy(draws.gaussian(key, self.dimension, columns.stop - start))
                columns_Bn = torch.stack([gradient[place][columns].cpu() for gradient in gradients])
                projected_BN += (columns_Bn @ matrix_Nn.t()).double()
        return projected_BN
