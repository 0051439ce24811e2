"""A training run that is killed, or whose disk refuses, at any moment: what was committed stays, and a second writer
ends with the same bytes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import BusyError, StorageError
from ghoststore.store import Run, RunWriter, Store
from tests.support.runs import LAYOUT, SPANS, expected, make, train, values

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

ARRAYS = [spec.name for spec in LAYOUT.arrays()]
UNFINISHED = re.compile(r"(^|/)\.[^/]*\.tmp(/|$)|\.partial$")
HERE = Path(__file__).parent

MOMENTS: dict[str, tuple[str, str, str, int | None]] = {
    # call, path, when, and how many spans are committed then; None: there is no run yet.
    "row-table": ("name", r"rows/source_row/c/0$", "before", None),
    "arrays": ("name", r"/score/zarr\.json$", "after", None),
    "run-unflushed": ("fsync", r"\.run\.[^/]*tmp/rows/sample_id$", "before", None),
    "run-unnamed": ("name", r"runs/run$", "before", None),
    "run-named": ("name", r"runs/run$", "after", 0),
    "first-chunk": ("name", r"run/sample/c/0/0/0$", "before", 0),
    "chunk-named": ("name", r"run/vector/c/1/0/0/0$", "after", 1),
    "between-chunks": ("fsync", r"commits/\.00000002\.tokens\.", "before", 2),
    "record-unwritten": ("fsync", r"commits/\.00000001\.json", "before", 1),
    "record-unnamed": ("name", r"commits/00000003\.json$", "before", 3),
    "record-named": ("name", r"commits/00000003\.json$", "after", 4),
    "last-chunk": ("fsync", r"commits/\.00000004\.score_seconds\.", "after", 4),
    "last-record": ("name", r"commits/00000004\.json$", "after", 5),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an uninterrupted run."""
    store = tmp_path_factory.mktemp("whole") / "store"
    train(store)
    return files(store)


def files(store: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not UNFINISHED.search(name)}


def code(store: Path) -> str:
    """Python for a process of its own that trains."""
    return (
        f"import sys; sys.path.insert(0, {str(HERE)!r})\nimport pathlib, runs; runs.train(pathlib.Path({str(store)!r}))"
    )


def fault(moment: str, act: str) -> dict[str, Any]:
    call, path, when, _ = MOMENTS[moment]
    return {"call": call, "path": path, "when": when, "act": act}


