"""How far two sets of vectors are apart.

Legend: B samples, D numbers of a vector.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from query.common.rank_correlation import spearman

EXACT = 1e-3
"""Relative difference in float32 beyond which two vectors are not the same: rounding is about 1e-6."""


def relative_errors(found_BD: Tensor, expected_BD: Tensor) -> Tensor:
    """(B,) float64: ‖found - expected‖ ÷ ‖expected‖; 0 where both are zero, infinite where one is not finite."""
    found_BD, expected_BD = found_BD.double().cpu(), expected_BD.double().cpu()
    difference_B = (found_BD - expected_BD).norm(dim=1)
    error_B = torch.where(difference_B == 0, 0.0, difference_B / expected_BD.norm(dim=1))
    return error_B.nan_to_num(nan=torch.inf)


def worst(found_BD: Tensor, expected_BD: Tensor) -> float:
    """The largest of :func:`relative_errors`."""
    return float(relative_errors(found_BD, expected_BD).max())


def cosines(vectors_BD: Tensor) -> NDArray[np.float64]:
    """(B, B): the cosine of every pair."""
    unit_BD = torch.nn.functional.normalize(vectors_BD.double().cpu(), dim=1)
    return np.asarray((unit_BD @ unit_BD.t()).numpy(), dtype=np.float64)


def same_ranking(found_BD: Tensor, expected_BD: Tensor) -> list[float]:
    """For each sample as a query: Spearman of its cosines with all others, found against expected. B ≥ 3."""
    found, expected = cosines(found_BD), cosines(expected_BD)
    others = ~np.eye(len(found), dtype=bool)
    shape = (len(found), len(found) - 1)
    return [float(value) for value in spearman(found[others].reshape(shape), expected[others].reshape(shape))]
