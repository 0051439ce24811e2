"""The float32 screen of exact search loses no row: against the float64 scores of every row, at any scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from query.search.part_score import Metric, Term
from query.search.search import Ranking, search, similarities
from tests.support.made_parts import DIMENSION, clustered, make_part

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
