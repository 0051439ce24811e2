"""Several parts, one a checkpoint, queried as the weighted sum of their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import MismatchError, UsageError
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab

# One projection for all dtypes: each has a default of its own.
PROJECTION = ProjectionConfig(compress=256)
RATES = (1e-3, 2.5e-4)
ROWS = 40


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, one with the state of ``ghoststore train`` beside it and one with that of the Trainer."""
    folder = tmp_path_factory.mktemp("parts")
    rows: list[dict[str, Any]] = lab.sample_rows(ROWS, 1)
    rows[5]["text"] = ""
    data = lab.write(folder / "train.jsonl", rows)
    lab.write(folder / "val.jsonl", [row | {"task": ("a", "b")[i % 2]} for i, row in enumerate(lab.sample_rows(5, 3))])
    for place, name in enumerate(("one", "two")):
        checkpoint = lab.model(folder / name, seed=place)
        if place == 0:
            (checkpoint / "training_state").mkdir()
            (checkpoint / "training_state" / "state.json").write_text(json.dumps({"learning_rate": RATES[0]}))
        else:
            logged = [{"learning_rate": 1.0, "step": 1}, {"learning_rate": RATES[1], "step": 2}, {"eval_loss": 3.0}]
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": logged}))
        ghoststore.build(
            checkpoint=checkpoint,
            data=data,
            store=folder / "store",
            name=name,
            span_rows=16,
            device="cpu",
            projection=PROJECTION,
            proj_dtype=("float32", "float16")[place],
        )
    return folder / "store"


def scores(store: Path, part: Any, **settings: Any) -> dict[str, dict[int, float]]:
    """Score by source row, by query."""
    settings = {"each": True, "top_k": ROWS, "text": False, "device": "cpu"} | settings
    found = ghoststore.query(store=store, val_set=store.parent / "val.jsonl", part=part, **settings)
    return {result.query: {hit.source_row: hit.score for hit in result.hits} for result in found.results}


@pytest.mark.thin(3)
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("weights", [None, "learning-rate", "equal", (0.3, 7.0), (1.0, 0.0)])
@pytest.mark.parametrize("precondition", ["none", "second-moment"])
def test_equals_the_sum_of_single_queries(store: Path, metric: str, weights: Any, precondition: str) -> None:
    settings = {"metric": metric, "precondition": precondition}
    singles = [scores(store, name, **settings) for name in ("one", "two")]
    numbers = RATES if weights in (None, "learning-rate") else (1.0, 1.0) if weights == "equal" else weights
    found = scores(store, ["one", "two"], part_weights=weights, **settings)
    assert list(found) == list(singles[0])
    for query, by_row in found.items():
        expected = {row: sum(w * one[query][row] for w, one in zip(numbers, singles, strict=True)) for row in by_row}
        assert len(by_row) == ROWS - 1
        largest = max(map(abs, expected.values()))
        for row, score in by_row.items():
            assert score == pytest.approx(expected[row], rel=1e-9, abs=1e-9 * largest)
        assert list(by_row) == sorted(by_row, key=lambda row: (-by_row[row], row))


def test_order_of_parts_and_the_rest_of_the_query(store: Path) -> None:
    """bottom_k, groups and combination work on the sum; the result says what was summed."""
    both = {"part": ["one", "two"], "each": False, "group_field": "task"}
    one_way = scores(store, **both)
    other = scores(store, **(both | {"part": ["two", "one"]}))
    assert list(one_way) == ["combined", "a", "b"]
    for query, by_row in one_way.items():
        assert by_row == pytest.approx(other[query])
    for row, score in one_way["combined"].items():
        assert score == pytest.approx((one_way["a"][row] + one_way["b"][row]) / 2)
    found = ghoststore.query(
        store=store, val_set=store.parent / "val.jsonl", part=["one", "two"], top_k=0, bottom_k=3, device="cpu"
    )
    assert found.settings["parts"] == ["one", "two"]
    assert found.settings["part_weights"] == list(RATES)
    lowest = scores(store, ["one", "two"], each=False)["mean"]
    assert [hit.source_row for hit in found.results[0].bottom] == list(lowest)[::-1][:3]


