"""Differences between two sets of vectors.

Legend: B samples, D numbers of a vector.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from query.common.rank_correlation import spearman

EXACT = 1e-3
"""Largest relative difference of float32 vectors that count as the same. Rounding is about 1e-6."""


def relative_errors(measured_BD: Tensor, expected_BD: Tensor) -> Tensor:
    """(B,) float64: ‖measured - expected‖ ÷ ‖expected‖; 0 if both are zero, infinite if one is not finite."""
    measured_BD, expected_BD = measured_BD.double().cpu(), expected_BD.double().cpu()
    difference_B = (measured_BD - expected_BD).norm(dim=1)
    error_B = torch.where(difference_B == 0, 0.0, difference_B / expected_BD.norm(dim=1))
    return error_B.nan_to_num(nan=torch.inf)


def worst(measured_BD: Tensor, expected_BD: Tensor) -> float:
    """The largest of :func:`relative_errors`."""
    return float(relative_errors(measured_BD, expected_BD).max())


def cosines(vectors_BD: Tensor) -> NDArray[np.float64]:
    """(B, B): the cosine of every pair."""
    unit_BD = torch.nn.functional.normalize(vectors_BD.double().cpu(), dim=1)
    return np.asarray((unit_BD @ unit_BD.t()).numpy(), dtype=np.float64)


def same_ranking(measured_BD: Tensor, expected_BD: Tensor) -> list[float]:
    """For each sample as a query, Spearman's correlation of its cosines with all others: measured with
    expected. B ≥ 3.
    """
    measured, expected = cosines(measured_BD), cosines(expected_BD)
    others = ~np.eye(len(measured), dtype=bool)
    shape = (len(measured), len(measured) - 1)
    return [float(value) for value in spearman(measured[others].reshape(shape), expected[others].reshape(shape))]
