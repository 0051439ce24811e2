"""Whether a folder can be written, found out before hours of work are to end there."""

from __future__ import annotations

import os
from pathlib import Path

from ghoststore.store.base.disk import UNCHANGED, storage_errors
from ghoststore.store.base.writers import abandoned, unfinished


def check_writable(folder: Path) -> None:
    """StorageError unless a file can be made in ``folder``, or, where it is not there yet, in the nearest folder above
    it that is.

    By making one and removing it: permissions do not tell of a disk that is mounted read-only, nor of a quota.
    """
    what = str(folder)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    path = unfinished(folder / "writable")  # a name that says whose it is, should this process be killed here
    with storage_errors(what, UNCHANGED):
        for other in abandoned(folder / "writable"):
            other.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.close(handle)
        path.unlink()
