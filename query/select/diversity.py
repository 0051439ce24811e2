"""Greedy algorithms that choose, among candidates with good scores, samples that are also different from each other.

Each returns candidates in the order in which it chose them; of equally good ones the first. The slow, obvious version
of each is in ``tests/query/select/test_diversity.py``.

Legend: C candidates, best first; D numbers of a vector.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.settings.question import Diversity as Diversity
from query.select.budget import Room

ROWS_AT_ONCE = 512

Scores = NDArray[np.float64]
Advance = Callable[[int], None]


def products(vectors_CD: Tensor, vector_D: Tensor) -> Scores:
    """(C,) float64: inner products, summed row by row in one order, so that equal rows have equal products."""
    return _by_rows(vectors_CD, lambda rows_RD: (rows_RD * vector_D).sum(1))


def _by_rows(vectors_CD: Tensor, of: Callable[[Tensor], Tensor]) -> Scores:
    """(C,) float64: ``of`` applied to a batch of rows at a time, so that no second array of C·D numbers is made."""
    pieces = [of(vectors_CD[first : first + ROWS_AT_ONCE]) for first in range(0, len(vectors_CD), ROWS_AT_ONCE)]
    return np.asarray(torch.cat(pieces).double().cpu().numpy())


def relevance(score_C: Scores) -> Scores:
    """(C,): scores scaled to [0, 1], from the lowest to the highest of the candidates; all 1 if they are equal.

    So they compare with cosines, whatever the metric of the scores.
    """
    low, high = score_C.min(), score_C.max()
    return (score_C - low) / (high - low) if high > low else np.ones_like(score_C)


def mmr(score_C: Scores, unit_CD: Tensor, room: Room, weight: float, advance: Advance) -> list[int]:
    """Maximal marginal relevance (Carbonell, Goldstein 1998, with λ = 1 − weight).

    Each step takes the candidate with the largest (1 − weight)·relevance − weight·(its largest cosine to a chosen one,
    or 0 before the first). The rows of ``unit_CD`` have length 1. Time C·D for each choice; memory C beside
    ``unit_CD``.
    """
    relevance_C = (1 - weight) * relevance(score_C)
    nearest_C = np.full(len(score_C), -np.inf)

    def after(candidate: int) -> Scores:
        np.maximum(nearest_C, products(unit_CD, unit_CD[candidate]), out=nearest_C)
        return relevance_C - weight * nearest_C

    return _greedy(relevance_C, after, room, advance)


def greats(score_C: Scores, vectors_CD: Tensor, room: Room, eta: float, advance: Advance) -> list[int]:
    """GREATS (Wang et al. 2024, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration").

    Each step takes the candidate i with the largest score_i − η·Σ over chosen j of ⟨g_i, g_j⟩. That is the score of i
    after a step of size η along the chosen gradients, to second order, with the identity as the Hessian. Time C·D for
    each choice; memory C beside the vectors.
    """
    remaining_C = score_C.copy()

    def after(candidate: int) -> Scores:
        remaining_C[:] -= eta * products(vectors_CD, vectors_CD[candidate])
        return remaining_C

    return _greedy(remaining_C, after, room, advance)


def greats_step(score_C: Scores, vectors_CD: Tensor, count: int, weight: float) -> float:
    """η of GREATS for a dimensionless ``weight``: weight · s̄ ÷ (count · K̄).

    s̄ is the mean absolute score of the first ``count`` candidates, and K̄ the mean squared length of all. At weight 1,
    a candidate that has the direction and length of all chosen ones has lost s̄ of its score at the end.
    """
    mean_square = float(_by_rows(vectors_CD, lambda rows_RD: rows_RD.square().sum(1)).mean())
    return weight * float(np.abs(score_C[:count]).mean()) / (count * mean_square) if mean_square else 0.0


def _greedy(value_C: Scores, after: Callable[[int], Scores], room: Room, advance: Advance) -> list[int]:
    """Choose the candidate with the largest value while there is room. ``after(candidate)`` gives the values after it
    was chosen.
    """
    chosen: list[int] = []
    while room.open_C.any():
        candidate = int(np.argmax(np.where(room.open_C, value_C, -np.inf)))
        if room.take(candidate):
            chosen.append(candidate)
            advance(1)
            if room.open_C.any():
                value_C = after(candidate)
    return chosen


def cosines(unit_CD: Tensor) -> NDArray[np.float32]:
    """(C, C) float32: cosines of all pairs of the rows, which have length 1."""
    matrix = np.empty((len(unit_CD), len(unit_CD)), dtype=np.float32)
    for first in range(0, len(unit_CD), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        matrix[rows] = (unit_CD[rows] @ unit_CD.t()).cpu().numpy()
    return matrix


def facility_location(score_C: Scores, cosine_CC: NDArray[np.float32], room: Room, advance: Advance) -> list[int]:
    """Greedy facility location: each step takes the candidate that adds most to Σ_i relevance_i · max over chosen j of
    max(0, cosine_ij). So every candidate, the relevant ones first, gets a chosen one that is like it.

    Lazy evaluation (Minoux 1978): gains never grow, so a gain that was computed anew and is still the largest is the
    true maximum. All sums are taken in one order, so this holds for rounded gains, too. Time C for each gain;
    ``cosine_CC`` has C² numbers.
    """
    weight_C = relevance(score_C)
    cover_C = np.zeros(len(score_C))

    def gain(candidate: int) -> float:
        return float((weight_C * np.maximum(cosine_CC[candidate] - cover_C, 0.0)).sum())

    queue = [(-gain(candidate), candidate, 0) for candidate in range(len(score_C))]
    heapq.heapify(queue)
    chosen: list[int] = []
    while queue:
        _, candidate, computed_at = heapq.heappop(queue)
        if not room.open_C[candidate]:
            continue
        if computed_at < len(chosen):
            heapq.heappush(queue, (-gain(candidate), candidate, len(chosen)))
        elif room.take(candidate):
            chosen.append(candidate)
            advance(1)
            np.maximum(cover_C, cosine_CC[candidate], out=cover_C)
    return chosen
