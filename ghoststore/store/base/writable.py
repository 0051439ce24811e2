"""Checks that a folder can be written, before hours of work that would end there."""

from __future__ import annotations

import os
from pathlib import Path

from ghoststore.store.base.disk import UNCHANGED, storage_errors
from ghoststore.store.base.writers import abandoned, unfinished


def check_writable(folder: Path) -> None:
    """StorageError unless a file can be made in ``folder`` or, if it does not exist, in the nearest folder above.

    It makes a file and removes it: permissions do not show a read-only mount or a quota.
    """
    what = str(folder)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    path = unfinished(folder / "writable")  # its name says who made it, in case this process is killed here
    with storage_errors(what, UNCHANGED):
        for other in abandoned(folder / "writable"):
            other.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.close(handle)
        path.unlink()
