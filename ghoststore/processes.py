"""Processes: whether one is still alive, and workers that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
MOST_ARENAS = -8
"""M_ARENA_MAX of glibc's mallopt."""
HOST_PROCESSES = "pid:[4026531836]"
"""Linux's name of the first namespace of process ids, outside all containers."""


def this_process() -> dict[str, Any]:
    """The identity of this process, as JSON: host, boot of the machine, namespace of process ids, id and start time."""
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "processes": id_space(),
        "pid": os.getpid(),
        "start": _state(os.getpid())[1],
    }


def is_gone(process: Mapping[str, Any]) -> bool | None:
    """Whether the process that :func:`this_process` described has ended.

    None for a process of another machine, another container or an earlier boot: its id has no meaning here.
    """
    if (process["host"], process["boot"], process["processes"]) != (socket.gethostname(), boot(), id_space()):
        return None
    return not runs(int(process["pid"]), str(process["start"]))


def runs(pid: int, start: str = "") -> bool:
    """Whether process ``pid`` of this machine is alive and, if ``start`` is known, the one that began then."""
    state, actual_start = _state(pid)
    if actual_start:
        return state not in ("Z", "X") and start in ("", actual_start)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # a process of another user
    return True


@cache
def boot() -> str:
    """The id of the present boot of this machine; empty without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@cache
def id_space() -> str:
    """The namespace of process ids of this process (its container); empty without /proc."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def uptime() -> float:
    """Seconds since this machine was started; infinite if that is not known."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return float("inf") if clock is None else time.clock_gettime(clock)


def _state(pid: int) -> tuple[str, str]:
    """State and start time (in ticks) of a process; both empty if /proc does not say."""
    try:
        # "pid (name) state …": the name may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def end_with(parent: int) -> None:
    """Have Linux's kernel end this process as soon as ``parent``, which started it, ends in any way.

    On other systems this does nothing: :func:`end_with_parent` watches a pipe as well.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    # The parent may have ended before this call.
    if os.getppid() != parent:
        os._exit(1)


def share_memory_among_threads() -> None:
    """Have all threads of this process take memory from one place, where that is glibc's to say.

    Else each of a server's threads keeps what it freed, and the process grows with the number of them. For a process
    of its own, before there are threads.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).mallopt(MOST_ARENAS, 1)
    except (OSError, AttributeError):
        return


def end_with_parent() -> None:
    """End this process of `multiprocessing` when its parent ends in any way, on any system."""
    parent = parent_process()
    assert parent is not None
    assert parent.pid is not None

    def watch() -> None:
        parent.join()  # returns when the pipe to the parent closes
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    end_with(parent.pid)
