"""The sketch equals its dense matrix, deals evenly, and keeps inner products on average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.projection.sketch import Sketch
from tests.support.oracle import dense

sizes = st.integers(1, 120).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(deadline=None)
@given(size=sizes, batch=st.integers(1, 4), key=st.text(max_size=5))
def test_equals_its_dense_matrix(size: tuple[int, int], batch: int, key: str) -> None:
    n, k = size
    sketch = Sketch(key, n, k)
    x = torch.randn(batch, n, generator=torch.Generator().manual_seed(n))
    expected = x.double() @ dense(sketch).double().t()
    found = sketch(x)
    assert found.shape == (batch, k)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(size=sizes, key=st.text(max_size=5))
def test_every_number_goes_to_one_bucket_with_one_sign(size: tuple[int, int], key: str) -> None:
    n, k = size
    matrix = dense(Sketch(key, n, k))
    assert torch.equal(matrix.abs().sum(0), torch.ones(n))


@settings(deadline=None)
@given(size=sizes, key=st.text(max_size=5))
def test_buckets_hold_equal_numbers(size: tuple[int, int], key: str) -> None:
    n, k = size
    held = dense(Sketch(key, n, k)).abs().sum(1)
    assert int(held.max()) <= math.ceil(n / k)
    assert int(held.min()) >= n // k


def test_the_same_on_every_call_and_another_for_another_key() -> None:
    sketch = Sketch("a", 50, 8)
    assert sketch.digest() == Sketch("a", 50, 8).digest()
    known = "ce769a0821af5b4cb11bf11b1c1ad5fce6a6ae44d72170bc2fbecead55a880d4"
    assert Sketch("known answer", 50, 8).digest().hex() == known
    others = [Sketch("b", 50, 8), Sketch("a", 51, 8), Sketch("a", 50, 9)]
    assert len({sketch.digest(), *(other.digest() for other in others)}) == 4


@pytest.mark.parametrize(("n", "k"), [(60, 6), (61, 7), (9, 8)])
def test_inner_products_are_unbiased(n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, n, generator=generator).double()
    y = y + 0.5 * x
    seeds = 600
    dots = []
    for seed in range(seeds):
        matrix = dense(Sketch(f"{seed}", n, k)).double()
        dots.append(float((matrix @ x) @ (matrix @ y)))
    found = torch.tensor(dots, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(seeds)
    assert abs(float(found.mean()) - float(x @ y)) <= 4 * error


@pytest.mark.parametrize(("n", "k"), [(5, 6), (5, 0), (5, -1), (0, 0)])
def test_more_numbers_than_there_are_is_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"1 to {n}"):
        Sketch("key", n, k)
