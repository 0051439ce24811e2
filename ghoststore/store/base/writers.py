"""Who writes in a folder: a small file for each process at work there, ``.writers/<host>-<pid>-<random>.json``.

A lock (flock) tells processes of one machine apart, and on many network file systems nothing beyond it. These records
are seen by every machine: they refuse a second writer by name, and say whose the unfinished files are. They are not
what keeps committed rows whole (:mod:`ghoststore.store.spans.commits` is).
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shlex
import socket
import stat
import sys
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

FOLDER = ".writers"
TOUCH_SECONDS = 30.0
FORGOTTEN_SECONDS = 600.0
"""A process that cannot be looked for (another machine's) is dead when its record was not touched for so long."""
LARGEST = 1 << 14
HOST_PROCESSES = "4026531836"
"""Linux's number of the first space of process ids, that of no container."""
_ID = re.compile(r"(?P<host>[A-Za-z0-9-]{1,63})-(?P<pid>\d{1,10})-[0-9a-f]{8}")
_OWNED = re.compile(rf"\..*\.(?P<id>{_ID.pattern})(\.\d+)?\.tmp", re.DOTALL)
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
    """When it last said that it works, as ``since``."""
    alive: bool

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since} ({self.command})"


@cache
def own_id() -> str:
    """``<host>-<pid>-<random>`` of this process: no other has it, and no later one will. Two with the same host may
    look for each other's process: a container with ids of its own counts as a host.
    """
    container = re.sub(r"\D", "", _processes())
    names = [socket.gethostname(), *([] if container in ("", HOST_PROCESSES) else [container])]
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
        return int(owned["pid"]) == os.getpid() or not _runs(int(owned["pid"]))
    with suppress(OSError):
        return abs(time.time() - path.lstat().st_mtime) > FORGOTTEN_SECONDS
    return False


@contextmanager
def at_work(folder: Path, what: str, parameter: str = "name") -> Iterator[None]:
    """Have a record in ``folder``, touched by a thread, while the block runs. Those of the dead are removed.

    BusyError, naming it, if another living process has one; OSError if the folder cannot be written.
    """
    refuse_second(living(folder), what, parameter)
    for writer in writers(folder):
        if not writer.alive:
            with suppress(OSError):
                (folder / FOLDER / f"{writer.id}.json").unlink()
    own, process = own_id(), os.getpid()
    record = _write(folder / FOLDER, own, what, parameter)
    try:
        # Who came at the same time is seen by now. One whose record appeared before ours, by the clock of the file
        # system, may have looked when ours was not there, and has begun, whatever the clocks of both machines say.
        present = living(folder)
        ours = next((writer for writer in present if writer.id == own), None)
        if ours is not None:
            earlier = [writer for writer in present if writer.touched < ours.touched or _order(writer) < _order(ours)]
            refuse_second(earlier, what, parameter)
        with touched(record):
            yield
    finally:
        if os.getpid() == process:  # a fork that leaves the block is not who is at work
            with suppress(OSError):
                record.unlink()
                record.parent.rmdir()  # unless another is in it


def refuse_second(others: list[Writer], what: str, parameter: str) -> None:
    """BusyError if there are ``others``."""
    if others:
        raise BusyError(busy(what, parameter, others))


def busy(what: str, parameter: str, others: list[Writer]) -> str:
    """The words of a BusyError: ``others`` write ``what``; ``parameter`` is the one with which to choose another."""
    words = f"{what} is being written by another process; wait for it, or choose another `{parameter}`"
    if not others:
        return words
    words += f". It is {others[0]}"
    if others[0].host != socket.gethostname():
        words += (
            f", last heard of {max(time.time() - others[0].touched, 0):.0f} s ago; one that has died is forgotten "
            f"{FORGOTTEN_SECONDS / 60:.0f} minutes after that"
        )
    return words


def _write(folder: Path, own: str, what: str, parameter: str) -> Path:
    """This process's record in ``folder`` (``.writers``), which is made."""
    record = folder / f"{own}.json"
    value = {
        "host": socket.gethostname(),
        "boot": _boot(),
        "processes": _processes(),
        "pid": os.getpid(),
        "start": _state(os.getpid())[1],
        "command": _command(),
        "since": time.time(),
    }
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
    host, pid = str(value.get("host", named["host"]))[:255], int(named["pid"])
    if isinstance(value.get("boot"), str):
        this_machine = (value["boot"], value.get("processes"), host) == (_boot(), _processes(), socket.gethostname())
    else:
        this_machine = named["host"] == _own_host()
    if this_machine:
        alive = _runs(pid, str(value.get("start", "")))
    else:
        # This host's, and from before it was started last: a power cut took its process along.
        ended = host == socket.gethostname() and value.get("boot") != _boot() and touched < _booted()
        alive = not ended and abs(time.time() - touched) < FORGOTTEN_SECONDS
    return Writer(
        id=named[0],
        host=host,
        pid=pid,
        command=str(value.get("command", "unknown"))[:200],
        since=float(since) if isinstance(since, (int, float)) and 0 <= since < 1 << 40 else touched,
        touched=touched,
        alive=alive,
    )


def _command() -> str:
    """How this process was called, in short."""
    program, *arguments = sys.argv or ["python"]
    words = shlex.join([os.path.basename(program) or "python", *arguments])
    return words.encode("utf-8", "backslashreplace").decode()[:200]


def _runs(pid: int, start: str = "") -> bool:
    """Whether process ``pid`` of this machine is there, and is the one that began at ``start``, where that is known."""
    state, began = _state(pid)
    if began:
        return state not in ("Z", "X") and start in ("", began)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return True


def _state(pid: int) -> tuple[str, str]:
    """State and start, in ticks, of a process; both empty where /proc does not say."""
    try:
        # "pid (name) state …": the name may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


@cache
def _boot() -> str:
    """Says which start of which machine this is; empty without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@cache
def _processes() -> str:
    """Says in which space of process ids (which container) this is; empty without /proc."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _booted() -> float:
    """When this machine was started, in seconds since the epoch; 0 where that is not known."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.time() - time.clock_gettime(clock)
