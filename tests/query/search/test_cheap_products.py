"""Products of long vectors are summed piece by piece: their error stays within the bound of one piece."""

from __future__ import annotations

import pytest
import torch

from query.search.products import PIECE, cheap_products, product_error


@pytest.mark.parametrize("dimension", [PIECE, PIECE + 1, 5 * PIECE + 7])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_error_is_within_the_bound(dimension: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(dimension)
    rows, queries = (torch.randn(n, dimension, generator=generator) + mean for n in (9, 4))
    exact = rows.double() @ queries.double().t()
    lengths = rows.double().norm(dim=1)[:, None] * queries.double().norm(dim=1)
    error = (cheap_products(rows, queries.t().contiguous()).double() - exact).abs()
    assert bool((error <= product_error(min(PIECE, dimension)) * lengths).all())
