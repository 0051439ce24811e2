"""Who writes in a folder: a small file for each process at work there, ``.writers/<host>-<pid>-<random>.json``.

A lock (flock) tells processes of one machine apart, and on many network file systems nothing beyond it. These records
are seen by every machine: they refuse a second writer by name, and say whose the unfinished files are. They are not
what keeps committed rows whole (:mod:`ghoststore.store.spans.commits` is).
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError
from ghoststore.processes import HOST_PROCESSES, boot, id_space, is_gone, runs, this_process, uptime

FOLDER = ".writers"
TOUCH_SECONDS = 30.0
FORGOTTEN_SECONDS = 600.0
"""A process that cannot be looked for (another machine's) is dead when its record was not touched for so long."""
LARGEST = 1 << 14
PAUSES = (0.01, 0.1, 0.5, 2.0)
"""Seconds, at most, that one steps back before it tries again, where several came at once."""
_ID = re.compile(r"(?P<host>[A-Za-z0-9-]{1,63})-(?P<pid>\d{1,10})-[0-9a-f]{8}")
_OWNED = re.compile(rf"\..*\.(?P<id>{_ID.pattern})(\.\d+)?\.tmp", re.DOTALL)
_PROCESS = frozenset(("host", "boot", "processes", "start"))
_numbers = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """A process that writes in a folder, or ended without taking its record away."""

    id: str
    """Names the record, and stands in the names of its unfinished files."""
    host: str
    pid: int
    command: str
    since: float
    """Seconds since the epoch, by its machine's clock."""
    touched: float
    """When it last said that it works, by the clock of the file system."""
    silent: float
    """Seconds since then."""
    alive: bool

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since} ({self.command})"


@cache
def own_id() -> str:
    """``<host>-<pid>-<random>`` of this process: no other has it, and no later one will. Two with the same host may
    look for each other's process: a container with ids of its own counts as a host.
    """
    container = [] if id_space() in ("", HOST_PROCESSES) else [re.sub(r"\D", "", id_space())]
    names = [socket.gethostname(), *container]
    host = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(names))[-63:]
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def _own_host() -> str:
    return own_id().rsplit("-", 2)[0]


os.register_at_fork(after_in_child=own_id.cache_clear)


def unfinished(path: Path) -> Path:
    """Where to write what will be called ``path``: a hidden name beside it that nothing else has, or had."""
    return path.with_name(f".{_cut(path)}.{own_id()}.{next(_numbers)}.tmp")


def abandoned(path: Path) -> list[Path]:
    """What processes that died had begun of ``path``, see :func:`unfinished`."""
    begun = path.parent.glob(f".{glob.escape(_cut(path))}.*.tmp")
    return [other for other in begun if _OWNED.fullmatch(other.name) and left_behind(other, set())]


def _cut(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:120])  # a file's name has at most 255 bytes


def writers(folder: Path) -> list[Writer]:
    """Who has a record in ``folder``, the oldest first, dead ones too. Nobody, where there is none or it cannot be
    read.
    """
    try:
        names = os.listdir(folder / FOLDER)
    except OSError:
        return []
    known = [writer for name in names if (writer := _read(folder / FOLDER / name)) is not None]
    return sorted(known, key=_order)


def _order(writer: Writer) -> tuple[float, str]:
    return writer.since, writer.id


def living(folder: Path) -> list[Writer]:
    """Those of :func:`writers` that are at work, this process among them."""
    return [writer for writer in writers(folder) if writer.alive]


def left_behind(path: Path, at_work: set[str]) -> bool:
    """Whether the unfinished file or folder ``path`` is a dead process's. ``at_work``: ids of the living.

    One without an owner in its name (Zarr's, an earlier release's) and one of another machine that has no record is
    dead when it was not touched for ten minutes.
    """
    owned = _OWNED.fullmatch(path.name)
    if owned is not None and owned["id"] in {own_id(), *at_work}:
        return False
    if owned is not None and owned["host"] == _own_host():
        # Ids of processes are given again: one with ours is of a process before.
        return int(owned["pid"]) == os.getpid() or not runs(int(owned["pid"]))
    with suppress(OSError):
        return is_forgotten(path)
    return False


def is_forgotten(path: Path) -> bool:
    """Whether ``path``, which the process that owns it touches while it lives, was not touched for ten minutes."""
    return _silent(path.lstat().st_mtime, path.parent) >= FORGOTTEN_SECONDS


def _silent(touched: float, folder: Path) -> float:
    """Seconds, forward or back, since ``touched``, a time of something in ``folder``.

    Clocks of two machines may be hours apart, so where it seems long ago the clock of the file system decides.
    """
    seconds = abs(time.time() - touched)
    return seconds if seconds < FORGOTTEN_SECONDS else abs(_clock_of(folder) - touched)