def test_chunks_of_different_sizes(lab: Lab, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of other dtypes are cut into other chunks: rows still meet."""
    settings: dict[str, Any] = {
        "data": store.parent / "train.jsonl",
        "projection": PROJECTION,
        "span_rows": 16,
        "device": "cpu",
    }
    for name, dtype, size in (("one", "float32", 4096), ("two", "float16", 3 * 4096)):
        monkeypatch.setattr("ghoststore.store.part.layout.CHUNK_BYTES", size)
        ghoststore.build(
            checkpoint=store.parent / name, store=tmp_path / "store", name=name, proj_dtype=dtype, **settings
        )
    parts = [ghoststore.Store.open(tmp_path / "store").part(name) for name in ("one", "two")]
    assert parts[0].layout.chunk_rows < parts[1].layout.chunk_rows <= 16
    val_set = store.parent / "val.jsonl"
    found = [
        [
            (hit.source_row, hit.score)
            for hit in ghoststore.query(
                store=where, val_set=val_set, part=["one", "two"], top_k=ROWS, metric="dot", text=False, device="cpu"
            )
            .results[0]
            .hits
        ]
        for where in (tmp_path / "store", store)
    ]
    assert [row for row, _ in found[0]] == [row for row, _ in found[1]]
    np.testing.assert_allclose([score for _, score in found[0]], [score for _, score in found[1]], rtol=2e-3)


def test_only_rows_that_all_parts_have(lab: Lab, store: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    unbuild(ghoststore.Store.open(copy).part("two"), 1)
    lab.write(tmp_path / "val.jsonl", [row | {"task": "a"} for row in lab.sample_rows(5, 3)])
    found = scores(copy, ["one", "two"], each=False)["mean"]
    assert sorted(found) == [row for row in range(ROWS) if row != 5 and not 16 <= row < 32]


def test_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    val_set = store.parent / "val.jsonl"

    def ask(**settings: Any) -> None:
        ghoststore.query(store=store, val_set=val_set, device="cpu", **settings)

    for settings, message in [
        ({"part": ["one", "one"]}, "given twice"),
        ({"part": ["one", "three"]}, "no part 'three'"),
        ({"part": ["one", "two"], "part_weights": [1.0]}, "1 numbers for 2 parts"),
        ({"part": ["one", "two"], "part_weights": [1.0, -1.0]}, "0 or more"),
        ({"part": ["one", "two"], "part_weights": [0.0, 0.0]}, "not all 0"),
        ({"part": ["one", "two"], "part_weights": [1.0, float("nan")]}, "0 or more"),
        ({"part": ["one", "two"], "part_weights": "rate"}, "learning-rate, equal"),
        ({"part": "one", "part_weights": "equal"}, "several parts"),
        ({"part": ["one", "two"], "checkpoint": store.parent / "one"}, "cannot stand for another"),
    ]:
        with pytest.raises(UsageError, match=message):
            ask(**settings)
    bare = tmp_path / "bare"
    for name in ("one", "two"):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=lab.corpus,
            store=bare,
            name=name,
            device="cpu",
            projection=ProjectionConfig(precondition="none", seed=int(name == "two")),
        )
    with pytest.raises(MismatchError, match=r"projection\.seed"):
        ghoststore.query(store=bare, val_set=lab.corpus, part=["one", "two"], device="cpu")
    plain = ProjectionConfig(precondition="none")
    ghoststore.build(
        checkpoint=lab.checkpoint, data=lab.corpus, store=bare, name="three", projection=plain, device="cpu"
    )
    with pytest.raises(UsageError, match="does not say at which learning rate"):
        ghoststore.query(store=bare, val_set=lab.corpus, part=["one", "three"], device="cpu")
