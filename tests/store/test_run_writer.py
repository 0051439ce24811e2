"""Steps are gathered into spans: their order, what is pending in a checkpoint, and what a reader sees."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ghoststore.errors import CorruptError, UsageError
from ghoststore.store import RunWriter, Store
from ghoststore.store.spans.withdrawn import withdraw
from tests.support.runs import LAYOUT, expected, files, make, train, values

if TYPE_CHECKING:
    pass

STEPS = list(range(LAYOUT.steps))
ARRAYS = [spec.name for spec in LAYOUT.arrays()]
COLUMNS = [spec.name.removeprefix("rows/") for spec in LAYOUT.row_arrays()]


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
        before = {path: data for path, data in before.items() if path.parent.name != ".writers"}
        for step in (0, 9, 3):  # committed: never changes
            writer.append(step, values(step) | {"tokens": 1})
        for step in range(11, 23):
            writer.append(step, values(step))
    assert {path: path.read_bytes() for path in before} == before
    run.reload()
    assert run.complete
    np.testing.assert_array_equal(run.read_committed("tokens"), expected("tokens", STEPS))


@pytest.mark.thin(2)
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
        reader = Store.open(tmp_path / "store").run()
        assert (reader.spans, reader.steps, reader.read_committed("score").shape) == ([], 0, (0, 2, 3))
        for step in range(12):
            writer.append(step, values(step))
        writer.flush()
        assert writer.run.spans == [0, 1]
        assert reader.spans == []
        assert reader.reload() == [(0, 10)]
        assert reader.reload() == []
        np.testing.assert_array_equal(reader.read_committed("score"), expected("score", list(range(10))))
        for step in range(12, 15):
            writer.append(step, values(step))
        writer.flush()
        assert reader.reload() == [(10, 15)]
        assert (Store.open(tmp_path / "store").run().steps, reader.steps) == (15, 15)


def test_opening_reads_neither_rows_nor_arrays(run_store: Path) -> None:
    """So that a view of a run may open it every second."""
    run = run_store / "runs/run"
    for folder in ("rows", *ARRAYS):
        shutil.rmtree(run / folder)
    opened = Store.open(run_store).run()
    assert (opened.steps, opened.complete) == (23, True)
    with pytest.raises(CorruptError, match=r"rows/domain/c/0 is missing"):
        opened.rows.read("domain", 0, 1)
    with pytest.raises(CorruptError, match=r"score/c/0/0/0 is missing"):
        opened.read("score", 0, 1)


def test_a_gap_is_seen(run_store: Path) -> None:
    """Where a span was taken out: appending begins there, and what comes after it stays."""
    withdraw(Store.open(run_store).run(), 1)
    run = Store.open(run_store).run()
    left = [*range(5), *range(10, 23)]
    assert (run.steps, run.complete, run.committed_steps().tolist()) == (18, False, left)
    np.testing.assert_array_equal(run.read_committed("loss"), expected("loss", left))
    with RunWriter(run) as writer:
        for step in STEPS:
            writer.append(step, values(step))
    assert run.reload() == [(5, 10)]
    np.testing.assert_array_equal(run.read_committed("loss"), expected("loss", STEPS))


@pytest.mark.thin(1)
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
    with RunWriter(Store.open(store).run()) as writer:
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
    with RunWriter(Store.open(store).run()) as writer:
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
    run = Store.open(tmp_path / "store").run()
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
        (lambda p: p.update(step=p["step"] + 1), "not the beginning of a save interval"),
        (lambda p: p.update(step=p["step"][::-1]), "not the beginning of a save interval"),
        (lambda p: p.update(step=np.arange(6)), "more than a save interval"),
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
    assert Store.open(tmp_path / "store").run().steps == 5


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
    run = Store.open(tmp_path / "store").run()
    assert run.committed_steps().tolist() == [*range(5), *range(15, 23)]
    assert (run.read("sample", 15, 17) == -1).all()
    assert np.isnan(run.read("score", 15, 17)).all()
    np.testing.assert_array_equal(run.read("score", 17, 23), expected("score", list(range(17, 23))))
