"""Who writes in a folder: seen by every machine, forgotten when dead, and what a living one has begun is left alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zarr

from ghoststore.errors import BusyError, StorageError
from ghoststore.store.base import disk
from ghoststore.store.base.disk import create_whole, exclusive, publish, replace, sweep
from ghoststore.store.base.new_files import new_files
from ghoststore.store.base.records import seal
from ghoststore.store.base.writers import (
    FOLDER,
    at_work,
    living,
    own_id,
    refuse_second,
    remove_dead,
    unfinished,
    writers,
)
from ghoststore.store.base.zarr_writes import SECONDS, settled
from ghoststore.store.spans.writer import writing
from tests.support.runs import make
from tests.support.writers import HOUR, record
from tests.support.zarr_failures import half_written

if TYPE_CHECKING:
    from tests.conftest import Lab


def own_record(folder: Path) -> dict[str, Any]:
    """What this process says of itself."""
    with at_work(folder, "it"):
        return json.loads((folder / FOLDER / f"{own_id()}.json").read_text())


def test_one_of_another_machine_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "store")
    path = record(run.path, "node7-4711-0123abcd", seconds_ago=60)
    since = time.strftime("%Y-%m-%d %H:", time.localtime(time.time() - 5 * HOUR))
    with pytest.raises(BusyError, match="run 'run' is being written by another process") as caught, writing(run):
        pass
    assert f"process 4711 on node7, since {since}" in str(caught.value)
    assert "(ghoststore build)" in str(caught.value)
    assert "forgotten 10 minutes after" in str(caught.value)
    (writer,) = living(run.path)
    assert (writer.host, writer.pid, writer.command) == ("node7", 4711, "ghoststore build")
    assert path.exists()


def test_one_that_was_not_heard_of_for_ten_minutes_is_dead(tmp_path: Path) -> None:
    run = make(tmp_path / "store")
    path = record(run.path, "node7-4711-0123abcd", seconds_ago=601)
    left = run.path / "commits" / ".00000001.loss.c.1.node7-4711-0123abcd.3.tmp"
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    assert [writer.alive for writer in writers(run.path)] == [False]
    with writing(run):
        assert [writer.id for writer in writers(run.path)] == [own_id()]
    assert not left.exists()
    assert not path.parent.exists()


def test_one_that_was_killed_is_dead_at_once(lab: Lab, tmp_path: Path) -> None:
    code = (
        "import os\nfrom pathlib import Path\nfrom ghoststore.store.base.writers import at_work, unfinished\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "with at_work(folder, 'it'):\n    unfinished(folder / 'a').write_text('x')\n    os._exit(7)"
    )
    assert lab.run(code=code).code == 7
    (writer,) = writers(tmp_path)
    assert not writer.alive
    assert len(list(tmp_path.glob(".a.*.tmp"))) == 1
    with exclusive(tmp_path, "it"):
        sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_with_the_same_number_is_another(tmp_path: Path) -> None:
    """Numbers of processes are given again, soon in a container."""
    own = own_record(tmp_path)
    host, number, _ = own_id().rsplit("-", 2)
    record(tmp_path, f"{host}-{number}-00000000", **own)
    assert [writer.alive for writer in writers(tmp_path)] == [True]
    record(tmp_path, f"{host}-{number}-00000000", **{**own, "start": "1"})
    assert [writer.alive for writer in writers(tmp_path)] == [False]


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="no boot id")
def test_a_power_cut_ends_every_process(tmp_path: Path) -> None:
    """One of this machine, touched a minute before the machine was started again."""
    own = own_record(tmp_path)
    up = time.clock_gettime(time.CLOCK_BOOTTIME)
    record(tmp_path, "me-1-0123abcd", up + 60, **{**own, "boot": "before"})
    assert [writer.alive for writer in writers(tmp_path)] == [False]


def test_what_a_living_one_owns_is_left_alone(tmp_path: Path) -> None:
    record(tmp_path, "node7-4711-0123abcd")
    names = {
        ".a.node7-4711-0123abcd.0.tmp": True,  # has a record
        f".a.{own_id()}.0.tmp": True,
        f".a.{own_id()[:-8]}00000000.0.tmp": False,  # a process before, with the same number
        f".a.{own_id().rsplit('-', 2)[0]}-1-00000000.tmp": True,  # process 1 is there
        ".a.node8-1-0123abcd.tmp": False,  # no record, and old
        ".a.123.tmp": False,  # of an earlier release
        ".b.tmp/x": False,
    }
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        for old in (path, path.parent):
            os.utime(old, (0, 0))
    (tmp_path / ".c.node9-1-0123abcd.tmp").write_bytes(b"")  # no record, and new
    sweep(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp") if path.is_file()}
    assert left == {name for name, stays in names.items() if stays} | {".c.node9-1-0123abcd.tmp"}


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let this machine's clock differ from that of the file system by ``seconds``."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_living_one_whose_clock_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """It touches its record by the clock of the file server; whether it lives, that clock says, and not ours."""
    record(tmp_path, "node7-4711-0123abcd", 30)
    begun = tmp_path / ".a.node7-4711-0123abcd.0.tmp"
    begun.write_text("x")
    dead = [record(tmp_path, "node8-1-0123abcd", 700), tmp_path / ".a.node8-1-0123abcd.0.tmp"]
    dead[1].write_text("x")
    os.utime(dead[1], (time.time() - 700,) * 2)
    clock(monkeypatch, hours * HOUR)
    assert {writer.host: writer.alive for writer in writers(tmp_path)} == {"node7": True, "node8": False}
    with pytest.raises(BusyError, match=r"process 4711 on node7.*last heard of 3\d s ago"):
        exclusive(tmp_path, "it").__enter__()
    sweep(tmp_path)
    assert begun.exists()
    assert [path.exists() for path in dead] == [False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == [begun.name, FOLDER]  # a clock leaves nothing


def test_a_mark_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the file system says how old it is, too."""
    elsewhere = {"host": "node7", "boot": "x", "processes": "pid:[1]", "pid": 1, "start": "1"}
    publish(tmp_path / ".a.unfinished", seal({"by": elsewhere, "files": {str(tmp_path / "a"): "0"}}))
    clock(monkeypatch, HOUR)

    def write() -> None:
        with new_files(tmp_path / "a") as (staged,):
            staged.write_text("x")

    with pytest.raises(BusyError, match="process 1 on node7"):
        write()
    stamp = (tmp_path / ".a.unfinished").stat().st_mtime - 601
    os.utime(tmp_path / ".a.unfinished", (stamp, stamp))
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class AtOnce:
    """Another machine's writer, which comes after this one has looked for others and before it looks again."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds_ago: float, since: float) -> None:
        self._folder, self._seconds_ago, self._since = folder, seconds_ago, since
        self._refuse, self.looks = refuse_second, 0
        monkeypatch.setattr("ghoststore.store.base.writers.refuse_second", self)

    def __call__(self, *arguments: Any) -> None:
        self._refuse(*arguments)
        if not self.looks:
            record(self._folder, "node7-4711-0123abcd", self._seconds_ago, since=time.time() + self._since)
        self.looks += 1


@pytest.mark.parametrize("since", [-HOUR, HOUR])
def test_of_two_at_once_the_first_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: float) -> None:
    """That whose record appeared first, by the file system's clock, whatever both machines take for now."""
    others = AtOnce(tmp_path, monkeypatch, seconds_ago=-2, since=since)
    with at_work(tmp_path, "it"):
        assert others.looks == 1
        assert {writer.host for writer in living(tmp_path)} == {"node7", socket.gethostname()}


