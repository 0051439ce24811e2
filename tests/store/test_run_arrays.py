"""What a training run appends is read again, and nothing else: step arrays and the row table."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

import ghoststore
from ghoststore.errors import UsageError
from ghoststore.store import RowTable, Run, RunLayout, RunWriter, Store, create_run
from ghoststore.store.spans.reader import stream
from tests.support.runs import LAYOUT, SPANS, expected, make, manifest, row_table, train

if TYPE_CHECKING:
    pass

STEPS = list(range(LAYOUT.steps))
ARRAYS = [spec.name for spec in LAYOUT.arrays()]
COLUMNS = [spec.name.removeprefix("rows/") for spec in LAYOUT.row_arrays()]


@pytest.mark.parametrize("array", ARRAYS)
def test_every_array_comes_back(trained: Path, array: str) -> None:
    run = Store.open(trained).run()
    whole = expected(array, STEPS)
    for found in (run.read_committed(array), run.read(array, 0, LAYOUT.steps)):
        assert found.dtype == whole.dtype
        np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(run.read(array, 4, 21), whole[4:21])
    np.testing.assert_array_equal(run.read_committed(array, [3, 1]), expected(array, [*range(15, 20), *range(5, 10)]))


def test_what_a_run_says_of_itself(trained: Path) -> None:
    run = Store.open(trained).run()
    assert (run.name, run.spans, run.steps, run.complete) == ("run", list(range(SPANS)), 23, True)
    assert (run.layout, run.domains, run.manifest) == (LAYOUT, ["sky", "earth"], manifest())
    assert run.committed_steps().tolist() == STEPS
    assert run.committed_steps([4]).tolist() == [20, 21, 22]
    assert run.commit(4).statuses == {"scored": 17, "unscored": 0, "not_finite": 0}
    assert run.commit(4).tokens == sum(96 + step for step in (20, 21, 22))
    assert [chunk.start for chunk in stream(run, "score")] == [0, 5, 10, 15, 20]


def test_what_is_not_given_is_nan(tmp_path: Path) -> None:
    layout = RunLayout(steps=3, ranks=1, batch=2, span_steps=10, rows=4)
    run = make(tmp_path / "store", layout=layout)
    with RunWriter(run) as writer:
        for step in range(3):
            writer.append(step, {"sample": [[step, -1]]})
    run = Store.open(tmp_path / "store").run()
    assert run.complete
    assert run.read_committed("sample").tolist() == [[[0, -1]], [[1, -1]], [[2, -1]]]
    assert run.read_committed("tokens").tolist() == [0, 0, 0]
    names = {spec.name for spec in layout.arrays()}
    assert names == set(ARRAYS) - {"group_score", "block_score", "vector"}
    for name in names - {"sample", "tokens"}:
        assert np.isnan(run.read_committed(name)).all()
    assert run.commit(0).statuses == {"scored": 0, "unscored": 3, "not_finite": 0}
    (info,) = ghoststore.info(tmp_path / "store").runs
    assert (info.train_loss, info.val_loss, info.negative) == (None, None, None)


def test_scores_that_are_not_finite_are_kept_and_counted(tmp_path: Path) -> None:
    layout = RunLayout(steps=1, ranks=1, batch=4, span_steps=1, rows=4)
    with RunWriter(make(tmp_path / "store", layout=layout)) as writer:
        writer.append(0, {"sample": [[0, 1, 2, 3]], "score": [[1e300, -np.inf, np.nan, -2.0]]})
    run = Store.open(tmp_path / "store").run()
    assert run.read_committed("score").ravel().tolist()[:2] == [np.inf, -np.inf]
    assert run.commit(0).statuses == {"scored": 1, "unscored": 1, "not_finite": 2}
    assert ghoststore.info(tmp_path / "store").runs[0].negative == 1.0


def test_chunks_are_parts_of_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks: several a span, none across two, and a span of twelve steps is not cut by five."""
    monkeypatch.setattr("ghoststore.store.run.layout.CHUNK_BYTES", 5 * 2 * 3 * 4 * 4)
    layout = replace(LAYOUT, steps=30, span_steps=12)
    chunks = {spec.name: spec.chunk_rows for spec in layout.arrays()}
    assert (chunks["vector"], chunks["group_score"], chunks["sample"], chunks["tokens"]) == (4, 6, 6, 12)
    run = train(tmp_path / "store", layout=layout)
    assert sorted(key for key in run.commit(1).files if "vector" in key) == [f"vector/c/{i}/0/0/0" for i in (3, 4, 5)]
    for name in ARRAYS:
        np.testing.assert_array_equal(run.read_committed(name), expected(name, list(range(30)), layout))
        np.testing.assert_array_equal(run.read(name, 11, 30), expected(name, list(range(11, 30)), layout))
    assert ghoststore.verify(tmp_path / "store").sound


