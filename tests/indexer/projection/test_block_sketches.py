"""Sketches of blocks: the dense matrix, inner products on average, numbers kept as they are, the digest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from indexer.projection.sketch import BlockSketches
from tests.support.oracle import dense

Blocks = tuple[list[int], list[int], list[Tensor]]
"""Widths, sizes and kept places."""


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    widths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    sizes, kept = [], []
    for width in widths:
        places = sorted(draw(st.sets(st.integers(0, width - 1))))
        size = width if len(places) == width else draw(st.integers(max(1, len(places)), width))
        sizes.append(size)
        kept.append(torch.tensor(places, dtype=torch.int64))
    return widths, sizes, kept


def columns(widths: list[int]) -> list[tuple[int, int]]:
    return [(sum(widths[:place]), sum(widths[: place + 1])) for place in range(len(widths))]


def sketches(found: Blocks, key: str = "key") -> BlockSketches:
    widths, sizes, kept = found
    return BlockSketches(key, [f"layer-{place}" for place in range(len(widths))], columns(widths), sizes, kept)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(blocks(), st.integers(0, 4), st.text(max_size=4))
def test_equals_its_dense_matrix(found: Blocks, batch: int, key: str) -> None:
    sketch = sketches(found, key)
    n, k = sum(found[0]), sum(found[1])
    x = numbers(batch, n)
    matrix = dense(sketch)
    assert (sketch.n, sketch.k, tuple(matrix.shape)) == (n, k, (k, n))
    assert sketch(x).dtype == torch.float32
    torch.testing.assert_close(sketch(x).double(), x.double() @ matrix.double().t(), rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(blocks())
def test_blocks_stay_apart_and_kept_numbers_are_exact(found: Blocks) -> None:
    """Every number goes to one place of its block's, with weight one; kept ones to a place of their own."""
    widths, sizes, kept = found
    matrix = dense(sketches(found))
    x = numbers(2, sum(widths))
    out = sketches(found)(x)
    row = 0
    for (start, stop), size, places in zip(columns(widths), sizes, kept, strict=True):
        mine = matrix[row : row + size]
        outside = torch.cat([mine[:, :start], mine[:, stop:]], dim=1)
        assert not bool(outside.any())
        exact = mine[: len(places)]
        assert torch.equal(exact.nonzero()[:, 1], places + start)
        assert torch.equal(out[:, row : row + len(places)], x[:, places + start])
        if size > len(places):
            assert torch.equal(mine.abs().sum(0)[start:stop], torch.ones(stop - start))
        row += size


def test_inner_products_are_unbiased() -> None:
    widths, sizes = [30, 12, 9], [7, 5, 1]
    kept = [torch.tensor([0, 4]), torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)]
    x, y = numbers(2, 51, seed=1)
    y = y + 0.5 * x
    dots = []
    for seed in range(600):
        sketch = sketches((widths, sizes, kept), f"seed-{seed}")
        one, other = sketch(torch.stack([x, y])).double()
        dots.append(float(one @ other))
    found = torch.tensor(dots, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(dots))
    assert error > 0
    assert abs(float(found.mean()) - float(x.double() @ y.double())) <= 4 * error


def test_whole_blocks_have_no_sketch() -> None:
    kept = [torch.arange(4), torch.tensor([1])]
    sketch = sketches(([4, 3], [4, 2], kept))
    assert [one is None for one in sketch.sketches] == [True, False]
    assert torch.equal(dense(sketch)[:4], torch.eye(7)[:4])
    whole = sketches(([4, 3], [4, 3], [torch.arange(4), torch.arange(3)]))
    assert torch.equal(dense(whole), torch.eye(7))
    assert torch.equal(whole(torch.ones(2, 7).half()), torch.ones(2, 7))


def test_the_digest_depends_on_every_input() -> None:
    base: dict[str, Any] = {
        "key": "key",
        "names": ["a", "b"],
        "columns": [(0, 20), (20, 35)],
        "sizes": [6, 4],
        "kept": [torch.tensor([3]), torch.tensor([], dtype=torch.int64)],
    }
    changes: list[dict[str, Any]] = [
        {},
        {"key": "other"},
        {"names": ["a", "c"]},
        {"names": ["b", "a"]},
        {"columns": [(0, 21), (21, 35)]},
        {"sizes": [5, 5]},
        {"kept": [torch.tensor([4]), base["kept"][1]]},
        {"kept": [base["kept"][1]] * 2},
    ]
    found = [BlockSketches(**base | change).digest() for change in changes]
    assert len(set(found)) == len(found)
    assert BlockSketches(**base).digest() == found[0]


@pytest.mark.parametrize(("sizes", "kept"), [([6], []), ([1], [0, 1])])
def test_sizes_that_do_not_fit_are_refused(sizes: list[int], kept: list[int]) -> None:
    with pytest.raises(ValueError, match="can have 1 to"):
        sketches(([5], sizes, [torch.tensor(kept, dtype=torch.int64)]))
