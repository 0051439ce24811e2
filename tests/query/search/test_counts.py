"""Rows in the bins of their scores: those of the scores of all rows, of which hardly one is computed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststore.errors import CorruptError
from ghoststore.store import Part
from query.search.counts import BINS, bins_of, count_scores
from query.search.part_score import Term
from query.search.search import Piece, search, similarities
from tests.support.made_parts import DIMENSION, clustered, make_part

QUERIES = torch.randn(3, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def checked(terms: list[Term], **options: Any) -> np.ndarray:
    """The counts, which are those of all scores."""
    best, worst = search(terms, top_k=1, bottom_k=1, **options)
    scores_CN = similarities(terms, allowed_N=options.get("allowed_N"))
    if options.get("combine"):
        scores_CN = np.concatenate([scores_CN, scores_CN.max(0, keepdims=True)])
    counts_CB, ranked_N = count_scores(terms, worst.scores[:, 0], best.scores[:, 0], **options)
    np.testing.assert_array_equal(ranked_N, np.isfinite(scores_CN[0]))
    for counts_B, scores_N in zip(counts_CB, scores_CN, strict=True):
        finite = scores_N[np.isfinite(scores_N)]
        np.testing.assert_array_equal(counts_B, bins_of(finite, finite.min(), finite.max()))
    return counts_CB


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs were scored exactly, each time."""
    counts, exact = list[int](), Piece.exact

    def counted(piece: Piece, places: np.ndarray, columns: np.ndarray) -> np.ndarray:
        counts.append(len(places))
        return exact(piece, places, columns)

    monkeypatch.setattr(Piece, "exact", counted)
    return counts


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "onebit"])
def test_all_rows_are_counted(tmp_path: Path, dtype: str, metric: Any, exactly: list[int]) -> None:
    term = Term.of(make_part(tmp_path, clustered(), dtype=dtype), QUERIES, metric=metric)
    best, worst = search([term], top_k=1, bottom_k=1)
    exactly.clear()
    counts_CB, _ = count_scores([term], worst.scores[:, 0], best.scores[:, 0])
    assert sum(exactly) <= 0.02 * counts_CB.sum() + 2 * len(QUERIES)
    checked([term])


def test_of_several_parts_some_rows_and_the_largest(tmp_path: Path) -> None:
    rows = clustered()
    parts = [make_part(tmp_path, rows, name=dtype, dtype=dtype, chunk_rows=10) for dtype in ("int8", "onebit")]
    terms = [
        Term.of(part, QUERIES, metric="cosine", weight=weight) for part, weight in zip(parts, (1.0, -0.3), strict=True)
    ]
    allowed_N = np.random.default_rng(0).random(len(rows)) < 0.3
    for options in ({}, {"combine": "max"}, {"allowed_N": allowed_N}):
        checked(terms, **options)


def made(tmp_path: Path, first: np.ndarray) -> Part:
    """A part of rows whose product with the first unit vector is ``first``."""
    rows = np.zeros((len(first), DIMENSION), dtype=np.float32)
    rows[:, 0], rows[:, 1] = first, 1
    return make_part(tmp_path, rows, unusable=())


@pytest.mark.parametrize(
    "first",
    [np.arange(BINS + 1) / 4, np.full(20, 0.3), np.array([1e30, 1e-30, -1e30, 0, 5e29]), np.array([0.7])],
    ids=["edges", "equal", "wild", "one"],
)
def test_scores_on_edges_equal_ones_and_wild_ones(tmp_path: Path, first: np.ndarray) -> None:
    counts_CB = checked([Term.of(made(tmp_path, first), torch.eye(1, DIMENSION, dtype=torch.float64), metric="dot")])
    assert counts_CB.sum() == len(first)


def test_a_hollow_part_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before memory is taken for each row that its manifest tells of."""
    term = Term.of(make_part(tmp_path, clustered(), spans=[0]), QUERIES, metric="dot")
    monkeypatch.setattr("ghoststore.store.spans.group.FEW_ROWS", 10)
    monkeypatch.setattr("ghoststore.store.spans.group.MOST_TIMES", 2)
    with pytest.raises(CorruptError, match="too few to keep a number of each"):
        count_scores([term], np.zeros(3), np.ones(3))
