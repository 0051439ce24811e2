"""Writing so that a crash cannot undo or half-do it, and the errors of disks in words."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError, StorageError


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def appearing(path: Path, *, over: bool = False) -> Iterator[Path]:
    """Where to write what is to be the file ``path``: that appears whole, on disk, at the end, or not at all.

    What stands there already is replaced in one step with ``over``, and else left alone: FileExistsError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # The bytes before the name: after a crash, a name on the disk means that all of the file is there, too.
        flush(temporary)
        (os.replace if over else os.link)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def publish(path: Path, data: bytes) -> bool:
    """Make ``path`` appear whole, on disk, with ``data``; False if it exists already (it is left alone)."""
    try:
        with appearing(path) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        return False
    return True


def replace(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``, on disk, in one step: a reader sees what was there before, or all of it."""
    with appearing(path, over=True) as temporary:
        temporary.write_bytes(data)


UNFINISHED = re.compile(r"\..*\.tmp|.*\.[0-9a-f]{32}\.partial")
"""Names of what a process that died had not finished: ours, and Zarr's."""


def sweep(folder: Path) -> None:
    """Remove what dead writers left below ``folder``. Only its one writer may."""
    for path in [path for path in folder.rglob("*") if UNFINISHED.fullmatch(path.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn the operating system's errors into StorageError: what was being written, why, what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left on the device; free some"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"{error.strerror}; make it writable"
        elif error.errno is None:
            raise
        else:
            reason = f"{error.strerror} (errno {error.errno})"
        raise StorageError(
            f"cannot write {what}: {reason}. What was committed is intact: the same command resumes"
        ) from error


@contextmanager
def exclusive(folder: Path, what: str, parameter: str = "name") -> Iterator[None]:
    """Hold the lock of ``folder`` (flock) against other processes of this machine. It ends with the process.

    BusyError if another one holds it; ``parameter`` is the one with which to choose another.
    """
    busy = f"{what} is being written by another process; wait for it, or choose another `{parameter}`"
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise BusyError(busy) from None  # just renamed or removed by the process that held it
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy) from None
        yield
    finally:
        os.close(handle)


def create_whole(path: Path, what: str, fill: Callable[[Path], None], parameter: str = "name") -> None:
    """Make the folder ``path`` in one step: it appears whole, on the disk, or not at all. If it is there, nothing is
    done.

    ``fill`` writes its contents into a folder beside it, under that folder's lock; what a process that died had begun
    there is made again. BusyError if another process is making it, StorageError if the disk refuses.
    """
    begun = path.with_name(f".{path.name}.tmp")
    with storage_errors(str(path)):
        if path.exists():
            return
        begun.mkdir(exist_ok=True)
        with exclusive(begun, what, parameter):
            if path.exists():  # whoever held the lock has made it meanwhile
                return
            for entry in begun.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            try:
                fill(begun)
                # Everything inside before the name, as for a file.
                for inside, _, names in os.walk(begun):
                    for name in names:
                        flush(Path(inside) / name)
                    flush(Path(inside))
            except BaseException:
                shutil.rmtree(begun, ignore_errors=True)
                raise
            os.rename(begun, path)
            flush(path.parent)


def publish_group(folder: Path, attributes: dict[str, Any]) -> None:
    """A Zarr group, unless another process made it first; its metadata appear whole or not at all."""
    folder.mkdir(exist_ok=True)
    metadata = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    publish(folder / "zarr.json", json.dumps(metadata, indent=2).encode())