@pytest.mark.parametrize("since", [-HOUR, HOUR])
def test_of_two_at_once_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: float) -> None:
    others = AtOnce(tmp_path, monkeypatch, seconds_ago=2, since=since)
    with pytest.raises(BusyError, match="process 4711 on node7"):
        at_work(tmp_path, "it").__enter__()
    assert others.looks == 1  # it stepped back, and looked again
    assert [writer.host for writer in living(tmp_path)] == ["node7"]


def test_many_at_once(lab: Lab, tmp_path: Path) -> None:
    """Where no lock holds them apart: never two, and one at least."""
    code = (
        "import os\nfrom pathlib import Path\nfrom ghoststore.errors import BusyError\n"
        "from ghoststore.store.base.writers import at_work\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "try:\n    with at_work(folder, 'it'):\n        (folder / 'in').touch(exist_ok=False)\n"
        "        os.system('sleep 0.3')\n        (folder / 'in').unlink()\n        print('done')\n"
        "except BusyError as error:\n    print('refused')"
    )
    outcomes = [lab.wait(pid) for pid in [lab.start(code=code) for _ in range(4)]]
    assert all(outcome.code == 0 for outcome in outcomes), [outcome.err for outcome in outcomes]
    assert "done" in {outcome.out.split()[0] for outcome in outcomes}
    assert not (tmp_path / FOLDER).exists()