def committed_only(store: Path, spans: int | None) -> None:
    """Every way of reading shows the steps of ``spans`` spans and no others, or that there is no run."""
    if spans is None:
        assert Store.open(store).run_names() == []
        assert ghoststore.info(store).runs == []
        return
    run = Store.open(store).run()
    steps = list(range(min(spans * 5, 23)))
    assert (run.spans, run.steps, run.complete) == (list(range(spans)), len(steps), spans == SPANS)
    for name in ARRAYS:
        np.testing.assert_array_equal(run.read_committed(name), expected(name, steps))
    report = ghoststore.verify(store)
    assert (report.sound, report.spans) == (True, spans), report.damage
    assert ghoststore.info(store).runs[0].committed == len(steps)
    assert run.rows.read("sample_id", 38, 40).tolist() == ["sample-38é", "sample-39é"]


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    outcome = lab.run(code=code(store), fault=fault(moment, "kill"))
    assert outcome.code == -9, outcome.err
    committed_only(store, MOMENTS[moment][3])
    train(store)
    assert files(store) == whole


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", ["run-unnamed", "first-chunk", "record-unwritten", "record-named"])
def test_nothing_is_left_behind(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    """Not even what the killed process had begun."""
    store = tmp_path / "store"
    assert lab.run(code=code(store), fault=fault(moment, "kill")).code == -9
    train(store)
    assert {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()} == whole.keys()


@pytest.mark.slow
@pytest.mark.kill
def test_killed_again_and_again(lab: Lab, whole: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    for moment in ("row-table", "run-named", "first-chunk", "record-unwritten", "record-named", "last-chunk"):
        assert lab.run(code=code(store), fault=fault(moment, "kill")).code == -9
        committed_only(store, MOMENTS[moment][3])
    train(store)
    assert files(store) == whole


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("moment", "error", "words"),
    [
        (moment, *(("EIO", "Input/output error"), ("ENOSPC", "no space is left"))[place % 2])
        for place, moment in enumerate(MOMENTS)
    ],
)
def test_the_disk_refuses(
    lab: Lab, whole: dict[str, bytes], moment: str, error: str, words: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    outcome = lab.run(code=code(store), fault=fault(moment, error))
    assert outcome.code == 1, outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("ghoststore.errors.StorageError: cannot write")
    assert words in last
    committed_only(store, MOMENTS[moment][3])
    train(store)
    assert files(store) == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.kill
def test_a_full_disk(whole: dict[str, bytes], small_disk: Path) -> None:
    """A real one: what is committed is read, and more space helps."""
    store = small_disk / "store"
    run = make(store)
    with pytest.raises(StorageError, match="no space is left"):  # at the end of the block again
        write_until_full(run, small_disk / "ballast")
    committed_only(store, 2)
    (small_disk / "ballast").unlink()
    train(store)
    assert files(store) == whole


def write_until_full(run: Run, ballast: Path) -> None:
    """The disk fills after two spans: every call after the third says so."""
    with RunWriter(run) as writer:
        for step in range(12):
            writer.append(step, values(step))
        writer.flush()
        assert writer.run.spans == [0, 1]
        with suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        for step in range(12, 15):
            writer.append(step, values(step))
        for act in (writer.flush, writer.pending, lambda: writer.append(15, values(15))):
            with pytest.raises(StorageError, match="no space is left"):
                act()


def test_two_writers(whole: dict[str, bytes], tmp_path: Path) -> None:
    """In one process or two: one is refused, and nothing of the other is swept away."""
    store = tmp_path / "store"
    run = make(store)
    with RunWriter(run) as writer:
        for step in range(12):
            writer.append(step, values(step))
        with (
            pytest.raises(BusyError, match="run 'run' is being written by another process"),
            RunWriter(Store.open(store).run()),
        ):
            pass
        for step in range(12, 23):
            writer.append(step, values(step))
    assert files(store) == whole


def test_two_writers_at_the_same_time(lab: Lab, whole: dict[str, bytes], tmp_path: Path) -> None:
    store = tmp_path / "store"
    Store.create(store)
    started = [lab.start(code=code(store)) for _ in range(3)]
    outcomes = [lab.wait(pid) for pid in started]
    assert any(outcome.code == 0 for outcome in outcomes), [outcome.err for outcome in outcomes]
    assert all(outcome.code == 0 or busy(outcome) for outcome in outcomes), [outcome.err for outcome in outcomes]
    assert files(store) == whole


def busy(outcome: Outcome) -> bool:
    return outcome.err.strip().splitlines()[-1].startswith("ghoststore.errors.BusyError")


@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", ["row-table", "run-unnamed", "first-chunk", "record-unnamed"])
def test_overtaken(lab: Lab, whole: dict[str, bytes], moment: str, tmp_path: Path) -> None:
    """A second writer does everything that it may while the first stands still."""
    store = tmp_path / "store"
    Store.create(store)
    first = lab.start(code=code(store), fault=fault(moment, "stop"))
    lab.stopped(first)
    committed_only(store, MOMENTS[moment][3])
    second = lab.run(code=code(store))
    os.kill(first, signal.SIGCONT)
    outcome = lab.wait(first)
    # A run that is not there yet may be made by both: the second then goes on with it.
    assert (second.code == 0 and MOMENTS[moment][3] is None) or busy(second), second.err
    assert outcome.code == 0, outcome.err
    assert files(store) == whole


def test_reading_while_another_process_writes(lab: Lab, tmp_path: Path) -> None:
    """Stopped between two spans: a reader sees the state of that moment, and later the rest."""
    store = tmp_path / "store"
    writer = lab.start(code=code(store), fault=fault("between-chunks", "stop"))
    lab.stopped(writer)
    committed_only(store, 2)
    reader = Store.open(store).run()
    os.kill(writer, signal.SIGCONT)
    assert lab.wait(writer).code == 0
    assert reader.steps == 10
    assert reader.reload() == [(10, 23)]
    committed_only(store, 5)


def test_all_is_on_the_disk_before_the_record_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the record takes nothing with it."""
    import json

    run = make(tmp_path / "store")
    flushed: set[Path] = set()
    unsafe: list[str] = []
    fsync, link, rename = os.fsync, os.link, os.rename

    def watched_fsync(handle: int) -> None:
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def watched_rename(source: Path, target: Path) -> None:
        rename(source, target)
        if source in flushed:
            flushed.add(target)
        flushed.difference_update(target.parents)  # the new name is not on the disk yet

    def watched_link(source: Path, target: Path) -> None:
        record = json.loads(Path(source).read_bytes())
        for key in record.get("files", ()):
            needed = [run.path / key, *(f for f in (run.path / key).parents if f.is_relative_to(run.path))]
            unsafe.extend(str(path) for path in needed if path != run.path and path not in flushed)
        link(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "link", watched_link)
    monkeypatch.setattr(os, "rename", watched_rename)
    train(tmp_path / "store")
    assert flushed
    assert sorted(set(unsafe)) == []
