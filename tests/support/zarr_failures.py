"""A write of an array that fails while Zarr is at another file of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import zarr


def half_written(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[Path], None], threading.Event, threading.Event]:
    """(fill, removed, written): ``fill`` writes an array of two chunks into a folder. The first fails; the second makes
    its folder again, and sets ``written``, half a second later, or once ``removed`` is set.
    """
    calls, removed, written = count(), threading.Event(), threading.Event()

    def replace(*paths: Path) -> None:
        if next(calls) == 0:
            raise OSError(errno.EIO, "Input/output error")
        removed.wait(0.5)
        paths[1].parent.mkdir(parents=True, exist_ok=True)
        written.set()

    def fill(folder: Path) -> None:
        array = zarr.create_array(folder / "a", shape=(2,), chunks=(1,), dtype="u1")
        monkeypatch.setattr(os, "replace", replace)
        array[:] = 1

    return fill, removed, written
