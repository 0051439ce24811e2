"""Gradients that a run keeps of every so many steps: what is on the disk, and that nothing is for the other steps."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import ghoststore
from ghoststore.errors import CorruptError, UsageError
from ghoststore.store import Run, RunLayout, RunWriter, Store
from ghoststore.store.part.encoding import ENCODINGS
from ghoststore.store.run.gradients import GradientLayout
from ghoststore.store.run.journal import journal_path
from ghoststore.store.run.pieces import side_by_side
from ghoststore.store.run.visits import stream_visits
from tests.support.harms import flip
from tests.support.runs import KEEPING, expected, files, make, steps_of, train, values

KEPT = KEEPING.gradients
ARRAYS = [spec.name for spec in KEEPING.arrays()]
assert KEPT is not None


def run_of(store: Path) -> Run:
    return Store.open(store).run()


def test_steps_come_back_from_journal_and_chunks(tmp_path: Path) -> None:
    """After every save interval, whatever is in a journal and what in chunks already."""
    store = tmp_path / "store"
    with RunWriter(make(store, layout=KEEPING)) as writer:
        for start, stop in ((0, 6), (6, 12), (12, 18), (18, 23)):
            for step in range(start, stop):
                writer.append(step, values(step, KEEPING))
            writer.flush()
            assert steps_of(run_of(store)) == list(range(stop))
            assert ghoststore.verify(store).sound
    whole = run_of(store)
    assert whole.array("gradient").shape == (8, 2, 3, 8)
    assert zarr.open(store, mode="r")["runs/run/val_step"][:].tolist() == [step - 1 for step in range(0, 23, 3)]
    said = ghoststore.info(store).runs[0].gradients
    assert said == {"every": 3, "steps": 8, "dtype": "int8", "dimension": 8, "step_bytes": 7 * (8 + 2 * 4)}


@pytest.mark.slow
def test_other_steps_take_no_space(tmp_path: Path) -> None:
    """A run that keeps a tenth has a tenth of the bytes."""
    sizes = {}
    for every in (1, 10):
        layout = replace(KEEPING, steps=40, save_steps=10, span_steps=40, gradients=replace(KEPT, every=every))
        train(tmp_path / f"{every}", layout=layout)
        folder = tmp_path / f"{every}" / "runs" / "run" / "gradient" / "c"
        sizes[every] = sum(path.stat().st_size - 4 for path in folder.rglob("*") if path.is_file())
    assert sizes == {1: 40 * 6 * 8, 10: 4 * 6 * 8}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_window(data: st.DataObject) -> None:
    """Kept arrays beside those of every step, cut anywhere, of a run that is in both forms."""
    run = _shared_run()
    start = data.draw(st.integers(0, 17))
    stop = data.draw(st.integers(start + 1, 18))
    names = data.draw(st.lists(st.sampled_from(ARRAYS), min_size=1, unique=True))
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for piece in side_by_side(run, names, [(start, stop)]):
        for name in names:
            found[name].append(piece.data[name].copy())
    for name in names:
        steps = list(range(start, stop))
        got = np.concatenate(found[name])
        np.testing.assert_array_equal(got, expected(name, steps, KEEPING))
        np.testing.assert_array_equal(run.read(name, start, stop), expected(name, steps, KEEPING))


_SHARED: list[Run] = []


def _shared_run() -> Run:
    return _SHARED[0]


@pytest.fixture(scope="module", autouse=True)
def _make_shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first span in chunks, an interval of the second in its journal."""
    _SHARED[:] = [train(tmp_path_factory.mktemp("shared") / "store", layout=KEEPING, stop=20)]
    assert (_SHARED[0].spans, _SHARED[0].length) == ([0], 18)


def test_visits_are_decoded(tmp_path: Path) -> None:
    run = _shared_run()
    seen = list(stream_visits(run, [(1, 18)], val=True))
    steps = [step for piece in seen for step in np.unique(piece.step).tolist()]
    assert steps == [3, 6, 9, 12, 15]
    vectors = np.concatenate([piece.vectors for piece in seen])
    places = [
        (int(s), int(r), int(p)) for piece in seen for s, r, p in zip(piece.step, piece.rank, piece.place, strict=True)
    ]
    for vector, (step, rank, place) in zip(vectors, places, strict=True):
        given = values(step, KEEPING)
        wanted = KEPT.decode(given["gradient"][rank, place][None], given["gradient_scale"][rank, place][None])
        np.testing.assert_array_equal(vector, wanted[0])
    assert all((6 - (step % 3 == 0)) == sum(place[0] == step for place in places) for step in steps)
    val = np.concatenate([piece.val for piece in seen if piece.val is not None])
    for vector, step in zip(val, steps, strict=True):
        given = values(step, KEEPING)
        wanted = KEPT.decode(given["val_gradient"][None], given["val_gradient_scale"][None])
        np.testing.assert_array_equal(vector, wanted[0])