def test_records_of_the_dead_alone_are_removed(tmp_path: Path) -> None:
    """A writer that came meanwhile keeps its record."""
    dead, alive = record(tmp_path, "node7-1-0123abcd", HOUR), record(tmp_path, "node7-2-0123abcd")
    remove_dead(tmp_path)
    assert [dead.exists(), alive.exists()] == [False, True]
    os.utime(alive, (0, 0))
    remove_dead(tmp_path)
    assert not alive.parent.exists()


def test_what_is_no_record_is_nobody(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "notes.txt").write_text("x")
    os.mkfifo(folder / "node7-1-0123abcd.json")
    (folder / "node7-2-0123abcd.json").symlink_to("/dev/zero")
    (folder / "node7-3-0123abcd.json").write_text('{"host": 3, "since": "x"')
    (writer,) = writers(tmp_path)
    assert (writer.host, writer.pid, writer.alive) == ("node7", 3, True)  # cut: for ten minutes it may be anybody's
    assert writers(tmp_path / "absent") == []


def test_a_fork_does_not_end_it(tmp_path: Path, lab: Lab) -> None:
    code = (
        "import os\nfrom pathlib import Path\nfrom ghoststore.store.base.writers import *\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "with at_work(folder, 'it'):\n    if child := os.fork(): os.waitpid(child, 0)\n"
        "    print(len(living(folder)), own_id().split('-')[-2] == str(os.getpid()), flush=True)"
    )
    outcome = lab.run(code=code)
    assert outcome.out.splitlines()[0] == "1 True"
    assert "1 True" in outcome.out
    assert not (tmp_path / FOLDER).exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with exclusive(tmp_path, "it"), pytest.raises(BusyError, match=f"process {os.getpid()} on"):
        exclusive(tmp_path, "it").__enter__()


def test_the_first_to_finish_names_the_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        create_whole(tmp_path / "a", lambda inner: (inner / "x").write_text("other") and None)
        (folder / "x").write_text("own")

    create_whole(tmp_path / "a", fill)
    assert (tmp_path / "a/x").read_text() == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_that_zarr_still_writes_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, removed, written = half_written(monkeypatch)

    def removing(path: Path) -> None:
        shutil.rmtree(path)
        removed.set()

    monkeypatch.setattr(disk, "remove", removing)
    with pytest.raises(StorageError, match="Input/output error"):
        create_whole(tmp_path / "a", fill)
    assert written.wait(60)
    assert list(tmp_path.iterdir()) == []


def test_two_that_wait_for_zarr_do_not_wait_for_each_other(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a", shape=(2,), chunks=(1,), dtype="u1")[:] = 1  # its loop has begun

    def failing() -> None:
        with suppress(ValueError), settled():
            raise ValueError

    for _ in range(20):
        threads = [threading.Thread(target=failing, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS / 2)
            assert not thread.is_alive()


def test_what_the_dead_had_begun_goes_with_the_next_of_its_name(tmp_path: Path) -> None:
    host, number, _ = own_id().rsplit("-", 2)
    dead = tmp_path / f".a[1].json.{host}-{number}-00000000.4.tmp"
    others = [
        tmp_path / name for name in (f".a[1].json.{host}-1-00000000.tmp", ".a[1].json.mine.tmp", ".a[1].jsonx.tmp")
    ]
    for path in (dead, *others):
        path.write_text("x")
        os.utime(path, (0, 0))
    replace(tmp_path / "a[1].json", b"x")
    assert not dead.exists()
    assert all(path.exists() for path in others)


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    path = unfinished(tmp_path / ("é" * 127))
    path.write_text("x")
    assert len(os.fsencode(path.name)) <= 255


def test_a_record_that_is_not_written_yet_says_whether_it_is_shared(tmp_path: Path) -> None:
    """Between a record's appearing and its bytes another worker of the same part may read it."""
    host = own_id().rsplit("-", 2)[0]
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / f"{host}-{os.getppid()}-00000000.shared.json").touch()
    with at_work(tmp_path, "it", shared=True):
        pass
    with pytest.raises(BusyError), at_work(tmp_path, "it"):
        pass
    (tmp_path / FOLDER / f"{host}-{os.getppid()}-00000001.json").touch()
    with pytest.raises(BusyError), at_work(tmp_path, "it", shared=True):
        pass