def _clock_of(folder: Path) -> float:
    """What the file system of ``folder`` takes for now: when a file that is made there was made. Ours, where none can
    be made: who cannot write there takes nothing from anybody.
    """
    try:
        with tempfile.TemporaryFile(prefix=".clock.", suffix=".tmp", dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


@contextmanager
def at_work(folder: Path, what: str, parameter: str | None = "name") -> Iterator[None]:
    """Have a record in ``folder``, touched by a thread, while the block runs. Those of the dead are removed.

    BusyError, naming it, if another living process has one; OSError if the folder cannot be written.
    """
    process = os.getpid()
    record = _enter(folder, what, parameter)
    try:
        with touched(record):
            yield
    finally:
        if os.getpid() == process:  # a fork that leaves the block is not who is at work
            _leave(record)


def _enter(folder: Path, what: str, parameter: str | None) -> Path:
    """Make this process's record in ``folder``; BusyError if another living process has one.

    Who came at the same time is seen once the record is there. Whoever sees nobody goes on, and whoever is the first,
    by the clock of the file system, whatever the clocks of both machines say; all others see that one. They step back,
    and so do two of the same moment: the one to try again first is alone.
    """
    for pause in (*PAUSES, None):
        refuse_second(living(folder), what, parameter)
        with suppress(OSError):
            remove_dead(folder)
        record = _write(folder / FOLDER, what, parameter)
        present = {writer.id: writer for writer in living(folder)}
        ours = present.pop(own_id(), None)
        if ours is not None and all(ours.touched < other.touched for other in present.values()):
            return record
        _leave(record)
        if pause is None:
            break
        time.sleep(random.uniform(0, pause))
    raise BusyError(busy(what, parameter, list(present.values())))


def _leave(record: Path) -> None:
    with suppress(OSError):
        record.unlink()
        record.parent.rmdir()  # unless another is in it


def remove_dead(folder: Path) -> None:
    """Remove the records of dead writers of ``folder``, each by itself, and what holds them if it is empty then.

    Harmless beside a writer that comes meanwhile: its record has another name, and where the folder of records has gone
    it makes it again.
    """
    for writer in writers(folder):
        if not writer.alive:
            (folder / FOLDER / f"{writer.id}.json").unlink(missing_ok=True)
    with suppress(OSError):
        (folder / FOLDER).rmdir()


def refuse_second(others: list[Writer], what: str, parameter: str | None) -> None:
    """BusyError if there are ``others``."""
    if others:
        raise BusyError(busy(what, parameter, others))


def busy(what: str, parameter: str | None, others: list[Writer]) -> str:
    """The words of a BusyError: ``others`` write ``what``; ``parameter`` is the one with which to choose another, None
    where nothing else will do.
    """
    words = f"{what} is being written by another process; wait for it" + (
        "" if parameter is None else f", or choose another `{parameter}`"
    )
    if not others:
        return words
    words += f". It is {others[0]}"
    if others[0].host != socket.gethostname():
        words += (
            f", last heard of {others[0].silent:.0f} s ago; one that has died is forgotten "
            f"{FORGOTTEN_SECONDS / 60:.0f} minutes after that"
        )
    return words


def _write(folder: Path, what: str, parameter: str | None) -> Path:
    """This process's record in ``folder`` (``.writers``), which is made."""
    record = folder / f"{own_id()}.json"
    value = {**this_process(), "command": _command(), "since": time.time()}
    while True:
        folder.mkdir(exist_ok=True)
        try:
            with open(record, "x", encoding="utf-8") as file:
                json.dump(value, file)
            return record
        except FileExistsError:
            raise BusyError(busy(what, parameter, [])) from None  # by another thread of this process
        except FileNotFoundError:
            continue  # its last writer took the folder away meanwhile


@contextmanager
def touched(path: Path) -> Iterator[None]:
    """Let ``path`` show, to other machines, that this process is alive: a thread touches it while the block runs."""
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(TOUCH_SECONDS):
            with suppress(OSError):  # whatever is wrong with the disk, the work itself meets it
                os.utime(path)

    threading.Thread(target=touch, name="ghoststore-at-work", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _read(path: Path) -> Writer | None:
    """The writer of a record; of one that is cut or damaged, what its name says. None for any other file."""
    named = _ID.fullmatch(path.stem)
    if named is None or path.suffix != ".json":
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
    pid = int(named["pid"])
    # What is cut says at least what its name says; a host that is ours in it is this machine.
    ours = this_process() if named["host"] == _own_host() else {"host": named["host"], "boot": "", "processes": ""}
    process = {**ours, "start": "", **{name: str(value[name])[:255] for name in _PROCESS & value.keys()}, "pid": pid}
    folder = path.parent.parent
    gone = is_gone(process)
    silent = _silent(touched, folder) if gone is None else max(time.time() - touched, 0.0)
    if gone is None:
        # This host's, and from before it was started last: a power cut took its process along.
        before = process["host"] == socket.gethostname() and process["boot"] != boot()
        gone = silent >= FORGOTTEN_SECONDS or (before and _clock_of(folder) - touched > uptime())
    return Writer(
        id=named[0],
        host=process["host"],
        pid=pid,
        command=str(value.get("command", "unknown"))[:200],
        since=float(since) if isinstance(since, (int, float)) and 0 <= since < 1 << 40 else touched,
        touched=touched,
        silent=silent,
        alive=not gone,
    )


def _command() -> str:
    """How this process was called, in short."""
    program, *arguments = sys.argv or ["python"]
    words = shlex.join([os.path.basename(program) or "python", *arguments])
    return words.encode("utf-8", "backslashreplace").decode()[:200]
