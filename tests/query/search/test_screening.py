"""The float32 screen of exact search loses no row: against the float64 scores of every row, at any scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from query.search.part_score import Metric, Term
from query.search.products import CodeProducts, FloatProducts
from query.search.search import pair_scores, search, similarities
from query.search.top_k import Ranking, RunningTopK
from query.search.vectors import StoredRows
from tests.support.made_parts import DIMENSION, ROWS, clustered, make_part

K = 12


def check(ranking: Ranking, scores_QN: np.ndarray, sign: float) -> None:
    for rows, scores_N in zip(ranking.rows, scores_QN, strict=True):
        usable = np.flatnonzero(np.isfinite(scores_N))
        assert rows.tolist() == usable[np.lexsort((usable, -sign * scores_N[usable]))][:K].tolist()


def both_ends(terms: list[Term], combine: Any = None) -> None:
    best, worst = search(terms, top_k=K, bottom_k=K, combine=combine)
    scores_QN = similarities(terms)
    if combine:
        scores_QN = np.concatenate([scores_QN, scores_QN.max(0, keepdims=True)])
    check(best, scores_QN, 1.0)
    check(worst, scores_QN, -1.0)


@pytest.mark.thin(2)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("scale", [1e-45, 1e-44, 1e-41, 1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_rows_of_any_size(tmp_path: Path, metric: Metric, scale: float) -> None:
    part = make_part(tmp_path, np.clip(clustered().astype(np.float64) * scale, -3e38, 3e38).astype(np.float32))
    queries = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(0))
    both_ends([Term.of(part, queries, metric=metric)])


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("combine", [None, "max"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1e-5, 2e-5), (1e-30, 1e30), (0.0, 1.0)])
def test_parts_that_nearly_cancel(tmp_path: Path, metric: Metric, combine: Any, weights: tuple[float, float]) -> None:
    rows = clustered()
    parts = [make_part(tmp_path, rows, name="a"), make_part(tmp_path, rows * np.float32(-0.999999), name="b")]
    queries = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-6], [1], [1e6]])
    both_ends(
        [Term.of(part, queries, metric=metric, weight=w) for part, w in zip(parts, weights, strict=True)], combine
    )


def nearly_equal(late: int) -> tuple[np.ndarray, torch.Tensor]:
    """Rows of ±127, which codes hold exactly, and a query that tells them apart by what two slices of 8 bits lose.

    Of their products with the query, integers miss what their bound allows, to a few percent. The first rows
    have nearly all that the query has there, row ``late`` all of it, and the others the opposite.
    """
    step = 0.49 / 127
    half = torch.tensor([1.0, step, *[0.49 * step / 127] * 29], dtype=torch.float64)  # one for each block
    query = torch.cat([half, half])
    (tiny,) = torch.nonzero(query < step, as_tuple=True)
    rows = np.ones((ROWS, len(query)), dtype=np.float32)
    rows[:, tiny] = -1
    rows[: 2 * K, tiny] = 1
    rows[np.arange(2 * K), tiny[: 2 * K]] = -1  # each but for one number
    rows[late] = 1
    return rows * 127, query.unsqueeze(0)


@pytest.mark.thin(2)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", ["int8", "onebit"])
def test_a_bound_that_is_a_tenth_too_small_would_lose_the_best_row(tmp_path: Path, metric: Metric, dtype: str) -> None:
    late = ROWS - 3
    rows, queries = nearly_equal(late)
    part = make_part(tmp_path, rows, dtype=dtype)
    term = Term.of(part, queries, metric=metric)
    products = CodeProducts(term.queries_QD, part.groups, packed=dtype == "onebit")
    stored, scale = (torch.from_numpy(numbers) for numbers in part.encoding.encode(rows, part.groups))
    cheap_R = products.of(StoredRows(dtype, stored, scale, part.groups))[:, 0].double()
    exact_R = torch.from_numpy(rows).double() @ term.queries_QD[0]
    bound = float(products.error_Q) * float(np.linalg.norm(rows[late]))
    assert cheap_R[late] + 0.9 * bound < exact_R[: 2 * K].min() < exact_R[late] < cheap_R[late] + bound
    both_ends([term])
    assert search([term], top_k=1)[0].rows.tolist() == [[late]]


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_without_a_bound_float32_would_lose_rows(tmp_path: Path, metric: Metric) -> None:
    """Rows that differ in last bits alone, in an order that float32 products do not tell."""
    rng = np.random.default_rng(0)
    rows = np.tile(rng.standard_normal(DIMENSION).astype(np.float32), (ROWS, 1))
    rows += rng.choice([-1, 0, 1], rows.shape).astype(np.float32) * np.spacing(rows)
    part = make_part(tmp_path, rows)
    term = Term.of(part, torch.from_numpy(rng.standard_normal((1, DIMENSION))), metric=metric)
    cheap_R = FloatProducts(term.queries_QD).of(StoredRows("float32", torch.from_numpy(rows), None, part.groups))[:, 0]
    exact_R = torch.from_numpy(rows).double() @ term.queries_QD[0]
    assert set(cheap_R.topk(K).indices.tolist()) != set(exact_R.topk(K).indices.tolist())
    both_ends([term])


def test_a_long_row_scores_the_same_on_any_number_of_threads() -> None:
    """With several threads torch would divide the sum of one long row among them, and round it otherwise."""
    generator = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(20, 100_003, generator=generator)
    unit_QD = torch.randn(1, 100_003, generator=generator, dtype=torch.float64)
    factor_R, queries = torch.ones(20, dtype=torch.float64), np.zeros(20, dtype=np.int64)
    threads, scores = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            scores.append(pair_scores(rows_RD, factor_R, unit_QD, np.arange(20), queries))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*scores)


def test_a_row_is_ruled_out_by_its_highest_score_alone() -> None:
    """Of many candidates those go that stay below what the k-th surely reaches: by their bounds, not cheap scores."""
    cheap_RQ = torch.full((10, 1), 1.0)
    cheap_RQ[7] = 0.85  # 0.95 exactly, while the others are 0.91
    exact = np.full(10, 0.91)
    exact[7] = 0.95
    best = RunningTopK(1, 1)
    pairs = best.candidates(
        cheap_RQ,
        torch.full((10, 1), 0.1),
        torch.ones(10, dtype=torch.bool),
        first_row=0,
        exact=lambda places, queries: exact[places],
    )
    best.add(pairs)
    assert best.rows.tolist() == [[7]]
