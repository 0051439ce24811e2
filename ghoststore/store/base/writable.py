"""Checks that a folder can be written, before hours of work that would end there."""

from __future__ import annotations

import os
from pathlib import Path

from ghoststore.errors import StorageError
from ghoststore.store.base.disk import UNCHANGED, storage_errors
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.writers import abandoned, unfinished


def check_writable(folder: Path) -> None:
    """StorageError unless a file can be made in ``folder`` or, if it does not exist, in the nearest folder above.

    It makes a file and removes it: permissions do not show a read-only mount or a quota. An object store must also
    refuse to make an object that exists, for that is what keeps two writers apart.
    """
    if isinstance(folder, ObjectPath):
        _check_conditional(folder)
        return
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


def may_write(folder: Path) -> bool:
    """Whether this user has the right to write in ``folder``, as far as its permissions tell."""
    return isinstance(folder, ObjectPath) or os.access(folder, os.W_OK)


def _check_conditional(folder: ObjectPath) -> None:
    path = unfinished(folder / "writable")
    assert isinstance(path, ObjectPath)
    try:
        path.create(b"1")
        if path.create(b"2"):
            raise StorageError(
                f"{path.objects.name} does not refuse to make an object that exists (a conditional put): two writers "
                "would overwrite each other there, so nothing is written. Use a store that does, or a local folder"
            )
    finally:
        path.unlink(missing_ok=True)
