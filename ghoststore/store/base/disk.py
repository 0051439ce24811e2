"""Writes that a crash can neither undo nor leave half done, and errors of disks in sentences."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError, GhostStoreError, StorageError
from ghoststore.hidden_errors import hidden_error
from ghoststore.store.base.object_folders import publish_folder, remove_folder
from ghoststore.store.base.object_path import ObjectPath
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
from ghoststore.store.base.zarr_writes import settled


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk. An object is there when its request was answered."""
    if isinstance(path, ObjectPath):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Inside, ``path`` is written. Then who may read a new file may read it: safetensors 0.8 lets its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(stat.S_IMODE(mode))


@contextmanager
def appearing(path: Path, *, over: bool = False) -> Iterator[Path]:
    """Yield the path to write to; at the end the file ``path`` appears, whole and on the disk, or not at all.

    With ``over`` an existing file is replaced in one step; without, it stays and FileExistsError is raised. Unfinished
    files of dead processes for ``path`` are removed.
    """
    for other in abandoned(path):
        remove(other)
    temporary = unfinished(path)
    try:
        yield temporary
        # The bytes before the name: if the name is on the disk after a crash, the whole file is.
        flush(temporary)
        (os.replace if over else os.link)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def publish(path: Path, data: bytes) -> bool:
    """Make ``path`` appear whole, on the disk, with ``data``. Returns False, and changes nothing, if it exists.

    An object that exists with the same bytes counts as made: the answer to an earlier attempt may have been lost.
    """
    if isinstance(path, ObjectPath):
        return path.create(data)
    try:
        with appearing(path) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        return False
    return True


def replace(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``, on the disk, in one step: a reader sees the old file or the new one, never a mix."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return
    with appearing(path, over=True) as temporary:
        temporary.write_bytes(data)


UNFINISHED = re.compile(r"\..*\.tmp|.*\.[0-9a-f]{32}\.partial")
"""Names of unfinished files: ours, and Zarr's."""


def left_in(folder: Path) -> list[Path]:
    """What dead writers left below ``folder``: their records, and their unfinished files and folders.

    In an object store nothing shows that a writer is alive, so nothing counts as left.
    """
    if isinstance(folder, ObjectPath):
        return []
    ids: set[str] = set()
    records: list[Path] = []
    unfinished_paths: list[Path] = []
    for directory, folders, files in os.walk(folder):
        parent = Path(directory)
        if FOLDER in folders:
            for writer in writers(parent):
                if writer.alive:
                    ids.add(writer.id)
                else:
                    records.append(parent / FOLDER / f"{writer.id}.json")
        unfinished_paths += [parent / name for name in (*folders, *files) if UNFINISHED.fullmatch(name)]
    return [*records, *(path for path in unfinished_paths if left_behind(path, ids))]


def sweep(folder: Path) -> None:
    """Remove what :func:`left_in` names; it never names what a living writer owns."""
    for path in left_in(folder):
        if path.parent.name == FOLDER:
            remove_dead(path.parent.parent)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    if isinstance(path, ObjectPath):
        remove_folder(path)
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


RESUMES = "What was committed is intact: the same command resumes"
UNCHANGED = "Nothing was changed: run the same command again"


@contextmanager
def storage_errors(what: str, left: str = RESUMES) -> Iterator[None]:
    """Turn errors of the operating system into StorageError: what was being written, why it failed, what to do.

    ``left`` is the sentence on the state of the files.
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
    """The operating system's number of an error, also if a library hides it in a text; None for other errors."""
    system = hidden_error(error) or (error if isinstance(error, OSError) else None)
    return None if system is None else system.errno


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
"""Errors of flock on file systems without locks."""


@contextmanager
def exclusive(folder: Path, what: str, parameter: str | None = "name", *, shared: bool = False) -> Iterator[None]:
    """Keep other writers out of ``folder`` while the block runs; with ``shared`` those that are not shared, too.

    A lock (flock), which ends with the process, excludes those of this machine; a record in the folder those of all
    machines, see :func:`ghoststore.store.base.writers.at_work`.

    BusyError if another process writes there; ``parameter`` names the parameter by which to choose another folder, None
    if there is none. StorageError if the folder cannot be written.

    In an object store nobody is kept out: what is committed there does not depend on it.
    """
    if isinstance(folder, ObjectPath):
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise BusyError(busy(what, parameter, [])) from None  # the process that held it has just renamed or removed it
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy(what, parameter, living(folder))) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        with ExitStack() as stack:
            with storage_errors(str(folder), UNCHANGED):
                stack.enter_context(at_work(folder, what, parameter, shared=shared))
            yield
    finally:
        os.close(handle)


def create_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder ``path`` in one step: it appears whole, on the disk, or not at all. Do nothing if it exists.

    ``fill`` writes the contents into a temporary folder beside it. If several processes make the same folder, the first
    to finish names it, and the others drop their work. Unfinished folders of dead processes are removed.

    StorageError if the disk refuses.
    """
    with storage_errors(str(path)):
        if isinstance(path, ObjectPath):
            publish_folder(path, fill)
            return
        if path.exists():
            return
        for other in abandoned(path):
            remove(other)
        temporary = unfinished(path)
        temporary.mkdir()
        try:
            with touched(temporary):
                with settled():
                    fill(temporary)
                # Everything inside before the name, as for a file.
                mode = temporary.stat().st_mode & 0o666
                for directory, _, names in os.walk(temporary):
                    for name in names:
                        Path(directory, name).chmod(mode)  # safetensors 0.8 lets its owner alone read a file
                        flush(Path(directory) / name)
                    flush(Path(directory))
            os.rename(temporary, path)  # fails on a folder that holds something
        except BaseException as error:
            remove(temporary)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY) and path.is_dir():
                return
            raise
        flush(path.parent)


def publish_group(folder: Path, attributes: dict[str, Any]) -> None:
    """Make a Zarr group, unless another process did. Its metadata appear whole or not at all."""
    folder.mkdir(exist_ok=True)
    metadata = {"attributes": attributes, "zarr_format": 3, "node_type": "group"}
    publish(folder / "zarr.json", json.dumps(metadata, indent=2).encode())
