"""Training runs in the store: what is appended is read again, and nothing else."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

import ghoststore
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import RowTable, Run, RunLayout, RunWriter, Store, create_run
from ghoststore.store.base.records import json_digest
from ghoststore.store.spans.reader import stream
from tests.support.runs import LAYOUT, SPANS, expected, make, manifest, row_table, train, values

if TYPE_CHECKING:
    from tests.conftest import Lab

STEPS = list(range(LAYOUT.steps))
ARRAYS = [spec.name for spec in LAYOUT.arrays()]
COLUMNS = [spec.name.removeprefix("rows/") for spec in LAYOUT.row_arrays()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one complete run: copy it before changing it."""
    store = tmp_path_factory.mktemp("trained") / "store"
    train(store)
    return store


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


def open_run(store: Path) -> Run:
    return Store.open(store).run()


@pytest.mark.parametrize("array", ARRAYS)
def test_every_array_comes_back(trained: Path, array: str) -> None:
    run = open_run(trained)
    whole = expected(array, STEPS)
    for found in (run.read_committed(array), run.read(array, 0, LAYOUT.steps)):
        assert found.dtype == whole.dtype
        np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(run.read(array, 4, 21), whole[4:21])
    np.testing.assert_array_equal(run.read_committed(array, [3, 1]), expected(array, [*range(15, 20), *range(5, 10)]))


def test_what_a_run_says_of_itself(trained: Path) -> None:
    run = open_run(trained)
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
    run = open_run(tmp_path / "store")
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
    run = open_run(tmp_path / "store")
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


