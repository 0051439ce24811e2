"""Processes: which of them still live, and workers that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def this_process() -> dict[str, Any]:
    """What tells this process from all others, as JSON: host, number, and when it began."""
    return {"host": platform.node(), "process": os.getpid(), "begun": _begun(os.getpid())}


def is_gone(process: dict[str, Any]) -> bool | None:
    """Whether a process of :func:`this_process` has ended; None for one of another host, which nobody here knows."""
    if process["host"] != platform.node():
        return None
    number = process["process"]
    if _begun(os.getpid()) is not None:  # else this system does not say when a process began
        return bool(_begun(number) != process["begun"])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


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


def _begun(number: int) -> str | None:
    """When the process of that number began, in ticks since this boot; None if there is none, or no /proc."""
    try:
        # The name of the process, in parentheses, may hold anything; the 22nd field is the start.
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{fields[19]}"
    except (OSError, IndexError, ValueError):
        return None
