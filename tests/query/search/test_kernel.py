"""The compiled products of codes against the slow, obvious ones; and searches with and without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghoststore.store import Part
from query.search.kernel import CodeKernel, Registers, Segment, obvious_products, registers
from query.search.part_score import Metric, Term
from query.search.products import LARGEST, WIDEST, KernelProducts
from query.search.search import search
from query.search.top_k import Ranking
from tests.support.made_parts import DIMENSION, ROWS, clustered, make_part

pytestmark = pytest.mark.skipif(
    registers() is None, reason="needs llvmlite, and a processor with AVX2: elsewhere there is no kernel"
)
OWN = registers() or Registers(32, vnni=False)
ALL = sorted({Registers(32, vnni=False), Registers(32, vnni=OWN.vnni), OWN})
"""That this processor has: one with VNNI has them all."""


def segments_of(
    bounds: list[int], slices: int, queries: int, rng: np.random.Generator, largest: int = LARGEST
) -> list[Segment]:
    return [
        Segment(
            group,
            start,
            stop,
            rng.integers(-largest, largest + 1, (slices, queries, stop - start)).astype(np.int8),
            rng.choice([0.0, 1.0, 2.0**-7, 2.0**8], (slices, queries)),
        )
        for group, (start, stop) in enumerate(pairwise(bounds))
    ]


def stored_codes(codes_RD: np.ndarray, packed: bool) -> torch.Tensor:
    return torch.from_numpy(np.packbits(codes_RD > 0, axis=1, bitorder="little") if packed else codes_RD)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_products_are_the_obvious_ones(data: st.DataObject) -> None:
    """Steps and scales are powers of two, and integers small beside 2^53: every sum is exact, so the bits are equal."""
    packed, on = data.draw(st.booleans()), data.draw(st.sampled_from(ALL))
    rows, queries = data.draw(st.integers(1, 3 * on.rows)), data.draw(st.integers(1, 5))
    slices, seed = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(0, 2**32 - 1))
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 70), st.sampled_from([255, 512, 2048, WIDEST])), max_size=4))
    bounds = np.cumsum([0, *(lengths or [1])]).tolist()
    rng = np.random.default_rng(seed)
    extreme = data.draw(st.booleans())
    codes_RD = rng.integers(-LARGEST, LARGEST + 1, (rows, bounds[-1])).astype(np.int8)
    if packed or extreme:
        codes_RD = np.where(codes_RD >= 0, 1, -1).astype(np.int8) * np.int8(1 if packed else LARGEST)
    segments = segments_of(bounds, slices, queries, rng)
    scale_RG = rng.choice(np.float32([0, 0.5, 1, 4]), (rows, len(segments)))
    kernel = CodeKernel(segments, packed=packed, on=on)
    total_RQ = kernel(stored_codes(codes_RD, packed), torch.from_numpy(scale_RG))
    np.testing.assert_array_equal(total_RQ.numpy(), obvious_products(codes_RD, scale_RG, segments))


class Watched(CodeKernel):
    """Sees that no register is loaded from beyond the memory that the rows lie in."""

    def _multiply(self, stored: torch.Tensor, scale_RG: torch.Tensor, total_RQ: torch.Tensor) -> None:
        last = stored.storage_offset() + (len(stored) - 1) * stored.shape[1]
        assert last + self._reach <= stored.untyped_storage().nbytes()
        super()._multiply(stored, scale_RG, total_RQ)


@pytest.mark.parametrize("on", ALL)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bounds", [[0, 3, 20], [0, 600, 1100], [0, 512, 1024]])
def test_nothing_beyond_the_rows_is_read(packed: bool, on: Registers, bounds: list[int]) -> None:
    """Registers are wider than short rows, and than what is left of a block at the end of the last row."""
    rng = np.random.default_rng(0)
    segments = segments_of(bounds, 2, 2, rng)
    codes_RD = np.where(rng.integers(0, 2, (21, bounds[-1])) > 0, 1, -1).astype(np.int8)
    scale_RG = np.ones((21, 2), dtype=np.float32)
    kernel = Watched(segments, packed=packed, on=on)
    total_RQ = kernel(stored_codes(codes_RD, packed).clone(), torch.from_numpy(scale_RG))
    np.testing.assert_array_equal(total_RQ.numpy(), obvious_products(codes_RD, scale_RG, segments))


@contextmanager
def kernel_from(least_numbers: float) -> Iterator[None]:
    with patch("query.search.products.KERNEL_NUMBERS", least_numbers):
        yield


def bits(rankings: tuple[Ranking, Ranking]) -> list[Any]:
    return [(ranking.rows.tolist(), [x.hex() for x in ranking.scores.ravel().tolist()]) for ranking in rankings]


@pytest.fixture(scope="module")
def parts_by_dtype(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    """Of the same rows, some equal, some unusable, one zero and one of numbers that leave the range of float32."""
    rows = clustered()
    rows[5] = rows[17]
    rows[30] *= np.float32(1e30)
    folder = tmp_path_factory.mktemp("kernel")
    return {
        dtype: make_part(folder, rows, name=dtype, dtype=dtype, chunk_rows=chunk_rows)
        for dtype, chunk_rows in (("onebit", 10), ("int8", 25), ("float32", 5))
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_searches_give_the_same_bits_with_and_without_it(parts_by_dtype: dict[str, Part], data: st.DataObject) -> None:
    dtypes = data.draw(st.lists(st.sampled_from([*parts_by_dtype]), min_size=1, max_size=2))
    parts = [parts_by_dtype[dtype] for dtype in dtypes]
    seed = data.draw(st.integers(0, 2**32 - 1))
    shape = data.draw(st.integers(1, 4)), DIMENSION
    queries = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    metric: Metric = data.draw(st.sampled_from(["dot", "cosine"]))
    groups = data.draw(st.sampled_from([None, [0], list(range(len(parts[0].groups)))]))
    allowed_N = data.draw(st.sampled_from([None, np.arange(ROWS) % 3 == 0, np.arange(ROWS) < 60]))
    ends = {"top_k": data.draw(st.integers(0, 12)), "bottom_k": data.draw(st.integers(0, 12))}
    combine: Any = data.draw(st.sampled_from([None, "max"]))
    weights = data.draw(st.sampled_from([(1.0, 1.0), (1.0, -1.0), (1e-3, 2.0)]))
    terms = [
        Term.of(part, queries, metric=metric, groups=groups, weight=weight)
        for part, weight in zip(parts, weights, strict=False)
    ]
    with kernel_from(float("inf")):
        expected = bits(search(terms, combine=combine, allowed_N=allowed_N, **ends))
    with kernel_from(0), patch.object(KernelProducts, "of", autospec=True, side_effect=KernelProducts.of) as used:
        assert bits(search(terms, combine=combine, allowed_N=allowed_N, **ends)) == expected
    assert used.called == any(dtype != "float32" for dtype in dtypes)