def test_steps_come_in_order(tmp_path: Path) -> None:
    run = train(tmp_path / "store", stop=10)
    with RunWriter(run) as writer:
        for wrong in (11, 22):
            with pytest.raises(UsageError, match=f"step {wrong} is out of order: step 10 comes next"):
                writer.append(wrong, values(wrong))
        for outside in (-1, 23):
            with pytest.raises(UsageError, match="outside run 'run' of 23 steps"):
                writer.append(outside, values(0))
        writer.append(10, values(10))
        with pytest.raises(UsageError, match="step 10 is out of order: step 11 comes next"):
            writer.append(10, values(10))
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        for step in (0, 9, 3):  # committed: never changes
            writer.append(step, values(step) | {"tokens": 1})
        for step in range(11, 23):
            writer.append(step, values(step))
    assert {path: path.read_bytes() for path in before} == before
    run.reload()
    assert run.complete
    np.testing.assert_array_equal(run.read_committed("tokens"), expected("tokens", STEPS))


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample": None}, "lacks 'sample'"),
        ({"score": np.zeros((3, 2))}, r"'score' of a step has shape \(3, 2\); expected \(2, 3\)"),
        ({"group_score": np.zeros((2, 3))}, r"'group_score' .* expected \(2, 3, 2\)"),
        ({"vector": np.zeros((2, 3, 5))}, r"'vector' .* expected \(2, 3, 4\)"),
        ({"tokens": np.zeros(1, dtype=int)}, r"'tokens' .* expected \(\)"),
        ({"tokens": 1.5}, "'tokens' of a step is of float64; expected int64"),
        ({"sample": np.zeros((2, 3))}, "'sample' of a step is of float64; expected int64"),
        ({"loss": np.full((2, 3), "x")}, "'loss' of a step is of <U1"),
        ({"sample": np.full((2, 3), 40)}, "the run has rows 0 to 39"),
        ({"sample": np.full((2, 3), -2)}, "'sample' .* rows -2 to -2"),
        ({"sample": np.full((2, 3), -1)}, "'score' of step 20 has numbers where 'sample' is -1"),
        ({"momentum": 1.0}, r"has no arrays \['momentum'\]; it has: sample, score"),
    ],
)
def test_values_that_do_not_fit(trained: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """The array is named, and the step can be appended again as it should be."""
    run = train(tmp_path / "store", stop=20)
    with RunWriter(run) as writer:
        bad = {name: value for name, value in (values(20) | change).items() if value is not None}
        with pytest.raises(ValueError, match=words):
            writer.append(20, bad)
        for step in (20, 21, 22):
            writer.append(step, values(step))
    assert files(tmp_path / "store") == files(trained)


def files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_a_span_that_is_not_full_is_not_there(trained: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "store", stop=14)
    assert (run.spans, run.steps, run.complete) == ([0, 1], 10, False)
    assert not (run.path / "score/c/2").exists()
    with pytest.raises(UsageError, match=r"steps 8 to 11 of run 'run' are not committed \(span 2\)"):
        run.read("score", 8, 11)
    with pytest.raises(UsageError, match=r"spans \[2\] of run 'run' are not committed"):
        run.read_committed("score", [1, 2])
    with pytest.raises(UsageError, match="has no array 'momentum'"):
        run.read("momentum", 0, 1)
    train(tmp_path / "store", start=10)
    assert files(tmp_path / "store") == files(trained)


def test_a_reader_sees_what_is_committed_at_that_moment(tmp_path: Path) -> None:
    with RunWriter(make(tmp_path / "store")) as writer:
        reader = open_run(tmp_path / "store")
        assert (reader.spans, reader.steps, reader.read_committed("score").shape) == ([], 0, (0, 2, 3))
        for step in range(12):
            writer.append(step, values(step))
        writer.flush()
        assert writer.run.spans == [0, 1]
        assert reader.spans == []
        assert reader.reload() == [0, 1]
        assert reader.reload() == []
        np.testing.assert_array_equal(reader.read_committed("score"), expected("score", list(range(10))))
        for step in range(12, 15):
            writer.append(step, values(step))
        writer.flush()
        assert reader.reload() == [2]
        assert (open_run(tmp_path / "store").steps, reader.steps) == (15, 15)


def test_opening_reads_neither_rows_nor_arrays(store: Path) -> None:
    """So that a view of a run may open it every second."""
    run = store / "runs/run"
    for folder in ("rows", *ARRAYS):
        shutil.rmtree(run / folder)
    opened = open_run(store)
    assert (opened.steps, opened.complete) == (23, True)
    with pytest.raises(CorruptError, match=r"rows/domain/c/0 is missing"):
        opened.rows.read("domain", 0, 1)
    with pytest.raises(CorruptError, match=r"score/c/0/0/0 is missing"):
        opened.read("score", 0, 1)


def test_a_gap_is_seen(store: Path) -> None:
    """A record that is gone takes its span along; appending begins there, and what comes after it stays."""
    (store / "runs/run/commits/00000001.json").unlink()
    run = open_run(store)
    left = [*range(5), *range(10, 23)]
    assert (run.steps, run.complete, run.committed_steps().tolist()) == (18, False, left)
    np.testing.assert_array_equal(run.read_committed("loss"), expected("loss", left))
    with RunWriter(run) as writer:
        for step in STEPS:
            writer.append(step, values(step))
    assert run.reload() == [1]
    np.testing.assert_array_equal(run.read_committed("loss"), expected("loss", STEPS))


@pytest.mark.thin(2)
@pytest.mark.parametrize("step", [10, 11, 14, 15, 21, 22])
def test_pending_steps_survive_in_a_checkpoint(trained: Path, tmp_path: Path, step: int) -> None:
    """Through a file without pickle; the bytes are those of a run that was not interrupted."""
    store = tmp_path / "store"
    file = io.BytesIO()
    with RunWriter(make(store)) as writer:
        for before in range(step):
            writer.append(before, values(before))
        pending = writer.pending()
        assert writer.run.steps + len(pending["step"]) == step
        np.savez(file, **pending)
        if step == 11:
            writer.append(step, values(step))  # not in the checkpoint: appended again below
    assert pending["step"].tolist() == list(range(step // 5 * 5, step))
    assert {name: array.dtype for name, array in pending.items() if name != "step"} == {
        spec.name: spec.dtype for spec in LAYOUT.arrays()
    }
    file.seek(0)
    with RunWriter(open_run(store)) as writer:
        writer.restore(dict(np.load(file, allow_pickle=False)))
        for after in range(step, 23):
            writer.append(after, values(after))
    assert files(store) == files(trained)


def test_pending_steps_of_a_span_that_was_committed_since_are_dropped(trained: Path, tmp_path: Path) -> None:
    """The checkpoint is older than the store: steps that are computed again are not written again."""
    store = tmp_path / "store"
    with RunWriter(make(store)) as writer:
        for step in range(7):
            writer.append(step, values(step))
        pending = writer.pending()
        for step in range(7, 16):
            writer.append(step, values(step))
    with RunWriter(open_run(store)) as writer:
        writer.restore(pending)
        for step in range(7, 23):
            writer.append(step, values(step))
    assert files(store) == files(trained)


def test_pending_steps_of_a_store_that_is_gone(tmp_path: Path) -> None:
    """They are kept where they belong; what is lost is a gap, not a shift."""
    with RunWriter(make(tmp_path / "lost")) as writer:
        for step in range(13):
            writer.append(step, values(step))
        pending = writer.pending()
    with RunWriter(make(tmp_path / "store")) as writer:
        writer.restore(pending)
        for step in range(13, 23):
            writer.append(step, values(step))
    run = open_run(tmp_path / "store")
    assert run.committed_steps().tolist() == list(range(10, 23))
    np.testing.assert_array_equal(run.read_committed("vector"), expected("vector", list(range(10, 23))))


def test_pending_steps_that_do_not_fit(tmp_path: Path) -> None:
    with RunWriter(make(tmp_path / "store")) as writer:
        for step in range(3):
            writer.append(step, values(step))
        pending = writer.pending()
        with pytest.raises(UsageError, match="before others are appended"):
            writer.restore(pending)
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda p: p.pop("score"), "have the arrays"),
        (lambda p: p.pop("step"), "have the arrays"),
        (lambda p: p.update(step=p["step"] + 1), "not the beginning of a span"),
        (lambda p: p.update(step=p["step"][::-1]), "not the beginning of a span"),
        (lambda p: p.update(step=np.arange(6)), "more than a span"),
        (lambda p: p.update(score=p["score"][:, :1]), "'score' of a step has shape"),
        (lambda p: p.update(sample=p["sample"] + 1000), "the run has rows"),
    ]
    with RunWriter(make(tmp_path / "store")) as writer:
        for change, words in changes:
            changed = dict(pending)
            change(changed)
            with pytest.raises(UsageError, match=words):
                writer.restore(changed)
        writer.restore(pending)
        for step in range(3, 5):
            writer.append(step, values(step))
    assert open_run(tmp_path / "store").steps == 5


def test_going_on_without_what_was_lost(tmp_path: Path) -> None:
    """Training is further than its store: the gap is explicit."""
    with RunWriter(train(tmp_path / "store", stop=5)) as writer:
        with pytest.raises(UsageError, match="cannot skip to step 4: step 5 comes next"):
            writer.skip_to(4)
        writer.skip_to(17)
        with pytest.raises(UsageError, match="step 18 is out of order: step 17 comes next"):
            writer.append(18, values(18))
        for step in range(17, 23):
            writer.append(step, values(step))
        with pytest.raises(UsageError, match="cannot skip to step 23"):
            writer.skip_to(23)
    run = open_run(tmp_path / "store")
    assert run.committed_steps().tolist() == [*range(5), *range(15, 23)]
    assert (run.read("sample", 15, 17) == -1).all()
    assert np.isnan(run.read("score", 15, 17)).all()
    np.testing.assert_array_equal(run.read("score", 17, 23), expected("score", list(range(17, 23))))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"model": {"architecture": "GPT2-Small", "layers": 2}}, "stored 'GPT2-Tiny', asked for 'GPT2-Small'"),
        ({"training": {"seed": 1, "learning_rate": 0.001}}, "training.seed: stored 0, asked for 1"),
        ({"training": {"seed": 0}}, "training.learning_rate: stored 0.001, asked for None"),
        ({"val": {"fingerprint": "sha256:w"}}, "val.fingerprint: stored 'sha256:v', asked for 'sha256:w'"),
        ({"storage": replace(LAYOUT, span_steps=4).to_json()}, "storage.span_steps: stored 5, asked for 4"),
        ({"storage": replace(LAYOUT, groups=("law",)).to_json()}, r"groups: stored .*'code'\], asked for \['law'\]"),
    ],
)
def test_another_run_of_the_same_name_is_refused(store: Path, section: dict[str, Any], words: str) -> None:
    before = files(store)
    with pytest.raises(MismatchError, match=words) as caught:
        make(store, **section)
    assert "run 'run' of" in str(caught.value)
    assert "was trained with other settings; nothing was changed" in str(caught.value)
    assert files(store) == before


