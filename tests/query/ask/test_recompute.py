"""Recomputed gradients are those that were stored, and rankings by them those of a float32 part."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ghoststore
from ghoststore import Part, ProjectionConfig, Store
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import Status
from query.ask.encoder import PartEncoder
from query.ask.rerank import rerank
from query.search.part_score import Metric, Term
from query.search.search import search
from query.search.top_k import Ranking
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab, Rows

PROJECTIONS = {
    "sketched": ProjectionConfig(),
    "plain": ProjectionConfig(rank_total=16),
    "full": ProjectionConfig(layers=("attn",), rank_total="full"),
}


def rows_of(lab: Lab) -> Rows:
    """Short and long samples, and one without a vector."""
    long = {"id": "long", "text": "the old moon over the river " * 9, "domain": "sky"}
    return [*lab.rows[:9], long, {"id": "none", "text": "", "domain": "sky"}, *lab.rows[9:]]


def built(lab: Lab, folder: Path, data: Path, dtype: str = "float32", **options: Any) -> Part:
    options = {"span_rows": 5} | options
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=data,
        store=folder / "store",
        name=dtype,
        proj_dtype=dtype,
        device="cpu",
        **options,
    )
    return Store.open(folder / "store").part(dtype)


def close(found: Tensor, stored: np.ndarray) -> None:
    """To 1e-5 of a row's length: batches are others."""
    assert found.dtype == torch.float32
    assert found.shape == stored.shape
    error = np.linalg.norm(found.numpy() - stored, axis=1)
    assert (error <= 1e-5 * np.linalg.norm(stored, axis=1)).all()


def reading(lab: Lab, folder: Path, form: str) -> Path:
    """The same rows as a corpus of that form."""
    plain = lab.write(folder / "rows.jsonl", rows_of(lab))
    if form == "gz":
        packed = folder / "rows.jsonl.gz"
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        return packed
    if form == "shards":
        ghoststore.tokenize(data=plain, tokenizer=lab.checkpoint, out=folder / "shards", shard_samples=7)
        return folder / "shards"
    return plain


