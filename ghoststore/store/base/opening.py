"""Opening what a store, a checkpoint or a corpus holds: regular files alone, without waiting, never beyond a limit.

A folder may come from anywhere. A pipe in place of a file would be waited for without end, a device read without end;
a link may lead anywhere; and a few bytes of JSON may ask for gigabytes of objects.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from ghoststore.errors import CorruptError

DEEPEST = 64
"""Objects and lists of JSON inside one another."""
MOST_VALUES = 1 << 22
"""Of one JSON document; each may take some 80 bytes in memory, whatever it takes in the file."""

# A pipe without a writer is opened at once, a terminal does not become ours, and no child gets the descriptor.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
# Where the system can, a folder on the way is only walked through: on network file systems, opening it costs a request.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: Path, within: Path | None = None) -> FileIO:
    """The regular file at ``path`` for reading, unbuffered. Never waits.

    With ``within`` it must lie below that folder, and no link on the way from there is followed: a part of a store may
    be a link as a whole, nothing inside it may be one.

    FileNotFoundError or NotADirectoryError where nothing is there; CorruptError for anything but a regular file, for a
    link, for a name that no file can have, and where the system refuses (it says why).
    """
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
    # As text: each chunk that is read comes by here, and pathlib takes as long as the system.
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
    place = within
    for name in names:
        place /= name
        if place.is_symlink():
            raise CorruptError(f"{place} is a link, and inside {within} none is followed; put the file itself there")


def links_below(folder: Path) -> Iterator[Path]:
    """Links in ``folder`` and all folders inside it. Nothing where it is not there."""
    pending = [folder]
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
    """CorruptError naming a link below ``folder``: who writes there, or removes, must not do it elsewhere."""
    for place in links_below(folder):
        raise CorruptError(f"{place} is a link, and inside {folder} none is followed; put the file itself there")


def size_of(path: Path, within: Path | None = None) -> int:
    """Bytes of a regular file; raises as :func:`open_regular`."""
    with open_regular(path, within) as file:
        return os.fstat(file.fileno()).st_size


def read_bounded(path: Path, largest: int, within: Path | None = None) -> bytes:
    """The bytes of a file; ValueError for one of more than ``largest``, before it is read. Raises as
    :func:`open_regular`.
    """
    with BufferedReader(open_regular(path, within)) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"it is too large: {size:,} bytes, at most {largest:,} are read")
        data = file.read(size + 1)
        if len(data) > size:  # of /proc, say, where each file claims to be empty
            raise ValueError("it has more bytes than its size says")
        return data


def parse_json(data: bytes) -> Any:
    """The value of a JSON document. ValueError for one that nests deeper than DEEPEST or has more than MOST_VALUES
    values, and for what is no JSON.
    """
    # Each value but the first of its list follows a comma or a bracket: counting these is cheap, and never too low.
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
