"""Numbers that are added to scores before rows rank: against all scores with them, also beyond the range of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ghoststore.store import Part
from query.search.counts import bins_of, count_scores
from query.search.part_score import Term
from query.search.search import search, similarities
from query.search.some_rows import pair_similarities, similarities_at
from tests.support.made_parts import DIMENSION, ROWS, clustered, make_part


@pytest.fixture(scope="module", params=["onebit", "float32"])
def part(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Part:
    """One row has numbers that leave the range of float32, some have none."""
    rows_ND = clustered()
    rows_ND[30] *= np.float32(1e30)
    return make_part(tmp_path_factory.mktemp("added"), rows_ND, name="part", dtype=request.param, chunk_rows=10)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("combine", [None, "max"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e45])
def test_rows_rank_by_the_sums(
    part: Part, monkeypatch: pytest.MonkeyPatch, size: float, combine: Any, kernel: bool
) -> None:
    monkeypatch.setattr("query.search.products.KERNEL_NUMBERS", 0 if kernel else float("inf"))
    generator = torch.Generator().manual_seed(7)
    term = Term.of(part, torch.randn(3, DIMENSION, dtype=torch.float64, generator=generator), metric="dot")
    plain_QN = similarities([term])
    usable = np.flatnonzero(np.isfinite(plain_QN[0]))
    assert np.array_equal(similarities_at([term], usable), plain_QN[:, usable])
    few = usable[::7]
    assert np.array_equal(similarities_at([term], few), plain_QN[:, few])
    plain_CN = np.concatenate([plain_QN, plain_QN.max(0, keepdims=True)]) if combine else plain_QN
    rng = np.random.default_rng(3)
    columns = rng.integers(0, len(plain_CN), len(few))
    every, _ = search([term], top_k=ROWS, combine=combine)  # whose unit is another where rankings are combined
    as_searched_CN = np.full_like(plain_CN, np.nan)
    for column, (rows, scores) in enumerate(zip(every.rows, every.scores, strict=True)):
        as_searched_CN[column, rows[rows >= 0]] = scores[rows >= 0]
    assert np.array_equal(pair_similarities([term], few, columns, combine=combine), as_searched_CN[columns, few])
    added_CN = rng.standard_normal(plain_CN.shape) * size * np.nanstd(plain_CN[:, :30])
    expected_CN = np.where(np.isfinite(plain_CN), plain_CN + added_CN, -np.inf)
    best, worst = search([term], top_k=7, bottom_k=5, combine=combine, added_CN=added_CN)
    for column, scores_N in enumerate(expected_CN):
        order = usable[np.argsort(-scores_N[usable], kind="stable")]
        assert best.rows[column].tolist() == order[:7].tolist()
        assert worst.rows[column].tolist() == order[::-1][:5].tolist()
        np.testing.assert_allclose(best.scores[column], scores_N[order[:7]], rtol=1e-12)
    low, high = worst.scores[:, 0], best.scores[:, 0]
    counts_CB, ranked_N = count_scores([term], low, high, combine=combine, added_CN=added_CN)
    assert np.flatnonzero(ranked_N).tolist() == usable.tolist()
    for column, scores_N in enumerate(expected_CN):
        assert counts_CB[column].tolist() == bins_of(scores_N[usable], low[column], high[column]).tolist()
