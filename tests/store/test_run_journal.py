"""Save intervals of a span that is not full: committed in its journal, read with the rest, and chunks in the end."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import ghoststore
from ghoststore.errors import CorruptError, UsageError
from ghoststore.store import Run, RunLayout, RunWriter
from ghoststore.store.run.journal import HEADER, journal_damage
from ghoststore.store.run.pieces import side_by_side
from ghoststore.store.run.saver import Saver
from tests.support.runs import JOURNALED, expected, files, journal, make, run_of, steps_of, train, values

STEPS = list(range(JOURNALED.steps))
ARRAYS = [spec.name for spec in JOURNALED.arrays()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a run that was never interrupted."""
    store = tmp_path_factory.mktemp("whole") / "store"
    train(store, layout=JOURNALED)
    return files(store)


def test_every_save_interval_is_committed_at_once(tmp_path: Path) -> None:
    """A reader sees it as soon as the writer says so; it lies in one file until its span is full."""
    store = tmp_path / "store"
    with RunWriter(make(store, layout=JOURNALED)) as writer:
        reader = run_of(store)
        for start, stop, logs in ((0, 5, [0]), (5, 10, [0]), (10, 15, []), (15, 20, [1]), (20, 23, [])):
            for step in range(start, stop):
                writer.append(step, values(step))
            writer.flush()
            assert reader.reload() == [(start, stop)]
            assert steps_of(reader) == steps_of(run_of(store)) == list(range(stop))
            assert [path for path in (journal(store, 0), journal(store, 1)) if path.exists()] == [
                journal(store, span) for span in logs
            ]
            assert journal_damage(run_of(store)) == []
    run = run_of(store)
    assert (run.spans, run.complete, run.journals) == ([0, 1], True, {})


