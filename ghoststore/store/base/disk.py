"""Writing so that a crash cannot undo or half-do it, and the errors of disks in words."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError, GhostStoreError, StorageError
from ghoststore.hidden_errors import hidden_error
from ghoststore.store.base.writers import (
    FOLDER,
    abandoned,
    at_work,
    busy,
    left_behind,
    living,
    remove_dead,
    touched,
    unfinished,
    writers,
)


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

    What stands there already is replaced in one step with ``over``, and else left alone: FileExistsError. What a dead
    process had begun of it is removed.
    """
    for other in abandoned(path):
        remove(other)
    temporary = unfinished(path)
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


def left_in(folder: Path) -> list[Path]:
    """What writers that died left below ``folder``: their records, and files and folders that had no name yet."""
    ids: set[str] = set()
    records: list[Path] = []
    begun: list[Path] = []
    for inside, folders, files in os.walk(folder):
        place = Path(inside)
        if FOLDER in folders:
            for writer in writers(place):
                if writer.alive:
                    ids.add(writer.id)
                else:
                    records.append(place / FOLDER / f"{writer.id}.json")
        begun += [place / name for name in (*folders, *files) if UNFINISHED.fullmatch(name)]
    return [*records, *(path for path in begun if left_behind(path, ids))]


def sweep(folder: Path) -> None:
    """Remove what :func:`left_in` names, never what a living writer owns."""
    for path in left_in(folder):
        if path.parent.name == FOLDER:
            remove_dead(path.parent.parent)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


RESUMES = "What was committed is intact: the same command resumes"
UNCHANGED = "Nothing was changed: run the same command again"


@contextmanager
def storage_errors(what: str, left: str = RESUMES) -> Iterator[None]:
    """Turn the operating system's errors into StorageError: what was being written, why, what to do. ``left`` says in
    what state things are.
    """
    try:
        yield
    except GhostStoreError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT):
            reason = "no space is left on the device; free some"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"{os.strerror(number)}; make it writable"
        else:
            reason = f"{os.strerror(number)} (errno {number})"
        raise StorageError(f"cannot write {what}: {reason}. {left}") from error


def _number_of(error: Exception) -> int | None:
    """The operating system's number of an error, hidden in the words of a library or not."""
    system = hidden_error(error) or (error if isinstance(error, OSError) else None)
    return None if system is None else system.errno


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
"""What flock answers on file systems that have none."""


@contextmanager
def exclusive(folder: Path, what: str, parameter: str | None = "name") -> Iterator[None]:
    """Hold ``folder`` against other writers: of this machine by its lock (flock), which ends with the process, and of
    all machines by a record in it, see :func:`ghoststore.store.base.writers.at_work`.

    BusyError if another one holds it; ``parameter`` is the one with which to choose another, None where there is none.
    StorageError if the folder cannot be written.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise BusyError(busy(what, parameter, [])) from None  # just renamed or removed by the process that held it
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy(what, parameter, living(folder))) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        with ExitStack() as stack:
            with storage_errors(str(folder), UNCHANGED):
                stack.enter_context(at_work(folder, what, parameter))
            yield
    finally:
        os.close(handle)


def create_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder ``path`` in one step: it appears whole, on the disk, or not at all. If it is there, nothing is
    done.

    ``fill`` writes its contents into a folder beside it that no other process has. Of several processes that make the
    same, the first to finish gives it its name, and the others drop what they made. What one that died had begun is
    removed. StorageError if the disk refuses.
    """
    with storage_errors(str(path)):
        if path.exists():
            return
        for other in abandoned(path):
            remove(other)
        begun = unfinished(path)
        begun.mkdir()
        try:
            with touched(begun):
                fill(begun)
                # Everything inside before the name, as for a file.
                for inside, _, names in os.walk(begun):
                    for name in names:
                        flush(Path(inside) / name)
                    flush(Path(inside))
            os.rename(begun, path)  # fails on a folder that holds something
        except BaseException as error:
            remove(begun)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY) and path.is_dir():
                return
            raise
        flush(path.parent)


def publish_group(folder: Path, attributes: dict[str, Any]) -> None:
    """A Zarr group, unless another process made it first; its metadata appear whole or not at all."""
    folder.mkdir(exist_ok=True)
    metadata = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    publish(folder / "zarr.json", json.dumps(metadata, indent=2).encode())