def test_what_only_describes_a_run_may_differ(store: Path) -> None:
    before = files(store)
    storage = {**LAYOUT.to_json(), "groups": ("law", "code")}  # as JSON it is the same
    run = make(store, software={"python": "4"}, source={"data": "moved.jsonl"}, storage=storage)
    assert run.manifest == manifest()
    assert files(store) == before


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"training": {"seed": np.float32(1)}}, "not plain JSON"),
        ({"training": {"learning_rate": float("nan")}}, "not plain JSON"),
        ({"storage": {"steps": 1}}, "in its storage or corpus"),
        ({"corpus": {}}, "in its storage or corpus"),
    ],
)
def test_manifests_that_cannot_be(tmp_path: Path, section: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(tmp_path / "store", **section)
    lacking = {name: value for name, value in manifest().items() if name != "val"}
    with pytest.raises(UsageError, match=r"lacks the sections \['val'\]"):
        create_run(Store.open(tmp_path / "store").run_path("run"), lacking, row_table())


def reseal(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a run's attributes as one who knows the checksums would."""
    path = store / "runs/run/zarr.json"
    metadata = json.loads(path.read_text())
    attributes = metadata["attributes"]
    change(attributes)
    attributes["manifest_sha256"] = json_digest(attributes["manifest"])
    attributes["files_sha256"] = json_digest(attributes["files"])
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    "storage",
    [
        {"steps": 10**18},
        {"steps": 10**18, "span_steps": 10**18},
        {"steps": 10**18, "span_steps": 1},
        {"steps": -1},
        {"ranks": 10**15},
        {"dimension": 10**15},
        {"groups": "law"},
        {"blocks": None},
        {"steps": None},
        {"steps": float("inf")},
        {"batch": []},
        {"groups": ["x", "x"]},
    ],
)
def test_hostile_shapes(store: Path, storage: dict[str, Any]) -> None:
    """Refused when the run is opened or read, before memory is taken for them."""
    reseal(store, lambda attributes: attributes["manifest"]["storage"].update(storage))
    with pytest.raises((CorruptError, MismatchError)):
        open_run(store).read("score", 0, 5)
    assert not ghoststore.verify(store).sound or "steps" in storage


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["manifest"].pop("scoring"),
        lambda a: a["manifest"].update(storage=[]),
        lambda a: a.update(files=[]),
        lambda a: a.update(manifest=3),
        lambda a: a.update(ghoststore_format=2),
    ],
)
def test_damaged_manifests(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    reseal(store, change)
    with pytest.raises((CorruptError, MismatchError)):
        open_run(store)


def test_a_part_is_not_a_run(store: Path, built: Path) -> None:
    shutil.copytree(built / "parts/part", store / "runs/other")
    with pytest.raises(CorruptError, match=r"lacks the sections .* of a run's manifest"):
        Store.open(store).run("other")


def test_files_outside_the_run(store: Path) -> None:
    """Neither named by a seal nor linked to are they read."""
    reseal(store, lambda attributes: attributes["files"].update({"../../../outside": "0" * 64}))
    assert any("outside the run" in damage.problem for damage in ghoststore.verify(store).damage)
    chunk = store / "runs/run/rows/domain/c/0"
    chunk.unlink()
    chunk.symlink_to("/dev/zero")
    with pytest.raises(CorruptError):
        open_run(store).rows.read("domain", 0, 1)


def test_choosing_a_run(store: Path, tmp_path: Path) -> None:
    opened = Store.open(store)
    with pytest.raises(UsageError, match="has no run 'other'; it has: run"):
        opened.run("other")
    with pytest.raises(UsageError, match=r"'\.\./run' cannot name a run"):
        opened.run("../run")
    make(store, "second")
    assert opened.run_names() == ["run", "second"]
    with pytest.raises(UsageError, match="has several runs; choose one with --run: run, second"):
        opened.run()
    with pytest.raises(UsageError, match="has no runs; `ghoststore train --store"):
        Store.create(tmp_path / "empty").run()
    (store / "runs/second/zarr.json").unlink()
    with pytest.raises(CorruptError, match=r"zarr\.json is missing"):
        opened.run("second")


def test_a_store_of_parts_is_as_it_was(lab: Lab, built: Path) -> None:
    info = ghoststore.info(built)
    assert (len(info.parts), info.runs) == (1, [])
    report = ghoststore.verify(built)
    assert (report.sound, report.parts, report.runs, report.spans) == (True, ["part"], [], 5)
    for command in ("info", "verify"):
        assert (
            "run" not in lab.run(command, "--store", built, "--quiet" * (command == "verify") or "--json").out.split()
        )
        assert lab.run(command, "--store", built, "--run", "x").code == 2
    assert "run(s)" not in lab.run("info", "--store", built).out


def test_info_and_verify_of_runs(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store"))
    train(store, stop=12)
    table = lab.run("info", "--store", store)
    assert table.code == 0, table.err
    for word in ("1 part(s)", "1 run(s)", "10 of 23", "2 × 3", "run", "40"):
        assert word in table.out
    (run,) = lab.run("info", "--store", store, "--json").json["runs"]
    scores = expected("score", list(range(10)))
    assert run["negative"] == pytest.approx((scores < 0).sum() / np.isfinite(scores).sum())
    assert run["train_loss"] == float(expected("train_loss", [9])[0])
    assert run["val_loss"] == float(expected("val_loss", [8])[0])
    assert (run["steps"], run["committed"], run["ranks"], run["batch"], run["rows"]) == (23, 10, 2, 3, 40)
    assert (run["statuses"]["scored"], run["tokens"]) == (56, sum(96 + step for step in range(10)))
    chunks = [file for name in ARRAYS for file in (store / "runs/run" / name / "c").rglob("*") if file.is_file()]
    assert run["bytes"] == sum(file.stat().st_size for file in chunks)
    full = lab.run("info", "--store", store, "--run", "run")
    for word in ("10 of 23 committed", "training.seed", "GPT2-Tiny", "law, code", "scored"):
        assert word in full.out
    assert "27 of 27" not in full.out
    assert "27 of 27" in lab.run("info", "--store", store, "--part", "part").out
    only = lab.run("verify", "--store", store, "--run", "run", "--json").json
    assert (only["parts"], only["runs"], only["spans"], only["sound"]) == ([], ["run"], 2, True)
    only = lab.run("verify", "--store", store, "--part", "part", "--json").json
    assert (only["parts"], only["runs"], only["spans"]) == (["part"], [], 5)
    assert lab.run("verify", "--store", store).out.startswith("sound: 1 part(s), 1 run(s), 7 spans")


@pytest.mark.thin
@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'{"attributes": 3}', b"[" * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("file", ["zarr.json", "commits/00000000.json"])
def test_hostile_json(store: Path, file: str, data: bytes) -> None:
    (store / "runs/run" / file).write_bytes(data)
    with pytest.raises(GhostStoreError):
        ghoststore.info(store)
    assert not ghoststore.verify(store).sound
