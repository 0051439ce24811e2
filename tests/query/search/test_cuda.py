"""Exact search on a GPU: the same rankings as on the CPU, also where parts are streamed through two small buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import ghoststore

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Lab

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "onebit"])
@pytest.mark.parametrize(
    "settings", [{}, {"metric": "dot"}, {"precondition": "second-moment"}, {"each": True}], ids=str
)
def test_the_same_ranking(lab: Lab, tmp_path: Path, dtype: str, settings: dict[str, Any]) -> None:
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=tmp_path / "store",
        proj_dtype=dtype,
        span_rows=4,
        projection=ghoststore.ProjectionConfig(rank_total=16),
        device="cpu",
    )
    answers = [
        ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, top_k=27, device=device, **settings).results
        for device in ("cpu", "cuda")
    ]
    for mine, theirs in zip(*answers, strict=True):
        largest = max(abs(hit.score) for hit in theirs.hits)
        by_row = {hit.source_row: hit.score for hit in theirs.hits}
        assert len(by_row) == len(mine.hits)
        for hit in mine.hits:
            assert hit.score == pytest.approx(by_row[hit.source_row], rel=1e-3, abs=1e-4 * largest)
