"""The greedy algorithms against their slow, obvious versions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from query.select.budget import Pools, Room
from query.select.diversity import cosines, facility_location, greats, greats_step, mmr, products, relevance


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, torch.Tensor, Pools]:
    """Falling scores, vectors of length 1 (some equal), and pools with limits."""
    count = draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    vectors = rng.standard_normal((count, 6)).astype(np.float32)
    vectors[rng.random(count) < 0.3] = vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    score = np.sort(rng.integers(-3, 6, count) / 7)[::-1].copy()
    limits = draw(st.lists(st.integers(0, 8), min_size=1, max_size=3))
    pools = Pools([""] * len(limits), limits, rng.integers(0, len(limits), count), rng.integers(1, 4, count))
    return score, torch.from_numpy(vectors), pools


def greedily(value: Callable[[list[int], int], float], pools: Pools) -> list[int]:
    """The definition: again and again the candidate with the largest value beside what is chosen."""
    chosen: list[int] = []
    left, out = list(pools.limits), set()
    while free := [i for i in range(len(pools.pool_M)) if i not in out]:
        best = max(free, key=lambda i: (value(chosen, i), -i))
        pool, cost = pools.pool_M[best], pools.cost_M[best]
        if cost > left[pool]:
            out |= {i for i in free if pools.pool_M[i] == pool}
            continue
        left[pool] -= cost
        out.add(best)
        chosen.append(best)
    return chosen


def room(pools: Pools) -> Room:
    return Room(pools, np.arange(len(pools.pool_M)))


def told(_: int) -> None:
    pass


@given(problems(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@settings(deadline=None)
def test_mmr(problem: Any, weight: float) -> None:
    score, unit, pools = problem
    rel = relevance(score)
    pairs = np.stack([products(unit, vector) for vector in unit])

    def value(chosen: list[int], i: int) -> float:
        return (1 - weight) * rel[i] - weight * max(pairs[j, i] for j in chosen) if chosen else (1 - weight) * rel[i]

    assert mmr(score, unit, room(pools), weight, told) == greedily(value, pools)


@given(problems(), st.sampled_from([0.0, 0.3, 2.0]))
@settings(deadline=None)
def test_greats(problem: Any, eta: float) -> None:
    score, vectors, pools = problem
    pairs = np.stack([products(vectors, vector) for vector in vectors])

    def value(chosen: list[int], i: int) -> float:
        left = score[i]
        for j in chosen:
            left -= eta * pairs[j, i]
        return left

    assert greats(score, vectors, room(pools), eta, told) == greedily(value, pools)


@given(problems())
@settings(deadline=None)
def test_facility_location(problem: Any) -> None:
    """Lazy is plain greedy, ties included: by the gain in coverage, computed from nothing each time."""
    score, unit, pools = problem
    matrix, rel = cosines(unit), relevance(score)

    def value(chosen: list[int], i: int) -> float:
        cover = np.maximum(matrix[chosen].max(0), 0.0).astype(np.float64) if chosen else np.zeros(len(score))
        return float((rel * np.maximum(matrix[i] - cover, 0.0)).sum())

    assert facility_location(score, matrix, room(pools), told) == greedily(value, pools)


def test_facility_location_is_near_the_best_set() -> None:
    """Greedy on a monotone submodular function reaches 1 − 1/e of the best (Nemhauser et al. 1978)."""
    rng = np.random.default_rng(3)
    unit = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((9, 4)).astype(np.float32)))
    score = np.sort(rng.random(9))[::-1].copy()
    matrix, rel = cosines(unit), relevance(score)

    def coverage(chosen: tuple[int, ...] | list[int]) -> float:
        return float((rel * np.maximum(matrix[list(chosen)].max(0), 0)).sum())

    pools = Pools([""], [3], np.zeros(9, dtype=np.int64), np.ones(9, dtype=np.int64))
    found = coverage(facility_location(score, matrix, room(pools), told))
    assert found >= (1 - 1 / np.e) * max(coverage(chosen) for chosen in combinations(range(9), 3))


def test_equal_rows_have_equal_products() -> None:
    vectors = torch.randn(1500, 33)
    vectors[[0, 511, 512, 1499]] = vectors[7].clone()
    found = products(vectors, vectors[7])
    assert len(set(found[[0, 7, 511, 512, 1499]].tolist())) == 1
    np.testing.assert_allclose(found, (vectors.double() @ vectors[7].double()).numpy(), rtol=1e-4, atol=1e-4)


def test_diversity_sees_copies() -> None:
    """Three copies of the best row, then another direction: each algorithm takes one of each."""
    unit = torch.eye(2)[[0, 0, 0, 1, 1]]
    score = np.array([1.0, 1.0, 1.0, 0.9, 0.0])
    pools = Pools([""], [2], np.zeros(5, dtype=np.int64), np.ones(5, dtype=np.int64))
    assert mmr(score, unit, room(pools), 0.5, told) == [0, 3]
    assert greats(score, unit, room(pools), greats_step(score, unit, 2, 1.0), told) == [0, 3]
    assert facility_location(score, cosines(unit), room(pools), told) == [0, 3]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_weight_of_greats_has_no_unit(scale: float) -> None:
    """Longer gradients (scores grow with them, products with their square): the same choice."""
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(rng.standard_normal((12, 5)).astype(np.float32))
    score = np.sort(vectors.numpy() @ rng.standard_normal(5))[::-1].copy()
    pools = Pools([""], [6], np.zeros(12, dtype=np.int64), np.ones(12, dtype=np.int64))
    plain = greats(score, vectors, room(pools), greats_step(score, vectors, 6, 5.0), told)
    scaled = greats(
        score * scale, vectors * scale, room(pools), greats_step(score * scale, vectors * scale, 6, 5.0), told
    )
    assert plain == scaled != list(range(6))
