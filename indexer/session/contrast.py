"""What a candidate has in common with the others: its gradient's product with the mean gradient of all of them.

The mean is over the candidates that are decided about together: of all ranks, of one rank, or of a micro-batch.

Legend: B candidates of one rank, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from indexer.dotprod.scores import Scores
from indexer.session.ranks import Ranks


def common_of(scored: Sequence[Scores], ranks: Ranks) -> NDArray[np.float32]:
    """(B,): ⟨∇ℓ_i, mean ∇ℓ_j⟩ of this rank's candidates. From exact products, which one batch has of itself alone, else
    from vectors, then over ``ranks``. Candidates whose gradient is not finite are no part of the mean.

    Each rank computes its own, and passes them on: ranks that decide together decide by the same numbers.
    """
    first = scored[0]
    if first.pairs is not None:
        assert len(scored) == 1
        finite_B = torch.isfinite(first.pairs.diagonal())
        common_B = first.pairs[:, finite_B].mean(1)
    else:
        vectors_BD = torch.cat([_vectors(scores) for scores in scored])
        finite_B = torch.isfinite(vectors_BD).all(1)
        own_D = torch.cat([vectors_BD[finite_B].sum(0), finite_B.sum().double().unsqueeze(0)])
        sum_D = ranks.stacked(own_D).sum(0)
        common_B = vectors_BD @ (sum_D[:-1] / sum_D[-1].clamp_min(1))
    return common_B.float().cpu().numpy()


def _vectors(scores: Scores) -> torch.Tensor:
    assert scores.vectors is not None
    return scores.vectors.double()
