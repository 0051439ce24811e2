"""A journal that is damaged: named, never returned as data, and what is sound of it kept when the run is repaired."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

import ghoststore
from ghoststore.errors import CorruptError
from ghoststore.store import RunWriter
from ghoststore.store.run.journal import HEADER, TRAILER_BYTES, journal_damage, journal_path
from ghoststore.store.run.saver import Saver
from tests.support.harms import flip
from tests.support.runs import JOURNALED, expected, journal, make, run_of, steps_of, train

STEPS = list(range(JOURNALED.steps))
ARRAYS = [spec.name for spec in JOURNALED.arrays()]


@pytest.mark.parametrize(("stride", "of_arrays"), [(37, 37), pytest.param(1, 5, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_named(half: Path, stride: int, of_arrays: int) -> None:
    """By `verify`; and nothing is read that was not written. Bytes of the arrays are alike: every so many of them."""
    data = journal(half).read_bytes()
    size = len(data) // 2
    sound = [expected(name, list(range(10))) for name in ARRAYS]
    for place in range(0, len(data), stride):
        if place % of_arrays and HEADER.size <= place % size < size - TRAILER_BYTES:
            continue
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        journal(half).write_bytes(changed)
        run = run_of(half)
        damage = journal_damage(run)
        assert [file for file, _ in damage] == ["journal/00000000.log"] * len(damage) != [], place
        for name, numbers in zip(ARRAYS, sound, strict=True):
            with suppress(CorruptError):
                np.testing.assert_array_equal(run.read_committed(name), numbers)
        with pytest.raises(CorruptError, match=r"journal/00000000\.log"), RunWriter(run_of(half)):
            pass
        assert journal(half).read_bytes() == changed


@pytest.mark.thin(1)
@pytest.mark.parametrize("stop", [23, 12])
def test_a_flipped_byte_of_the_short_last_interval(tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of fewer steps is as whole as the others."""
    layout = replace(JOURNALED, steps=stop, span_steps=15)
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_commit_if_full", lambda self, span: None)
        train(store, layout=layout)
    span = (stop - 1) // 15
    data = journal(store, span).read_bytes()
    assert steps_of(run_of(store))[-1] == stop - 1
    for place in range(len(data) - 1, 0, -29):
        changed = bytearray(data)
        changed[place] ^= 4
        journal(store, span).write_bytes(changed)
        assert journal_damage(run_of(store)), (place, len(data))