@pytest.mark.thin(1)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_equal_what_was_stored(lab: Lab, tmp_path: Path, projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("query.ask.encoder.ROWS_AT_ONCE", 4)
    part = built(lab, tmp_path, reading(lab, tmp_path, "jsonl"), projection=PROJECTIONS[projection])
    rows = [28, 3, 3, *range(part.rows)]
    assert Status(part.read_rows("status", [10])[0]) is Status.EMPTY
    encoder = PartEncoder(part, device="cpu")
    close(encoder.recompute(rows), vectors_of(part)[rows])
    assert encoder.recompute([]).shape == (0, part.layout.dimension)


@pytest.mark.thin(1)
@pytest.mark.parametrize("overlong", ["window", "truncate"])
@pytest.mark.parametrize("form", ["jsonl", "gz", "shards"])
def test_windows_and_forms(lab: Lab, tmp_path: Path, form: str, overlong: Any) -> None:
    part = built(lab, tmp_path, reading(lab, tmp_path, form), overlong=overlong, max_length=12)
    assert (part.rows > 29) == (overlong == "window")
    rows = np.random.default_rng(0).permutation(part.rows)
    encoder = PartEncoder(part, device="cpu")
    close(encoder.recompute(rows), vectors_of(part)[rows])
    close(encoder.recompute(rows[:3]), vectors_of(part)[rows[:3]])


def test_blocks_before_the_sketch(lab: Lab, tmp_path: Path) -> None:
    """They are those of a part that was built without one, and the sketch of them is what is stored."""
    data = reading(lab, tmp_path, "jsonl")
    part = built(lab, tmp_path, data, "int8", projection=ProjectionConfig(rank_total=64, compress=50))
    unsketched = built(lab, tmp_path, data, projection=ProjectionConfig(rank_total=64))
    encoder = PartEncoder(part, device="cpu")
    blocks = encoder.unsketched()
    assert blocks.groups == unsketched.groups
    assert [name for name, _, _ in blocks.groups] == [layer["name"] for layer in part.manifest["layers"]]
    close(blocks.recompute(range(29)), vectors_of(unsketched, 0, 29))
    assert (encoder.groups, encoder.dimension) == (part.groups, 50)


def test_another_corpus_is_refused(lab: Lab, tmp_path: Path) -> None:
    rows = rows_of(lab)
    data = lab.write(tmp_path / "rows.jsonl", rows)
    part = built(lab, tmp_path, data)
    rows[3] = rows[3] | {"text": rows[3]["text"][::-1]}
    lab.write(data, rows)
    encoder = PartEncoder(part, device="cpu")
    encoder.recompute([0, 1, 2])
    with pytest.raises(MismatchError, match=r"rows\.jsonl has changed .* 1 of 4 samples .* the first at row 3"):
        encoder.recompute([1, 2, 3, 4])
    data.unlink()
    with pytest.raises(UsageError, match=r"rows\.jsonl"):
        PartEncoder(part, device="cpu").recompute([0])


def test_another_model_is_refused(lab: Lab, tmp_path: Path) -> None:
    part = built(lab, tmp_path, reading(lab, tmp_path, "jsonl"))
    with pytest.raises(MismatchError, match="built from other weights"):
        PartEncoder(part, checkpoint=lab.model(tmp_path / "other", seed=1), device="cpu")


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_bit_reranked_is_the_exact_ranking(
    lab: Lab, tmp_path: Path, metric: Metric, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows reranked: the ranking of the float32 part. A few candidates: these in its order."""
    monkeypatch.setattr("query.ask.rerank.BYTES_AT_ONCE", 5 * 256 * 4)
    data = reading(lab, tmp_path, "jsonl")
    projection = ProjectionConfig(compress=256)
    exact, coarse = (built(lab, tmp_path, data, dtype, projection=projection) for dtype in ("float32", "onebit"))
    queries = torch.from_numpy(vectors_of(exact, 0, 29)[[2, 20, 5]])
    wanted, _ = search([Term.of(exact, queries * sign, metric=metric)], top_k=28)
    candidates, _ = search([Term.of(coarse, queries * sign, metric=metric)], top_k=29)
    assert (candidates.rows[:, -1] == -1).all()  # one row has no vector
    assert not np.array_equal(candidates.rows[:, :28], wanted.rows)
    recompute = PartEncoder(coarse, device="cpu").recompute
    settings: dict[str, Any] = {"metric": metric, "recompute": recompute, "sign": sign}
    found = rerank(candidates, queries, top_k=28, **settings)
    np.testing.assert_array_equal(found.rows, wanted.rows)
    np.testing.assert_allclose(found.scores * sign, wanted.scores, rtol=1e-4, atol=1e-4 * wanted.scores.max())
    few = Ranking(candidates.rows[:, :9], candidates.scores[:, :9])
    found = rerank(few, queries, top_k=10, **settings)
    for mine, theirs, best in zip(found.rows, few.rows, wanted.rows, strict=True):
        assert mine[:9].tolist() == [row for row in best.tolist() if row in theirs]
        assert mine[9] == -1


def test_ties_and_zero_rows(lab: Lab) -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 1.0]])
    candidates = Ranking(np.array([[3, 2, 1, 0, -1]]), np.zeros((1, 5)))
    found = rerank(
        candidates, torch.tensor([[2.0, 0.0]]), metric="cosine", top_k=5, recompute=lambda rows: vectors[rows]
    )
    assert found.rows.tolist() == [[0, 2, 1, 3, -1]]
    np.testing.assert_allclose(found.scores[0, :4], [1, 1, 0, -(0.5**0.5)])


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("dtype", ["int8", "onebit"])
@pytest.mark.parametrize(
    "settings", [{"each": True}, {}, {"group_field": "domain"}, {"each": True, "layers": ["mlp"]}], ids=str
)
def test_query_with_rerank_gives_exact_scores(
    lab: Lab, tmp_path: Path, metric: Metric, dtype: str, settings: dict[str, Any]
) -> None:
    data = reading(lab, tmp_path, "jsonl")
    val_set = lab.write(tmp_path / "val.jsonl", lab.sample_rows(4, 3))
    for name in ("float32", dtype):
        built(lab, tmp_path, data, name, projection=PROJECTIONS["plain"])

    def ask(part: str, **more: Any) -> Any:
        wanted = {"metric": metric, "top_k": 28, "bottom_k": 3, "device": "cpu", **settings, **more}
        return ghoststore.query(store=tmp_path / "store", part=part, val_set=val_set, **wanted)

    exact, again = ask("float32"), ask(dtype, rerank=28, rerank_with="vectors")
    assert again.settings["rerank"] == 28
    for mine, theirs in zip(again.results, exact.results, strict=True):
        assert mine.query == theirs.query
        for one, other in ((mine.hits, theirs.hits), (mine.bottom, theirs.bottom)):
            assert [hit.source_row for hit in one] == [hit.source_row for hit in other]
            largest = max(abs(hit.score) for hit in theirs.hits)
            np.testing.assert_allclose(
                [hit.score for hit in one], [hit.score for hit in other], rtol=1e-4, atol=1e-5 * largest
            )


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rerank": 3, "top_k": 4}, "fewer than the rows asked for, 4"),
        ({"rerank": 5, "top_k": 4, "precondition": "second-moment"}, "leave `precondition` out"),
        ({"rerank": 5, "top_k": 4, "group_field": "domain", "combine": "max"}, "with `combine=max`"),
    ],
)
def test_rerank_refused(lab: Lab, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    built(lab, tmp_path, reading(lab, tmp_path, "jsonl"), "int8")
    with pytest.raises(UsageError, match=message):
        ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, device="cpu", **settings)
