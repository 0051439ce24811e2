"""Screening products against float64: every encoding, blocks that end within a byte, and the bound of the error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ghoststore.store.part.encoding import ENCODINGS, Groups
from query.search.kernel import Registers, registers
from query.search.products import (
    WIDEST,
    CodeProducts,
    FloatProducts,
    KernelProducts,
    Products,
    integers_are_exact,
    products_of,
)
from query.search.vectors import StoredRows
from tests.support.made_parts import DIMENSION, clustered, make_part

RAGGED: Groups = [("a", 0, 1), ("b", 1, 13), ("c", 13, 16), ("d", 16, 129), ("e", 129, 300)]
"""Blocks that begin and end within bytes, and share them."""
WIDE: Groups = [("a", 0, 5), ("b", 5, 2 * WIDEST + 11)]
"""A block of several segments."""


def stored_rows(rows_RD: np.ndarray, dtype: str, groups: Groups) -> StoredRows:
    stored, scale = ENCODINGS[dtype].encode(rows_RD, groups)
    return StoredRows(dtype, torch.from_numpy(stored), None if scale is None else torch.from_numpy(scale), groups)


def oracle(rows: StoredRows, unit_QD: Tensor) -> tuple[Tensor, Tensor]:
    """(products (R, Q), lengths of the rows (R, 1)) in float64, of the rows as NumPy decodes them."""
    scale = None if rows.scale_RG is None else rows.scale_RG.numpy()
    wide_RD = torch.from_numpy(ENCODINGS[rows.dtype].decode(rows.stored.numpy(), scale, rows.groups)).double()
    return wide_RD @ unit_QD.t(), wide_RD.norm(dim=1, keepdim=True)


def products_for(dtype: str, unit_QD: Tensor, groups: Groups) -> list[Products]:
    """All ways to multiply rows of an encoding on this machine."""
    ways: list[Products] = [FloatProducts(unit_QD)]
    if ENCODINGS[dtype].scaled:
        ways.append(CodeProducts(unit_QD, groups, packed=dtype == "onebit"))
        if own := registers():
            every = {own, Registers(32, own.vnni), Registers(32, vnni=False)}
            ways += [KernelProducts(unit_QD, groups, dtype == "onebit", on) for on in every]
    return ways


def drawn(shape: str, count: int, dimension: int) -> Tensor:
    """(count, dimension) float64 queries of length 1; ``shape`` says how their numbers are spread."""
    numbers = torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    if shape == "heavy":  # a few numbers of very different sizes hold all
        numbers = numbers * (10 * numbers.abs().sqrt()).exp()
    if shape == "zeros":  # as outside chosen layers
        numbers[:, dimension // 3 :] = 0
    return numbers / numbers.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("groups", [RAGGED, WIDE], ids=["ragged", "wide"])
@pytest.mark.parametrize("dtype", ENCODINGS)
@pytest.mark.parametrize("shape", ["normal", "heavy", "zeros"])
def test_products_are_within_their_bound(groups: Groups, dtype: str, shape: str) -> None:
    dimension = groups[-1][2]
    numbers = np.random.default_rng(1).standard_normal((37, dimension)).astype(np.float32)
    numbers *= np.exp(np.random.default_rng(2).uniform(-9, 9, (37, 1))).astype(np.float32)
    numbers[3] = 0
    rows = stored_rows(numbers, dtype, groups)
    for queries in (1, 2, 3, 20):
        unit_QD = drawn(shape, queries, dimension)
        exact_RQ, length_R1 = oracle(rows, unit_QD)
        for products in products_for(dtype, unit_QD, groups):
            cheap_RQ = products.of(rows)
            assert cheap_RQ.dtype == torch.float32
            assert bool(((cheap_RQ.double() - exact_RQ).abs() <= products.error_Q * length_R1).all())
            assert float(products.error_Q.max()) < 2e-4, "a bound as loose as this rules out too little"


@pytest.mark.skipif(not integers_are_exact(), reason="needs a processor with VNNI")
@pytest.mark.parametrize("queries", [1, 2, 3, 20])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_do_not_saturate(queries: int, sign: int) -> None:
    """The largest codes times the largest slices, where sums of pairs exceed 16 bits."""
    dimension = WIDEST + 3
    unit_QD = torch.full((queries, dimension), sign * dimension**-0.5, dtype=torch.float64)
    for dtype in ("int8", "onebit"):
        numbers = np.ones((20, dimension), dtype=np.float32)
        numbers[1::2] *= -1
        rows = stored_rows(numbers, dtype, [("all", 0, dimension)])
        exact_RQ, length_R1 = oracle(rows, unit_QD)
        for products in products_for(dtype, unit_QD, rows.groups):
            assert bool(((products.of(rows).double() - exact_RQ).abs() <= products.error_Q * length_R1).all())


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", ENCODINGS)
def test_rows_on_a_gpu_are_decoded(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are multiplied on the CPU alone. A GPU is stood for by torch's device without memory."""
    part = make_part(tmp_path, clustered(), dtype=dtype)
    monkeypatch.setattr("query.search.products.KERNEL_NUMBERS", 0)
    assert isinstance(products_of(part, torch.ones(1, DIMENSION, dtype=torch.float64, device="meta")), FloatProducts)


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_decoding_some_rows(rows: int) -> None:
    for dtype, encoding in ENCODINGS.items():
        numbers = np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)
        stored = stored_rows(numbers, dtype, RAGGED)
        scale = None if stored.scale_RG is None else stored.scale_RG.numpy()
        whole = encoding.decode(stored.stored.numpy(), scale, RAGGED)
        places = np.arange(rows)[::-1] + 3
        assert torch.equal(stored.decoded(torch.from_numpy(places.copy())), torch.from_numpy(whole[places]))
        assert torch.equal(stored.decoded(slice(3, 3 + rows)), torch.from_numpy(whole[3 : 3 + rows]))
