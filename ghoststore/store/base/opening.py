"""Opens files of a store, a checkpoint or a corpus: only regular ones, without waiting, never beyond a limit.

A folder may come from anywhere. A pipe in place of a file would block forever, a device would never end, a link may
lead anywhere, and a few bytes of JSON may ask for gigabytes of objects.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, cast

from ghoststore.errors import CorruptError
from ghoststore.store.base.object_path import ObjectFile, ObjectPath, beginning

DEEPEST = 64
"""Most levels of nested objects and lists in JSON."""
MOST_VALUES = 1 << 22
"""Most values of a JSON document: each may take about 80 bytes in memory, however few in the file."""

# So that a pipe without a writer opens at once, a terminal does not become ours, and no child gets the descriptor.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# With O_PATH a folder on the way is not opened: on network file systems, opening it costs a request.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: Path, within: Path | None = None) -> FileIO:
    """Open the regular file at ``path`` for reading, unbuffered. It never waits.

    With ``within`` the file must lie below that folder, and no link on the way from there is followed: a part may be a
    link as a whole, but nothing inside it may be one.

    FileNotFoundError or NotADirectoryError if nothing is there. CorruptError for anything but a regular file, for a
    link, for a name that no file can have, and if the system refuses. StorageError if an object store does not answer.
    """
    if isinstance(path, ObjectPath):
        return cast(FileIO, ObjectFile(path))  # it is read alike; only size_open() has to know
    try:
        handle = os.open(path, _FILE) if within is None else _open_below(path, within)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except CorruptError:
        raise
    except ValueError as error:  # a zero byte, or half a surrogate pair: both can stand in JSON
        raise CorruptError(f"{str(path)!r:.200} cannot be the name of a file: {error}") from None
    except OSError as error:
        reason = "it is a socket, or a device" if error.errno == errno.ENXIO else error.strerror
        raise CorruptError(f"{path!s:.1000} cannot be read: {reason}") from error
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return FileIO(handle, "rb")
    os.close(handle)
    kind = next((words for is_kind, words in _KINDS if is_kind(mode)), "something else")
    raise CorruptError(f"{path} is {kind}; a file is expected there")


def _open_below(path: Path, within: Path) -> int:
    # As text: every chunk is opened here, and pathlib would take as long as the system itself.
    folder = f"{within}/"
    names = str(path).removeprefix(folder).split("/")
    if not str(path).startswith(folder) or ".." in names or "" in names:
        raise CorruptError(f"{str(path)!r:.200} lies outside {within}")
    handle = os.open(within, _FOLDER)
    try:
        for name in names[:-1]:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        return os.open(names[-1], _FILE | os.O_NOFOLLOW, dir_fd=handle)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            _refuse_link(names, within)
        raise
    finally:
        os.close(handle)


def _refuse_link(names: Sequence[str], within: Path) -> None:
    path = within
    for name in names:
        path /= name
        if path.is_symlink():
            raise CorruptError(f"{path} is a link, and inside {within} none is followed; put the file itself there")


def links_below(folder: Path) -> Iterator[Path]:
    """Links in ``folder`` and in all folders inside it; none if it does not exist, and none in an object store."""
    pending = [] if isinstance(folder, ObjectPath) else [folder]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))


def refuse_links(folder: Path) -> None:
    """CorruptError naming a link below ``folder``: through one, a write or a removal would reach another place."""
    for link in links_below(folder):
        raise CorruptError(f"{link} is a link, and inside {folder} none is followed; put the file itself there")


def is_other(path: Path, *, folder: bool) -> bool:
    """Whether something else than a folder, or than a file, is at ``path``, such as a link to nothing. It is looked at
    once: the folder of a living writer may come and go.
    """
    if isinstance(path, ObjectPath):
        return path.is_file() if folder else path.is_dir()
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    if stat.S_ISLNK(mode):
        return not (path.is_dir() if folder else path.is_file())
    return not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode))


def size_of(path: Path, within: Path | None = None) -> int:
    """Bytes of a regular file. Raises as :func:`open_regular`."""
    if isinstance(path, ObjectPath):
        return path.stat().st_size
    with open_regular(path, within) as file:
        return size_open(file)


def size_open(file: FileIO | ObjectFile) -> int:
    """Bytes of an open file."""
    return file.size if isinstance(file, ObjectFile) else os.fstat(file.fileno()).st_size


def size_and_beginning(path: Path, count: int, within: Path | None = None) -> tuple[int, bytes]:
    """(bytes of a regular file, the first ``count`` of them). Raises as :func:`open_regular`."""
    if isinstance(path, ObjectPath):
        return beginning(path, count)
    with open_regular(path, within) as file:
        return size_open(file), file.read(count)


def names_in(folder: Path) -> list[str]:
    """Names of the files and folders in ``folder``. OSError if it cannot be listed."""
    if isinstance(folder, ObjectPath):
        return [path.name for path in folder.iterdir()]
    return os.listdir(folder)


def read_bounded(path: Path, largest: int, within: Path | None = None) -> bytes:
    """Read a file. ValueError if it has more than ``largest`` bytes, else errors of :func:`open_regular`."""
    opened = open_regular(path, within)
    with BufferedReader(opened) as file:
        size = size_open(opened)
        if size > largest:
            raise ValueError(f"it is too large: {size:,} bytes, at most {largest:,} are read")
        data = file.read(size + 1)
        if len(data) > size:  # as in /proc, where every file claims to be empty
            raise ValueError("it has more bytes than its size says")
        return data


def parse_json(data: bytes) -> Any:
    """Parse a JSON document.

    ValueError if it is no JSON, nests deeper than DEEPEST levels or has more than MOST_VALUES values.
    """
    # Every value follows a comma or an opening bracket, so counting these is cheap and never too low.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"it nests deeper than {DEEPEST} levels") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return value
    raise ValueError(f"it nests deeper than {DEEPEST} levels")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
