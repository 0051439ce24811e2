"""How many numbers each side of a layer keeps."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from indexer.projection.plan import ranks

axis = st.integers(1, 5000)
total = st.integers(1, 20000)


@given(axis, axis, total)
def test_within_the_axes_and_the_total(n_out: int, n_in: int, rank_total: int) -> None:
    k_out, k_in = ranks(n_out, n_in, rank_total)
    assert 1 <= k_out <= n_out
    assert 1 <= k_in <= n_in
    assert k_out * k_in <= rank_total


@given(axis, axis, total)
def test_symmetric_where_there_is_room(n_out: int, n_in: int, rank_total: int) -> None:
    side = math.isqrt(rank_total)
    if min(n_out, n_in) >= side:
        assert ranks(n_out, n_in, rank_total) == (side, side)


@given(axis, axis, total)
def test_a_short_axis_keeps_its_length_and_the_other_takes_what_is_left(n_out: int, n_in: int, rank_total: int) -> None:
    side = math.isqrt(rank_total)
    k_out, k_in = ranks(n_out, n_in, rank_total)
    if n_in < side:
        assert (k_out, k_in) == (min(n_out, rank_total // n_in), n_in)
    elif n_out < side:
        assert (k_out, k_in) == (n_out, min(n_in, rank_total // n_out))


@given(axis, axis, total)
def test_transposing_the_layer_transposes_the_ranks(n_out: int, n_in: int, rank_total: int) -> None:
    assert ranks(n_in, n_out, rank_total) == ranks(n_out, n_in, rank_total)[::-1]


@given(axis, axis)
def test_full_keeps_both_axes(n_out: int, n_in: int) -> None:
    assert ranks(n_out, n_in, "full") == (n_out, n_in)
