"""How numbers are shared out: sums, bounds, proportions, and the numbers kept as they are, by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from indexer.projection.allocation import in_proportion, share_out

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12), st.floats(0.5, 2.0)), min_size=1, max_size=8)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int]]:
    chosen = draw(weights)
    least = [draw(st.integers(0, 3)) for _ in chosen]
    most = [low + draw(st.integers(0, 40)) for low in least]
    return chosen, draw(st.integers(sum(least), sum(most))), least, most


@settings(deadline=None)
@given(cuts())
def test_sums_and_bounds(cut: tuple[list[float], int, list[int], list[int]]) -> None:
    chosen, total, least, most = cut
    sizes = in_proportion(chosen, total, least, most)
    assert sum(sizes) == total
    assert all(low <= size <= high for low, size, high in zip(least, sizes, most, strict=True))
    assert sizes == in_proportion(chosen, total, least, most)


@settings(deadline=None)
@given(cuts())
def test_proportions_where_no_bound_is_met(cut: tuple[list[float], int, list[int], list[int]]) -> None:
    """Between the bounds sizes differ by less than one from one factor times the weights."""
    chosen, total, least, most = cut
    sizes = in_proportion(chosen, total, least, most)
    free = [i for i in range(len(chosen)) if least[i] < sizes[i] - 1 and sizes[i] + 1 < most[i] and chosen[i] > 0]
    for i in free:
        for j in free:
            assert (sizes[i] - 1) / chosen[i] <= (sizes[j] + 1) / chosen[j] * (1 + 1e-9)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(1, 500))
def test_largest_remainders_first(chosen: list[float], total: int) -> None:
    """Hamilton's method, where there are no bounds to meet."""
    sizes = in_proportion(chosen, total, [0] * len(chosen), [10**9] * len(chosen))
    exact = [total * weight / sum(chosen) for weight in chosen]
    assert all(abs(size - wanted) < 1 + 1e-6 for size, wanted in zip(sizes, exact, strict=True))
    up = [exact[i] % 1 for i, size in enumerate(sizes) if size > math.floor(exact[i] + 1e-6)]
    down = [exact[i] % 1 for i, size in enumerate(sizes) if size == math.floor(exact[i] + 1e-6)]
    near = 1e-6
    assert not up or not down or min(up) >= max(x if x < 1 - near else 0.0 for x in down) - near


@pytest.mark.parametrize(
    ("chosen", "total", "least", "most", "wanted"),
    [
        ([1, 1, 2], 8, [0, 0, 0], [9, 9, 9], [2, 2, 4]),
        ([1, 1, 1], 4, [1, 1, 1], [9, 9, 9], [2, 1, 1]),
        ([0, 0, 0], 7, [1, 1, 1], [9, 9, 9], [3, 2, 2]),
        ([0, 0, 5], 7, [1, 1, 1], [9, 9, 3], [2, 2, 3]),
        ([1e30, 1, 1], 10, [1, 1, 1], [9, 9, 9], [8, 1, 1]),
        ([1e30, 1, 1], 10, [1, 1, 1], [6, 9, 9], [6, 2, 2]),
        ([1e-300, 3e-300], 8, [0, 0], [9, 9], [2, 6]),
        ([5], 3, [0], [3], [3]),
        ([5, 2], 0, [0, 0], [3, 3], [0, 0]),
        ([5, 2], 3, [0, 3], [0, 3], [0, 3]),
    ],
)
def test_by_hand(chosen: list[float], total: int, least: list[int], most: list[int], wanted: list[int]) -> None:
    assert in_proportion(chosen, total, least, most) == wanted


@pytest.mark.parametrize(("total", "named"), [(1, "1 is not between 2 and 8"), (9, "9 is not between 2 and 8")])
def test_what_cannot_be_cut_is_refused(total: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        in_proportion([1, 1], total, [1, 1], [4, 4])


def energies_of(widths: list[int], spread: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(width, generator=generator)).exp().double() for width in widths]


def least_error(energies: list[Tensor], total: int) -> float:
    """(Σ tail)² / (K - kept), least over how many of the largest are kept."""
    energy = sorted((float(x) for one in energies for x in one), reverse=True)
    return min(sum(energy[kept:]) ** 2 / (total - kept) for kept in range(total - len(energies) + 1))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.floats(0, 5),
    st.integers(0, 1000),
    st.floats(0, 1),
    st.booleans(),
)
def test_shares(widths: list[int], spread: float, seed: int, part: float, keep: bool) -> None:
    total = len(widths) + int(part * (sum(widths) - len(widths)))
    if total == sum(widths):
        return
    energies = energies_of(widths, spread, seed)
    shares = share_out(energies, total, keep=keep)
    assert sum(shares.sizes) == total
    for energy, size, kept in zip(energies, shares.sizes, shares.kept, strict=True):
        assert max(1, len(kept)) <= size <= len(energy)
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) < size or len(kept) == len(energy), "what is not kept has a number"
    kept_energy = [float(one[i]) for one, kept in zip(energies, shares.kept, strict=True) for i in kept.tolist()]
    others = [
        float(x) for one, kept in zip(energies, shares.kept, strict=True) for i, x in enumerate(one) if i not in kept
    ]
    if not keep:
        assert kept_energy == []
        return
    assert not kept_energy or not others or min(kept_energy) >= max(others)
    error = sum(others) ** 2 / (total - len(kept_energy))
    assert error == pytest.approx(least_error(energies, total), rel=1e-9)


def test_equal_energies_go_by_place() -> None:
    energies = [torch.ones(4), torch.tensor([50.0, 50.0, 50.0, 1.0])]
    shares = share_out(energies, 5, keep=True)
    assert [kept.tolist() for kept in shares.kept] == [[], [0, 1, 2]]
    assert shares.sizes == [1, 4]


@pytest.mark.parametrize("keep", [False, True])
def test_no_energy_at_all(keep: bool) -> None:
    shares = share_out([torch.zeros(6), torch.zeros(3)], 5, keep=keep)
    assert sum(shares.sizes) == 5
    assert [len(kept) for kept in shares.kept] == [0, 0]


def test_one_block_of_nearly_all_the_energy() -> None:
    """It gets what the others can spare; each of them has one."""
    assert share_out([torch.full((50,), 1e20), torch.ones(50), torch.ones(50)], 30, keep=False).sizes == [28, 1, 1]
    assert share_out([torch.full((9,), 1e20), torch.ones(50), torch.ones(50)], 30, keep=False).sizes[0] == 9


@pytest.mark.parametrize("total", [1, 9, 20])
def test_totals_that_do_not_fit_are_refused(total: int) -> None:
    with pytest.raises(ValueError, match=f"{total} numbers cannot be shared between 2 layers of 9 numbers"):
        share_out([torch.ones(5), torch.ones(4)], total, keep=True)