@pytest.mark.parametrize("dimension", [1, 1000, 65_536])
@pytest.mark.parametrize("span", [1, 7, 100, 500])
def test_chunks_stay_below_eight_mebibytes(span: int, dimension: int) -> None:
    layout = RunLayout(steps=10_000, ranks=4, batch=8, span_steps=span, rows=10, dimension=dimension)
    for spec in layout.arrays():
        assert spec.chunk_bytes <= 8 << 20 or spec.chunk_rows == 1
        assert span % spec.chunk_rows == 0


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"ranks": 0},
        {"batch": -1},
        {"span_steps": 0},
        {"rows": 0},
        {"dimension": 0},
        {"dimension": 2_000_000},
        {"groups": ("law", "law")},
        {"blocks": ("mlp", "mlp")},
    ],
)
def test_layouts_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(change))}|vector"):
        replace(LAYOUT, **change)


def test_plain_zarr_reads_everything(trained: Path, tmp_path: Path) -> None:
    """Without ghoststore, without a warning: every array by its documented path, and no number of what is not there."""
    half = tmp_path / "store"
    train(half, stop=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = zarr.open(trained, mode="r")["runs/run"]
        assert {name for name, _ in run.arrays()} == set(ARRAYS)
        assert {name for name, _ in run["rows"].arrays()} == set(COLUMNS)
        for name in ARRAYS:
            np.testing.assert_array_equal(run[name][...], expected(name, STEPS))
        for name in COLUMNS:
            assert run[f"rows/{name}"][...].tolist() == getattr(row_table(), name).tolist()
        assert run["group_score"].metadata.dimension_names == ("step", "rank", "place", "group")
        assert run.attrs["manifest"]["storage"]["groups"] == ["law", "code"]
        half_run = zarr.open(half, mode="r")["runs/run"]
        assert np.isnan(half_run["score"][10:]).all()
        assert (half_run["sample"][10:] == -1).all()


def test_rows(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, twice, across chunks; each chunk is read once and each file checked once."""
    monkeypatch.setattr("ghoststore.store.run.layout.ROW_CHUNK", 16)
    run = make(tmp_path / "store")
    table = row_table()
    reads: list[str] = []
    checks: list[str] = []
    real_slice, real_check = Run.slice, Run.check_file
    monkeypatch.setattr(Run, "slice", lambda self, spec, *at: reads.append(spec.name) or real_slice(self, spec, *at))
    monkeypatch.setattr(Run, "check_file", lambda self, name: checks.append(name) or real_check(self, name))
    wanted = [39, 0, 17, 0, 16, 31, 15, 38]
    assert len(run.rows) == 40
    for name in COLUMNS:
        assert run.rows.read_rows(name, wanted).tolist() == getattr(table, name)[wanted].tolist()
        assert run.rows.read(name, 3, 37).tolist() == getattr(table, name)[3:37].tolist()
        assert (
            run.rows.read_rows(name, np.array([], dtype=np.int64)).tolist() == run.rows.read(name, 4, 4).tolist() == []
        )
    assert len(reads) == len(COLUMNS) * (3 + 1)
    assert sorted(checks) == sorted(
        [f"rows/{name}/c/{i}" for name in COLUMNS for i in range(3)] + [f"rows/{name}/zarr.json" for name in COLUMNS]
    )
    for bad in ([40], [-1], [3, 10**12]):
        with pytest.raises(UsageError, match="which has 40"):
            run.rows.read_rows("domain", bad)
    with pytest.raises(UsageError, match="has no column 'text'; it has: sample_id"):
        run.rows.read("text", 0, 1)
    with pytest.raises(UsageError, match="which has 40"):
        run.rows.read("domain", 0, 41)


@pytest.mark.parametrize(
    ("column", "bad", "words"),
    [
        ("n_tokens", np.arange(39), r"shape \(39,\); the run has 40 rows"),
        ("source_row", np.arange(40.0), "not int64: float64"),
        ("source_file", np.full(40, 2**31), "not int32: int64"),
        ("source_digest", np.full(40, -1), "not uint64"),
        ("domain", np.full(40, 2), "outside -1 to 1"),
        ("domain", np.full(40, -2), "outside -1 to 1"),
        ("sample_id", np.arange(40), "not strings"),
        ("sample_id", np.array(["\ud800"] * 40, dtype=object), "not Unicode text"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, column: str, bad: np.ndarray, words: str) -> None:
    path = Store.create(tmp_path / "store").run_path("run")
    table = RowTable(**{name: getattr(row_table(), name) for name in COLUMNS} | {column: bad})
    with pytest.raises(UsageError, match=f"{column} of the row table .*{words}"):
        create_run(path, manifest(), table)
    assert Store.open(tmp_path / "store").run_names() == []