def test_a_finished_run_is_whole_to_plain_zarr(whole: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    train(store, layout=JOURNALED)
    assert files(store) == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = zarr.open(store, mode="r")["runs/run"]
        assert {name for name, _ in run.arrays()} == set(ARRAYS)
        for name in ARRAYS:
            np.testing.assert_array_equal(run[name][...], expected(name, STEPS))


def test_the_same_numbers_as_with_short_spans(half: Path, tmp_path: Path) -> None:
    """In every way of reading; `info` counts the same."""
    train(tmp_path / "short", stop=12)
    mine, short = run_of(half), run_of(tmp_path / "short")
    assert mine.committed_steps().tolist() == short.committed_steps().tolist() == list(range(10))
    for name in ARRAYS:
        for read in (lambda run, name=name: run.read(name, 2, 9), lambda run, name=name: run.read_committed(name)):
            np.testing.assert_array_equal(read(mine), read(short))
    seen, other = ghoststore.info(half).runs[0], ghoststore.info(tmp_path / "short").runs[0]
    for field in ("complete", "committed", "train_loss", "val_loss", "negative", "statuses", "tokens"):
        assert getattr(seen, field) == getattr(other, field)
    assert seen.bytes == journal(half).stat().st_size
    for wrong in ((8, 11), (10, 12), (20, 23)):
        with pytest.raises(UsageError, match="are not committed"):
            mine.read("score", *wrong)
    with pytest.raises(UsageError, match=r"spans \[1\] of run 'run' are not committed"):
        mine.read_committed("score", [1])


def test_a_cache_sees_the_journal(half: Path) -> None:
    before = run_of(half).fingerprint()
    assert before == run_of(half).fingerprint()
    train(half, layout=JOURNALED, start=10, stop=15)
    committed = run_of(half).fingerprint()
    train(half, layout=JOURNALED, start=15, stop=20)
    assert len({before, committed, run_of(half).fingerprint()}) == 3


@pytest.mark.parametrize("stop", [12, 14])
def test_a_reader_that_is_overtaken(half: Path, stop: int) -> None:
    """It was opened when the span had a journal: the span is committed, and the reader still reads its state."""
    reader = run_of(half)
    pieces = side_by_side(reader, ["score"], reader.ranges)
    train(half, layout=JOURNALED, start=10)
    assert not journal(half).exists()
    np.testing.assert_array_equal(next(pieces).data["score"], expected("score", list(range(10))))
    assert steps_of(reader) == list(range(10))
    assert reader.reload() == [(10, 23)]
    assert steps_of(reader) == STEPS


def test_a_reader_whose_journal_is_gone(half: Path) -> None:
    reader = run_of(half)
    journal(half).unlink()
    with pytest.raises(CorruptError, match=r"journal/00000000\.log is missing, and its span is not committed"):
        reader.read_committed("score")


# A writer that died.


@pytest.mark.parametrize("stride", [41, pytest.param(3, marks=pytest.mark.slow)])
def test_a_tail_that_was_not_finished(half: Path, whole: dict[str, bytes], stride: int, tmp_path: Path) -> None:
    """Cut anywhere in its last entry, the journal has the entry before, and a writer goes on to the same bytes."""
    data = journal(half).read_bytes()
    size = len(data) // 2
    ends = {*range(size, len(data), stride), size + HEADER.size, *(len(data) - back for back in (1, 31, 32, 33))}
    if stride == 3:
        ends |= {*range(size, size + HEADER.size + 2), *range(len(data) - 34, len(data))}
    for place, end in enumerate(sorted(ends)):
        journal(half).write_bytes(data[:end])
        run = run_of(half)
        assert steps_of(run) == list(range(5))
        assert journal_damage(run) == []
        if place % 20 == 0:
            copy = Path(shutil.copytree(half, tmp_path / f"copy-{end}"))
            train(copy, layout=JOURNALED, start=5)
            assert files(copy) == whole


@pytest.mark.parametrize("kept", ["header", "most", "all"])
def test_zeros_where_nothing_was_flushed(half: Path, whole: dict[str, bytes], kept: str) -> None:
    """After a power cut the file may have its length without its bytes."""
    data = journal(half).read_bytes()
    size = len(data) // 2
    there = {"header": 0, "most": size // 2, "all": size - 32}[kept]
    journal(half).write_bytes(data[: size + there] + bytes(size - there))
    assert steps_of(run_of(half)) == list(range(5))
    assert journal_damage(run_of(half)) == []
    train(half, layout=JOURNALED, start=5)
    assert files(half) == whole


def bits_between(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def half_trailers(right: bytes) -> list[bytes]:
    """What may be on the disk of a trailer that lies over the end of a block."""
    length = len(right)
    ends = [right[:k] + bytes(length - k) for k in range(1, length)]
    beginnings = [bytes(k) + right[k:] for k in range(1, length)]
    # One bit that is gone is a flipped bit.
    return [trailer for trailer in [*ends, *beginnings] if bits_between(trailer, right) > 1]


def test_half_a_trailer(half: Path, whole: dict[str, bytes]) -> None:
    """The power went while it was being flushed: its entry was not committed yet, and is written again."""
    data = journal(half).read_bytes()
    torn = half_trailers(data[-32:])
    assert len(torn) >= 60
    for trailer in torn:
        journal(half).write_bytes(data[:-32] + trailer)
        run = run_of(half)
        assert run.ranges == [(0, 5)]
        assert journal_damage(run) == []
    train(half, layout=JOURNALED, start=5)
    assert files(half) == whole


def test_a_trailer_that_is_no_half(half: Path) -> None:
    """Beside zeros, only the right bytes; over an entry that is whole; and nothing behind it."""
    data = journal(half).read_bytes()
    torn = data[:-32] + data[-32:-16] + bytes(16)
    wrong = bytearray(torn)
    wrong[-30] ^= 1
    middle = data[:-20] + bytes(8) + data[-12:]
    other = bytearray(torn)
    other[len(data) // 2 + HEADER.size + 9] ^= 1
    behind = torn + data[len(data) // 2 :]
    for changed in (bytes(wrong), middle, bytes(other), behind, data[:-32] + bytes(31) + b"x"):
        journal(half).write_bytes(changed)
        damage = journal_damage(run_of(half))
        assert {file for file, _ in damage} == {"journal/00000000.log"}
        with pytest.raises(CorruptError, match=r"journal/00000000\.log"), RunWriter(run_of(half)):
            pass


def test_a_journal_whose_span_is_committed(half: Path, whole: dict[str, bytes]) -> None:
    """The writer died between the record and the journal's end: the record holds, the journal goes."""
    data = journal(half).read_bytes()
    train(half, layout=JOURNALED, start=10)
    journal(half).write_bytes(data[:-40])
    assert steps_of(run_of(half)) == STEPS
    assert journal_damage(run_of(half)) == []
    train(half, layout=JOURNALED, start=23)
    assert files(half) == whole


def test_a_full_journal_without_a_record(half: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer died before it could make chunks of it: every step is there, and the next writer makes them."""
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_commit_if_full", lambda self, span: None)
        train(half, layout=JOURNALED, start=10, stop=15)
    assert run_of(half).spans == []
    assert steps_of(run_of(half)) == list(range(15))
    train(half, layout=JOURNALED, start=15)
    assert files(half) == whole


# Damage.


# Steps that do not come.


def test_steps_that_are_given_up(tmp_path: Path) -> None:
    """A gap inside a span, over a whole one, and up to the end of one: said by the writer, seen by the reader."""
    layout = replace(JOURNALED, steps=63)
    store = tmp_path / "store"
    with RunWriter(train(store, layout=layout, stop=5)) as writer:
        writer.skip_to(52)
        for step in range(52, 58):
            writer.append(step, values(step, layout))
    run = run_of(store)
    assert run.ranges == [(0, 5), (50, 55)]
    assert run.skipped == [(5, 50)]
    assert (run.spans, sorted(run.journals)) == ([0], [3])
    assert journal_damage(run) == []
    assert (run.read("sample", 50, 52) == -1).all()
    np.testing.assert_array_equal(run.read("score", 52, 55), expected("score", [52, 53, 54], layout))
    with RunWriter(run_of(store)) as writer:
        assert writer.next_step == 15
        for step in range(55):  # from the beginning: what was given up is welcome where its span is open
            writer.append(step, values(step, layout))
        for step in range(55, 63):
            writer.append(step, values(step, layout))
    run = run_of(store)
    assert run.ranges == [(0, 5), (15, 63)]
    assert (run.skipped, run.spans, journal_damage(run)) == ([(5, 15)], [0, 1, 2, 3, 4], [])
    np.testing.assert_array_equal(run.read("score", 15, 50), expected("score", list(range(15, 50)), layout))


def test_pending_steps_of_a_store_that_is_gone(tmp_path: Path) -> None:
    with RunWriter(make(tmp_path / "lost", layout=JOURNALED)) as writer:
        for step in range(13):
            writer.append(step, values(step))
        pending = writer.pending()
    assert pending["step"].tolist() == [10, 11, 12]
    with RunWriter(make(tmp_path / "store", layout=JOURNALED)) as writer:
        writer.restore(pending)
        for step in range(13, 23):
            writer.append(step, values(step))
    run = run_of(tmp_path / "store")
    assert steps_of(run) == list(range(10, 23))
    assert (run.skipped, journal_damage(run), run.complete) == ([(0, 10)], [], False)


def test_steps_that_are_given_up_while_a_reader_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look at what was given up and its look at the records: they are no steps to it."""
    from ghoststore.store.run import run as module

    store, real, looks = tmp_path / "store", module.read_skipped, []
    train(store, layout=JOURNALED, stop=12)

    def read(*arguments: object) -> list[tuple[int, int]]:
        seen = real(*arguments)
        looks.append(seen)
        if len(looks) == 1:
            with RunWriter(run_of(store)) as writer:
                writer.skip_to(15)
        return seen

    monkeypatch.setattr(module, "read_skipped", read)
    run = run_of(store)
    assert (run.spans, run.ranges, run.skipped) == ([0], [(0, 10)], [(10, 15)])


def test_a_record_that_is_lost_is_named(tmp_path: Path) -> None:
    """A hole that nobody declared; the writer's own gaps are none."""
    store = tmp_path / "store"
    train(store, layout=JOURNALED)
    (store / "runs/run/commits/00000000.json").unlink()
    path = store / "runs/run"
    assert journal_damage(Run(path)) == [("commits/00000000.json", "steps 0 to 15 are missing")]
    skipped = store / "runs/run/journal/skipped.json"
    skipped.write_text('{"steps": [[0, 15]]}')  # without its checksum
    assert [file for file, _ in journal_damage(Run(path))] == ["journal/skipped.json"]
    with pytest.raises(CorruptError, match=r"skipped\.json"):
        Run(path).read_committed("score")


# How many files.


def footprint(folder: Path) -> tuple[int, int]:
    """(files, their bytes), who writes aside."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and ".writers" not in path.parts]
    return len(sizes), sum(sizes)


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ({"ranks": 1, "batch": 16}, 200_000),
        ({"ranks": 8, "batch": 32}, 100_000),
        ({"ranks": 1, "batch": 16, "blocks": tuple(f"block-{i}" for i in range(48))}, 200_000),
        ({"ranks": 2, "batch": 8, "dimension": 4096}, 20_000),
    ],
)
@pytest.mark.parametrize("every", [1, 7, 10, 1000])
def test_files_of_a_long_run(shape: dict[str, int], steps: int, every: int) -> None:
    """At most one a 4 MiB, a few aside: by the layout."""
    layout = RunLayout.saving(every, steps=steps, rows=1000, **shape)
    specs = layout.arrays()
    size = sum(steps * spec.width * spec.dtype.itemsize for spec in specs)
    count = sum(len(layout.chunk_keys(spec, span)) for span in range(layout.spans) for spec in specs) + layout.spans
    assert layout.span_steps % every == 0
    assert all(spec.chunk_bytes <= 8 << 20 for spec in specs)
    assert count <= size / (4 << 20) + len(specs) + 4
    span = sum(min(layout.span_steps, steps) * spec.width * spec.dtype.itemsize for spec in specs)
    assert span <= 2 * (12 * 8 << 20) * 1.2 or layout.span_steps == every


@pytest.mark.slow
def test_a_long_run_leaves_few_files(tmp_path: Path) -> None:
    """20,000 steps, saved every ten: what the disk has while it is written, and then."""
    layout = RunLayout.saving(10, steps=20_000, ranks=1, batch=16, rows=100)
    store = tmp_path / "store"
    run = make(store, layout=layout)
    before = footprint(run.path)[0]
    rng = np.random.default_rng(0)
    sample = rng.integers(0, 100, (1, 16))
    score = rng.standard_normal((1, 16))
    with RunWriter(run) as writer:
        for step in range(19_990):
            writer.append(step, {"sample": sample, "score": score + step, "learning_rate": 0.5})
        writer.flush()
        assert footprint(run.path)[0] == before + 1
        assert run.steps == 19_990
        for step in range(19_990, 20_000):
            writer.append(step, {"sample": sample, "score": score + step, "learning_rate": 0.5})
    assert footprint(run.path)[0] == before + len(layout.arrays()) + 1
    assert run_of(store).read("score", 12_345, 12_346)[0, 0, 0] == np.float32(score[0, 0] + 12_345)
