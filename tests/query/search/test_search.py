"""Exact search against the obvious computation in NumPy on the stored vectors, through `ghoststore.query` alone.

The val set is built into a part of its own: its stored vectors are the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.store.part.encoding import ENCODINGS
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

SKETCHED = ProjectionConfig(precondition="none", compress=256)  # one sketch for all dtypes
PLAIN = ProjectionConfig(precondition="none", rank_total=16)
Listed = list[tuple[int, float]]


@pytest.fixture(scope="module")
def val(lab: Lab) -> Path:
    return lab.write(lab.folder / "val.jsonl", [row | {"id": f"v{i}"} for i, row in enumerate(lab.sample_rows(5, 3))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


def store_of(lab: Lab, folder: Path, data: Path, **settings: Any) -> Path:
    """A store with one part; made once for the same settings."""
    store = folder / "-".join([data.stem, *(f"{value}" for value in settings.values() if isinstance(value, str | int))])
    projection = settings.get("projection")
    store = store.with_name(store.name + ("-plain" if projection is PLAIN else "-sketch" if projection else ""))
    settings = {"span_rows": 6, "proj_dtype": "float32"} | settings
    if not store.exists():
        ghoststore.build(checkpoint=lab.checkpoint, data=data, store=store, device="cpu", **settings)
    return store


def vectors(store: Path) -> np.ndarray:
    """Stored numbers, as float64."""
    part = ghoststore.Store.open(store).part()
    return vectors_of(part).astype(np.float64)


def brute_force(rows_ND: np.ndarray, query_D: np.ndarray, metric: str) -> np.ndarray:
    scores = rows_ND @ query_D
    return scores if metric == "dot" else scores / (np.linalg.norm(rows_ND, axis=1) * np.linalg.norm(query_D))


def best(scores_N: np.ndarray, k: int) -> list[int]:
    """Best first, equal scores by lower row."""
    return np.lexsort((np.arange(len(scores_N)), -scores_N))[:k].tolist()


def listed(hits: Sequence[Any]) -> Listed:
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    return [(hit.source_row, hit.score) for hit in hits]


def agree(found: Listed, scores_N: np.ndarray, k: int) -> None:
    rows = best(scores_N, k)
    assert [row for row, _ in found] == rows
    np.testing.assert_allclose(
        [score for _, score in found], scores_N[rows], rtol=2e-5, atol=2e-6 * abs(scores_N).max()
    )


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("projection", [SKETCHED, PLAIN], ids=["sketched", "plain"])
@pytest.mark.parametrize("dtype", ENCODINGS)
@pytest.mark.parametrize("each", [True, False], ids=["each", "mean"])
def test_equals_brute_force(
    lab: Lab, folder: Path, val: Path, metric: str, dtype: str, projection: ProjectionConfig, each: bool
) -> None:
    store = store_of(lab, folder, lab.corpus, proj_dtype=dtype, projection=projection)
    rows_ND = vectors(store)
    queries_QD = vectors(store_of(lab, folder, val, projection=projection))
    if not each:
        queries_QD = queries_QD.mean(0, keepdims=True)
    found = ghoststore.query(store=store, val_set=val, metric=metric, each=each, top_k=7, bottom_k=5, device="cpu")
    assert [result.query for result in found.results] == ([f"v{i}" for i in range(5)] if each else ["mean"])
    for result, query_D in zip(found.results, queries_QD, strict=True):
        scores_N = brute_force(rows_ND, query_D, metric)
        agree(listed(result.hits), scores_N, 7)
        agree([(row, -score) for row, score in listed(result.bottom)], -scores_N, 5)


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("span_rows", [2, 27, 1000])
def test_span_size_changes_nothing(lab: Lab, folder: Path, val: Path, span_rows: int) -> None:
    """Nor does the cut into chunks: the ranking is the same, the scores to rounding."""
    wanted = {"val_set": val, "top_k": 27, "bottom_k": 27, "device": "cpu"}
    one = ghoststore.query(store=store_of(lab, folder, lab.corpus), **wanted).results[0]
    other = ghoststore.query(store=store_of(lab, folder, lab.corpus, span_rows=span_rows), **wanted).results[0]
    for mine, theirs in ((one.hits, other.hits), (one.bottom, other.bottom)):
        assert [hit.id for hit in mine] == [hit.id for hit in theirs]
        np.testing.assert_allclose([hit.score for hit in mine], [hit.score for hit in theirs], rtol=1e-3, atol=1e-5)


@pytest.mark.thin(1)
@pytest.mark.parametrize("span_rows", [3, 8, 64])
def test_ties_go_to_the_lower_row(lab: Lab, tmp_path: Path, span_rows: int) -> None:
    """Equal rows, each in a batch of its own, have equal bits; they come in the order of the corpus."""
    texts = ["the cat sees", "old red moon", "the cat sees", "a dog runs", "the cat sees", "old red moon"] * 4
    data = lab.write(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    val = lab.write(tmp_path / "val.jsonl", [{"text": "the cat sees"}])
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=data,
        store=tmp_path / "store",
        span_rows=span_rows,
        batch_tokens=1,
        device="cpu",
    )
    same = [row for row, text in enumerate(texts) if text == "the cat sees"]
    for k in (5, len(same), 24):
        hits = ghoststore.query(store=tmp_path / "store", val_set=val, top_k=k, device="cpu").results[0].hits
        assert [hit.source_row for hit in hits][: len(same)] == same[:k]
        for left, right in pairwise(hits):
            assert (-left.score, left.source_row) < (-right.score, right.source_row)
    bottom = ghoststore.query(store=tmp_path / "store", val_set=val, top_k=0, bottom_k=24, device="cpu").results[0]
    assert bottom.hits == []
    for left, right in pairwise(bottom.bottom):
        assert (left.score, left.source_row) < (right.score, right.source_row)


def test_more_than_there_is(lab: Lab, folder: Path, val: Path) -> None:
    found = ghoststore.query(
        store=store_of(lab, folder, lab.corpus), val_set=val, top_k=10**9, bottom_k=28, device="cpu"
    ).results[0]
    assert sorted(hit.source_row for hit in found.hits) == list(range(27))
    assert [hit.source_row for hit in found.bottom] == [hit.source_row for hit in reversed(found.hits)]


@pytest.mark.thin(2)
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize(
    ("layers", "exclude", "left"),
    [
        (["mlp"], [], ["mlp.c_fc", "mlp.c_proj"]),
        (["attn", "mlp.c_fc"], [], ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]),
        ([], ["c_proj"], ["attn.c_attn", "mlp.c_fc"]),
        (["h.0"], ["attn"], ["mlp.c_fc", "mlp.c_proj"]),
    ],
)
def test_some_layers(
    lab: Lab, folder: Path, val: Path, metric: str, layers: list[str], exclude: list[str], left: list[str]
) -> None:
    store = store_of(lab, folder, lab.corpus, projection=PLAIN)
    part = ghoststore.Store.open(store).part()
    groups = {name.removeprefix("transformer.h.0."): slice(start, stop) for name, start, stop in part.groups}
    assert len(groups) == 4
    columns = np.concatenate([np.arange(part.layout.dimension)[groups[name]] for name in left])
    query_D = vectors(store_of(lab, folder, val, projection=PLAIN)).mean(0)
    scores_N = brute_force(vectors(store)[:, columns], query_D[columns], metric)
    found = ghoststore.query(
        store=store, val_set=val, metric=metric, layers=layers, exclude_layers=exclude, top_k=9, device="cpu"
    )
    agree(listed(found.results[0].hits), scores_N, 9)


def test_no_layer_is_left(lab: Lab, folder: Path, val: Path) -> None:
    store = store_of(lab, folder, lab.corpus, projection=PLAIN)
    with pytest.raises(UsageError, match=r"no layer of part .* is left"):
        ghoststore.query(store=store, val_set=val, layers=["mlp"], exclude_layers=["mlp"], device="cpu")
    with pytest.raises(UsageError, match="'nothing' matches no layer of part"):
        ghoststore.query(store=store, val_set=val, layers=["nothing"], device="cpu")


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_row_is_nearest_to_itself(lab: Lab, folder: Path, dtype: str) -> None:
    store = store_of(lab, folder, lab.corpus, proj_dtype=dtype)
    found = ghoststore.query(store=store, val_set=lab.corpus, each=True, metric="cosine", top_k=1, device="cpu")
    assert [result.query for result in found.results] == [row["id"] for row in lab.rows]
    assert [result.hits[0].id for result in found.results] == [row["id"] for row in lab.rows]
    scores = [result.hits[0].score for result in found.results]
    np.testing.assert_allclose(scores, 1.0, atol=1e-5)


def test_max_samples(lab: Lab, folder: Path, val: Path) -> None:
    store = store_of(lab, folder, lab.corpus, projection=SKETCHED)
    two = ghoststore.query(store=store, val_set=val, max_samples=2, top_k=4, device="cpu")
    assert two.settings["val_rows"] == 2
    scores_N = brute_force(
        vectors(store), vectors(store_of(lab, folder, val, projection=SKETCHED))[:2].mean(0), "cosine"
    )
    agree(listed(two.results[0].hits), scores_N, 4)


def test_two_parts(lab: Lab, tmp_path: Path, val: Path) -> None:
    store = tmp_path / "store"
    for name, seed in (("a", 0), ("b", 1)):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=lab.corpus,
            store=store,
            name=name,
            projection=ProjectionConfig(precondition="none", seed=seed),
            device="cpu",
        )
    with pytest.raises(UsageError, match="several parts; choose one with `part`: a, b"):
        ghoststore.query(store=store, val_set=val, device="cpu")
    a, b = (ghoststore.query(store=store, val_set=val, part=name, top_k=27, device="cpu") for name in "ab")
    assert (a.settings["part"], b.settings["part"]) == ("a", "b")
    assert [hit.score for hit in a.results[0].hits] != [hit.score for hit in b.results[0].hits]
