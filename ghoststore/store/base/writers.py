"""The processes that write in a folder: a record for each, ``.writers/<host>-<pid>-<random>.json``.

On many network file systems a lock (flock) excludes only processes of the same machine. Every machine sees these
records: they name the writer that a second one is refused for, and the owners of unfinished files. Committed rows do
not depend on them; :mod:`ghoststore.store.spans.commits` protects those.
"""

from __future__ import annotations

import glob
import json
import os
import random
import re
import secrets
import shlex
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError
from ghoststore.processes import HOST_PROCESSES, boot, id_space, is_gone, runs, this_process, uptime
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.opening import is_other

FOLDER = ".writers"
SHARED = ".shared"
"""In the name of the record of a writer that lets others with this mark write beside it."""
TOUCH_SECONDS = 30.0
FORGOTTEN_SECONDS = 600.0
"""A process of another machine, which cannot be looked up, counts as dead if its record was not touched so long."""
LARGEST = 1 << 14
PAUSES = (0.01, 0.1, 0.5, 2.0)
"""Most seconds to wait before each new attempt, if several writers came at once."""
_ID = re.compile(r"(?P<host>[A-Za-z0-9-]{1,63})-(?P<pid>\d{1,10})-[0-9a-f]{8}")
_OWNED = re.compile(rf"\..*\.(?P<id>{_ID.pattern})(\.\d+)?\.tmp", re.DOTALL)
_PROCESS = frozenset(("host", "boot", "processes", "start"))
_numbers = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A process that writes in a folder, or that ended without removing its record."""

    id: str
    """The name of its record, also part of the names of its unfinished files."""
    host: str
    pid: int
    command: str
    since: float
    """Seconds since the epoch, by its machine's clock."""
    touched: float
    """When it last touched its record, by the clock of the file system."""
    silent: float
    """Seconds since then."""
    alive: bool
    shared: bool = False
    """Whether it lets others with this mark write beside it."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since} ({self.command})"


@cache
def own_id() -> str:
    """``<host>-<pid>-<random>`` of this process, which no other process ever has.

    Processes with the same host can look each other up; a container with process ids of its own counts as a host.
    """
    container = [] if id_space() in ("", HOST_PROCESSES) else [re.sub(r"\D", "", id_space())]
    names = [socket.gethostname(), *container]
    host = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(names))[-63:]
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _own_host() -> str:
    return own_id().rsplit("-", 2)[0]


os.register_at_fork(after_in_child=own_id.cache_clear)


def unfinished(path: Path) -> Path:
    """A temporary name for ``path``: hidden, beside it, and never used before."""
    return path.with_name(f".{_cut(path)}.{own_id()}.{next(_numbers)}.tmp")


def abandoned(path: Path) -> list[Path]:
    """Temporary files of dead processes for ``path``, see :func:`unfinished`."""
    candidates = path.parent.glob(f".{glob.escape(_cut(path))}.*.tmp")
    return [other for other in candidates if _OWNED.fullmatch(other.name) and left_behind(other, set())]


def _cut(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:120])  # a file's name has at most 255 bytes


def writers(folder: Path) -> list[Writer]:
    """The writers with a record in ``folder``, dead ones too, oldest first; none if the records cannot be listed.

    Nobody makes a record in an object store.
    """
    if isinstance(folder, ObjectPath):
        return []
    try:
        names = os.listdir(folder / FOLDER)
    except OSError:
        return []
    recorded = [writer for name in names if (writer := _read(folder / FOLDER / name)) is not None]
    return sorted(recorded, key=_order)


def _order(writer: Writer) -> tuple[float, str]:
    return writer.since, writer.id


def living(folder: Path) -> list[Writer]:
    """The writers in ``folder`` that are alive, this process among them."""
    return [writer for writer in writers(folder) if writer.alive]


def left_behind(path: Path, at_work: set[str]) -> bool:
    """Whether a dead process left the unfinished file or folder ``path``. ``at_work`` holds the ids of living writers.

    If its name has no owner (Zarr's) or one of another machine without a record, ten minutes without a touch decide.
    """
    owned = _OWNED.fullmatch(path.name)
    if owned is not None and owned["id"] in {own_id(), *at_work}:
        return False
    if owned is not None and owned["host"] == _own_host():
        # The system reuses process ids: one equal to ours is of an earlier process.
        return int(owned["pid"]) == os.getpid() or not runs(int(owned["pid"]))
    with suppress(OSError):
        return is_forgotten(path)
    return False


def is_forgotten(path: Path) -> bool:
    """Whether ``path`` was not touched for ten minutes: a living owner touches it more often."""
    return _silent(path.lstat().st_mtime, path.parent) >= FORGOTTEN_SECONDS


def _silent(touched: float, folder: Path) -> float:
    """Seconds, forward or back, since ``touched``, the time of a file in ``folder``.

    Clocks of two machines may differ by hours, so if it seems long ago, the clock of the file system decides.
    """
    seconds = abs(time.time() - touched)
    return seconds if seconds < FORGOTTEN_SECONDS else abs(_clock_of(folder) - touched)


def _clock_of(folder: Path) -> float:
    """The present time by the file system of ``folder``: that of a new file in it.

    If no file can be made, it is our own time: whoever cannot write there cannot remove anything either. So it is for
    an object store.
    """
    if isinstance(folder, ObjectPath):
        return time.time()
    try:
        with tempfile.TemporaryFile(prefix=".clock.", suffix=".tmp", dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@contextmanager
def at_work(folder: Path, what: str, parameter: str | None = "name", *, shared: bool = False) -> Iterator[None]:
    """Keep a record in ``folder``, touched by a thread, while the block runs. Records of dead writers are removed.

    BusyError naming another living writer, if there is one; with ``shared`` others that are shared, too, are let be.
    OSError if the folder cannot be written.
    """
    process = os.getpid()
    record = _enter(folder, what, parameter, shared)
    try:
        with touched(record):
            yield
    finally:
        if os.getpid() == process:  # not in a fork that leaves the block
            _leave(record)


def _enter(folder: Path, what: str, parameter: str | None, shared: bool) -> Path:
    """Make this process's record in ``folder``. BusyError if another living process has one that excludes it.

    Writers that come at the same time see each other once their records exist. The first by the clock of the file
    system goes on. The others, and two with the same time, remove their records, wait and try again: the first to do so
    is alone.
    """
    for pause in (*PAUSES, None):
        refuse_second(_excluding(living(folder), shared), what, parameter)
        with suppress(OSError):
            remove_dead(folder)
        record = _write(folder / FOLDER, what, parameter, shared)
        present = {writer.id: writer for writer in living(folder)}
        this = present.pop(own_id(), None)
        others = _excluding(present.values(), shared)
        if this is not None and all(this.touched < other.touched for other in others):
            return record
        _leave(record)
        if pause is None:
            break
        time.sleep(random.uniform(0, pause))
    raise BusyError(busy(what, parameter, others))


def _excluding(others: Iterable[Writer], shared: bool) -> list[Writer]:
    """Those of ``others`` beside which a writer may not write."""
    return [other for other in others if not (shared and other.shared)]


def _leave(record: Path) -> None:
    with suppress(OSError):
        record.unlink()
        record.parent.rmdir()  # unless it holds other records


def remove_dead(folder: Path) -> None:
    """Remove the records of dead writers of ``folder``, and the folder of records if it is empty then.

    A writer that comes meanwhile is safe: its record has another name, and it makes the folder again if that is gone.
    """
    for writer in writers(folder):
        if not writer.alive:
            (folder / FOLDER / _record_name(writer.id, writer.shared)).unlink(missing_ok=True)
    with suppress(OSError):
        (folder / FOLDER).rmdir()


def refuse_second(others: list[Writer], what: str, parameter: str | None) -> None:
    """BusyError if ``others`` is not empty."""
    if others:
        raise BusyError(busy(what, parameter, others))


def busy(what: str, parameter: str | None, others: list[Writer]) -> str:
    """The message of a BusyError: ``others`` write ``what``.

    ``parameter`` names the parameter by which to choose another target, None if there is none.
    """
    message = f"{what} is being written by another process; wait for it" + (
        "" if parameter is None else f", or choose another `{parameter}`"
    )
    if not others:
        return message
    message += f". It is {others[0]}"
    if others[0].host != socket.gethostname():
        message += (
            f", last heard of {others[0].silent:.0f} s ago; one that has died is forgotten "
            f"{FORGOTTEN_SECONDS / 60:.0f} minutes after that"
        )
    return message


def _record_name(writer: str, shared: bool) -> str:
    """The file name of a record. It says what others must know before they can read the record, which is not written
    in one step.
    """
    return f"{writer}{SHARED if shared else ''}.json"


def _write(folder: Path, what: str, parameter: str | None, shared: bool) -> Path:
    """Make this process's record in ``folder`` (``.writers``), and the folder. Returns its path."""
    record = folder / _record_name(own_id(), shared)
    value = {**this_process(), "command": _command(), "since": time.time()}
    while True:
        make_folder(folder)
        try:
            with open(record, "x", encoding="utf-8") as file:
                json.dump(value, file)
            return record
        except FileExistsError:
            raise BusyError(busy(what, parameter, [])) from None  # another thread of this process writes
        except FileNotFoundError:
            continue  # its last writer has just removed the folder


def make_folder(folder: Path) -> None:
    """Make ``folder`` unless it is there. Another process may remove it at any moment, which `Path.mkdir` answers with
    FileExistsError if it comes between its two steps. FileExistsError if something else is there.
    """
    try:
        os.mkdir(folder)
    except FileExistsError:
        if is_other(folder, folder=True):
            raise


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """Touch ``path`` by a thread while the block runs, to show other machines that this process is alive."""
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(TOUCH_SECONDS):
            with suppress(OSError):  # the work itself meets any error of the disk
                os.utime(path)

    threading.Thread(target=touch, name="ghoststore-at-work", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _read(path: Path) -> Writer | None:
    """The writer of a record; from its name alone if it is cut or damaged. None for any other file."""
    shared = path.stem.endswith(SHARED)
    name = _ID.fullmatch(path.stem.removesuffix(SHARED))
    if name is None or path.suffix != ".json":
        return None
    value: dict[str, Any] = {}
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # gone, or no file
    with open(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            return None
        with suppress(OSError, ValueError, RecursionError):
            read = json.loads(file.read(LARGEST))
            value = read if isinstance(read, dict) else {}
    since, touched = value.get("since"), facts.st_mtime
    pid = int(name["pid"])
    # The name tells the host and the process even if the record is cut; our host in it means this machine.
    by_name = this_process() if name["host"] == _own_host() else {"host": name["host"], "boot": "", "processes": ""}
    process = {**by_name, "start": "", **{key: str(value[key])[:255] for key in _PROCESS & value.keys()}, "pid": pid}
    folder = path.parent.parent
    gone = is_gone(process)
    silent = _silent(touched, folder) if gone is None else max(time.time() - touched, 0.0)
    if gone is None:
        # A process of this host from before its last start ended with it.
        earlier_boot = process["host"] == socket.gethostname() and process["boot"] != boot()
        gone = silent >= FORGOTTEN_SECONDS or (earlier_boot and _clock_of(folder) - touched > uptime())
    return Writer(
        id=name[0],
        host=process["host"],
        pid=pid,
        command=str(value.get("command", "unknown"))[:200],
        since=float(since) if isinstance(since, (int, float)) and 0 <= since < 1 << 40 else touched,
        touched=touched,
        silent=silent,
        alive=not gone,
        shared=shared,
    )


def _command() -> str:
    """The command line of this process, cut."""
    program, *arguments = sys.argv or ["python"]
    line = shlex.join([os.path.basename(program) or "python", *arguments])
    return line.encode("utf-8", "backslashreplace").decode()[:200]
