"""Processes: which of them still live, and workers that end with the process that started them."""

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
HOST_PROCESSES = "pid:[4026531836]"
"""Linux's name of the first space of process ids, that of no container."""


def this_process() -> dict[str, Any]:
    """What tells this process from all others, as JSON: host, start of the machine, space of process ids, number, and
    when it began.
    """
    return {
        "host": socket.gethostname(),
        "boot": boot(),
        "processes": id_space(),
        "pid": os.getpid(),
        "start": _state(os.getpid())[1],
    }


def is_gone(process: Mapping[str, Any]) -> bool | None:
    """Whether a process of :func:`this_process` has ended; None for one of another machine, of another container, or of
    before this machine was started last: its number says nothing here.
    """
    if (process["host"], process["boot"], process["processes"]) != (socket.gethostname(), boot(), id_space()):
        return None
    return not runs(int(process["pid"]), str(process["start"]))


def runs(pid: int, start: str = "") -> bool:
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


@cache
def boot() -> str:
    """Says which start of which machine this is; empty without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@cache
def id_space() -> str:
    """Says in which space of process ids (which container) this is; empty without /proc."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def uptime() -> float:
    """Seconds since this machine was started; infinite where that is not known."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return float("inf") if clock is None else time.clock_gettime(clock)


def _state(pid: int) -> tuple[str, str]:
    """State and start, in ticks, of a process; both empty where /proc does not say."""
    try:
        # "pid (name) state …": the name may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def end_with(parent: int) -> None:
    """End this process when the process ``parent``, which started it, ends in whatever way: by Linux's kernel, at once.

    Elsewhere this does nothing: a worker watches a pipe as well.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    # It may have ended before the kernel was asked.
    if os.getppid() != parent:
        os._exit(1)


def end_with_parent() -> None:
    """End this process of `multiprocessing` when the one that started it ends in whatever way, on any system."""
    parent = parent_process()
    assert parent is not None
    assert parent.pid is not None

    def watch() -> None:
        parent.join()  # its end of a pipe closes with it
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    end_with(parent.pid)