@pytest.mark.slow
def test_pending_steps_are_restored(tmp_path: Path) -> None:
    """A training that goes on from a checkpoint in the middle of a save interval writes the same bytes."""
    whole = tmp_path / "whole"
    train(whole, layout=KEEPING)
    for stop in (4, 11):
        store = tmp_path / f"{stop}"
        with RunWriter(make(store, layout=KEEPING)) as writer:
            for step in range(stop):
                writer.append(step, values(step, KEEPING))
            pending = writer.pending()
        with RunWriter(make(store, layout=KEEPING)) as writer:
            writer.restore(pending)
            for step in range(stop, KEEPING.steps):
                writer.append(step, values(step, KEEPING))
        assert files(store) == files(whole)


@pytest.mark.thin(2)
@pytest.mark.parametrize("array", ["gradient", "gradient_scale", "val_gradient", "val_step"])
def test_a_flipped_byte_is_named(array: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(_shared_run().path.parent.parent, store)
    folder = store / "runs" / "run"
    (chunk,) = [path for path in (folder / array / "c").rglob("*") if path.is_file()]
    flip(chunk, 3)
    (damage,) = ghoststore.verify(store).damage
    assert damage.file == str(chunk.relative_to(folder))
    with pytest.raises(CorruptError, match=str(chunk.relative_to(folder))):
        run_of(store).read_committed(array)
    assert steps_of_others(run_of(store), array) == list(range(18))


def steps_of_others(run: Run, array: str) -> list[int]:
    steps = run.committed_steps().tolist()
    for name in ARRAYS:
        if name != array:
            np.testing.assert_array_equal(run.read_committed(name), expected(name, steps, run.layout))
    return steps


def test_every_flip_in_a_journal_is_named(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(_shared_run().path.parent.parent, store)
    log = journal_path(store / "runs" / "run", 1)
    size = log.stat().st_size
    for place in range(0, size, size // 24):
        flip(log, place)
        assert [damage.file for damage in ghoststore.verify(store).damage] == ["journal/00000001.log"], place
        flip(log, place)
    assert ghoststore.verify(store).sound


@pytest.mark.slow
def test_a_lost_record_is_restored_and_a_copy_is_whole(tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(_shared_run().path.parent.parent, store)
    record = store / "runs" / "run" / "commits" / "00000000.json"
    before = record.read_bytes()
    record.unlink()
    assert [damage.file for damage in ghoststore.verify(store).damage] == ["commits/00000000.json"]
    ghoststore.repair(store)
    assert record.read_bytes() == before
    shutil.rmtree(store / "runs" / "run" / "val_gradient" / "c")
    (store / "runs" / "run" / "gradient" / "zarr.json").unlink()
    ghoststore.repair(store, drop_damaged=True)
    assert run_of(store).ranges == [(12, 18)]
    ghoststore.copy(_shared_run().path.parent.parent, run="run", to_store=tmp_path / "other")
    assert steps_of(run_of(tmp_path / "other")) == list(range(18))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not whole times 4 steps"):
        replace(KEEPING, gradients=replace(KEPT, every=4))
    rounded = RunLayout.saving(10, steps=100, ranks=1, batch=2, rows=9, gradients=replace(KEPT, every=4))
    assert (rounded.interval, rounded.span_steps % 12) == (12, 0)
    assert RunLayout.of(rounded.to_json()) == rounded
    with pytest.raises(UsageError, match="`keep_gradients` must be at least 1"):
        replace(KEPT, every=0)
    with pytest.raises(UsageError, match="do not follow one another"):
        replace(KEPT, groups=(("a", 0, 3), ("b", 4, 8)))
    with RunWriter(make(tmp_path / "store", layout=KEEPING)) as writer:
        writer.append(0, values(0, KEEPING))
        with pytest.raises(UsageError, match="'gradient' is of one step in 3"):
            writer.append(1, values(1, KEEPING) | {"gradient": values(0, KEEPING)["gradient"]})
        writer.append(1, values(1, KEEPING))
        writer.append(2, values(2, KEEPING))
        with pytest.raises(UsageError, match=r"'gradient' of a step is of float64; expected int8"):
            writer.append(3, values(3, KEEPING) | {"gradient": np.zeros((2, 3, 8))})


@pytest.mark.parametrize("dtype", list(ENCODINGS))
def test_encodings(dtype: str) -> None:
    """What is finite comes back as a part has it; what is not is no vector."""
    kept = GradientLayout(every=1, dtype=dtype, groups=(("a", 0, 5), ("b", 5, 12)))
    vectors = np.random.default_rng(0).standard_normal((6, 12)).astype(np.float32)
    vectors[2, 3], vectors[4, 0] = np.nan, np.inf
    stored, scale = kept.encode(vectors)
    finite = [0, 1, 3, 5]
    decoded = kept.decode(stored, scale)
    assert np.isnan(decoded[[2, 4]]).all()
    own = ENCODINGS[dtype].encode(vectors[finite], kept.groups)
    np.testing.assert_array_equal(decoded[finite], ENCODINGS[dtype].decode(own.stored, own.scale, kept.groups))
    assert kept.arrays.vectors == "gradient"
    assert (kept.arrays.scale is None) == (scale is None)