def first_field(name: str, value: int) -> Callable[[bytes], bytes]:
    """A change of the first header that its checksum does not tell."""

    def change(data: bytes) -> bytes:
        fields = list(HEADER.unpack(data[: HEADER.size]))
        fields[("magic", "start", "stop", "bytes").index(name)] = value
        header = struct.pack("<8s7q32s", *fields[:-1])
        return header + google_crc32c.value(header).to_bytes(4, "little") + data[HEADER.size :]

    return change


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "start": first_field("start", -5),
    "far": first_field("start", 10**18),
    "stop": first_field("stop", 10**15),
    "bytes": first_field("bytes", 1 << 62),
    "twice": lambda data: data + data,
    "in the middle": lambda data: data[: len(data) // 2 - 32] + data[len(data) // 2 :],
    "second alone": lambda data: data[len(data) // 2 :],
    "behind": lambda data: data + b"x" * (len(data) // 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_journal_that_cannot_be(half: Path, name: str) -> None:
    """Named, in bounded memory; what is read was written, and nothing is written behind it."""
    journal(half).write_bytes(HOSTILE[name](journal(half).read_bytes()))
    run = run_of(half)
    assert {file for file, _ in journal_damage(run)} == {"journal/00000000.log"}
    if name == "in the middle":  # as if the last entry had been cut off
        assert steps_of(run) == list(range(5))
    else:
        with pytest.raises(CorruptError, match=r"journal/00000000\.log is damaged"):
            run.read_committed("score")
        with pytest.raises(CorruptError, match=r"journal/00000000\.log is damaged"):
            ghoststore.info(half)
    with pytest.raises(CorruptError, match=r"journal/00000000\.log is damaged"), RunWriter(run_of(half)):
        pass


def test_a_journal_of_another_run_or_span(half: Path, tmp_path: Path) -> None:
    train(tmp_path / "other", layout=JOURNALED, stop=20)
    other = journal(tmp_path / "other", 1)
    shutil.copy(other, journal(half, 0))
    assert journal_damage(run_of(half))
    shutil.copy(other, journal(half, 1))
    journal(half, 0).unlink()
    damage = dict(journal_damage(run_of(half)))  # its first span is missing
    assert "steps 0 to 15 are missing" in damage["commits/00000000.json"]
    run = make(tmp_path / "third", layout=JOURNALED, training={"seed": 1})
    shutil.copy(other, journal_path(run.path, 1))
    assert "is not linked" in journal_damage(run_of(tmp_path / "third"))[0][1]
    journal(half, 1).rename(journal(half, 2))
    with pytest.raises(CorruptError, match="a journal of span 2, but there are 2 spans"):
        run_of(half)


def test_a_pipe_for_a_journal(half: Path) -> None:
    """Nothing waits for it."""
    journal(half).unlink()
    os.mkfifo(journal(half))
    assert "a pipe" in journal_damage(run_of(half))[0][1]
    with pytest.raises(CorruptError, match="a pipe"):
        run_of(half).read_committed("score")


# What is done to a whole run.


def harmed(half: Path) -> Path:
    """Its first save interval is damaged, and one more came."""
    train(half, layout=JOURNALED, start=10, stop=20)
    (half / "runs/run/commits/00000000.json").unlink()
    shutil.rmtree(half / "runs/run")
    train(half, layout=replace(JOURNALED, span_steps=20), stop=15)
    data = bytearray(journal(half).read_bytes())
    data[HEADER.size + 7] ^= 1
    journal(half).write_bytes(data)
    return journal(half)


def test_verify_and_repair(half: Path) -> None:
    """Named by `verify`, with what mends it; `repair` takes out what is damaged alone, and training goes on."""
    harmed(half)
    report = ghoststore.verify(half)
    assert [(one.file, one.problem) for one in report.damage] == [
        ("journal/00000000.log", "steps 0 to 5 are not what was written")
    ]
    assert report.unknown == []
    repaired = ghoststore.repair(store=half)
    assert [one.file for one in repaired.unmended] == ["journal/00000000.log"]
    assert "`drop_damaged`" in repaired.unmended[0].why
    repaired = ghoststore.repair(store=half, drop_damaged=True)
    assert (len(repaired.mended), repaired.unmended) == (1, [])
    assert ghoststore.verify(half).sound
    run = run_of(half)
    assert (run.ranges, run.skipped) == ([(5, 15)], [(0, 5)])
    np.testing.assert_array_equal(run.read_committed("score"), expected("score", list(range(5, 15))))
    train(half, layout=replace(JOURNALED, span_steps=20))
    assert run_of(half).complete
    assert ghoststore.verify(half).sound


def test_repair_where_nobody_says_what_was_given_up(tmp_path: Path) -> None:
    store = tmp_path / "store"
    train(store, layout=JOURNALED)
    shutil.rmtree(store / "runs/run/journal")
    assert not ghoststore.verify(store).sound
    assert ghoststore.repair(store=store).unmended == []
    assert ghoststore.verify(store).sound
    (store / "runs/run/journal/skipped.json").write_text("[]")
    assert [one.file for one in ghoststore.verify(store).damage] == ["journal/skipped.json"]
    assert ghoststore.repair(store=store, drop_damaged=True).unmended == []
    assert steps_of(run_of(store)) == STEPS


def test_a_copy_and_what_is_cleared_away(half: Path, tmp_path: Path) -> None:
    copied = ghoststore.copy(store=half, run="run", to_store=tmp_path / "copy")
    assert not copied.complete
    assert steps_of(run_of(tmp_path / "copy")) == list(range(10))
    assert ghoststore.verify(tmp_path / "copy").sound
    data = journal(half).read_bytes()
    train(tmp_path / "copy", layout=JOURNALED, start=10)
    journal(tmp_path / "copy").write_bytes(data)
    assert [one.file for one in ghoststore.verify(tmp_path / "copy").leftovers] == ["journal/00000000.log"]
    assert [one.file for one in ghoststore.gc(store=tmp_path / "copy").removed] == ["journal/00000000.log"]
    harmed(half)
    with pytest.raises(CorruptError, match="steps 0 to 5 are not what was written"):
        ghoststore.copy(store=half, run="run", to_store=tmp_path / "other")


@pytest.mark.parametrize("where", ["header", "trailer", "array"])
def test_entries_behind_a_damaged_one_are_kept(tmp_path: Path, where: str) -> None:
    store = tmp_path / "store"
    train(store, layout=replace(JOURNALED, steps=100, span_steps=100), stop=32)
    entries = run_of(store).journals[0].entries
    damaged = entries[1]
    at = {"header": damaged.offset + 9, "trailer": damaged.offset + damaged.size - 3, "array": damaged.offset + 120}
    flip(journal(store), at[where])
    assert not ghoststore.verify(store).sound
    repaired = ghoststore.repair(store=store, drop_damaged=True)
    lost = f"taken out: steps {damaged.start + 1} to {damaged.stop} are lost"
    assert [mended.how for mended in repaired.mended] == [lost]
    assert repaired.sound
    assert run_of(store).ranges == [(0, damaged.start), (damaged.stop, entries[-1].stop)]
    assert ghoststore.verify(store).sound


def test_a_journal_of_another_run_is_not_taken_in(tmp_path: Path) -> None:
    """However whole: it is taken out, and none of its numbers become this run's."""
    layout = replace(JOURNALED, steps=100, span_steps=100)
    store, other = tmp_path / "store", tmp_path / "other"
    train(store, layout=layout, stop=32)
    train(other, layout=replace(layout, steps=200, span_steps=100), stop=32)
    shutil.copy(journal(other), journal(store))
    assert not ghoststore.verify(store).sound
    repaired = ghoststore.repair(store=store, drop_damaged=True)
    assert repaired.mended
    assert run_of(store).ranges == []
