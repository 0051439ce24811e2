"""The bytes of a journal: a file that is appended to or, in an object store, an object for each entry.

Nothing can be appended to an object. So the journal ``journal/00000003.log`` is a folder there, whose objects
``00000000``, ``00000001``, … are its entries in order: put side by side they are the file. Each is made by one
conditional put: it is there whole or not at all, and of two writers one makes it.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from ghoststore.errors import BusyError, CorruptError
from ghoststore.store.base.disk import flush
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.objects import IN_FLIGHT, side_by_side
from ghoststore.store.base.opening import open_regular

AHEAD_BYTES = 64 << 20
"""Most bytes of entries that are read together from an object store; at least one."""
_NUMBER = re.compile(r"\d{8}", re.ASCII)


class JournalBytes(Protocol):
    """A journal, open for reading."""

    whole: bool
    """Whether every entry that is there was written whole. Else the last one may have been cut short by a kill."""

    @property
    def size(self) -> int:
        """Bytes of the journal."""

    def read(self, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` on, or all there are."""


class FileBytes:
    """A journal on a disk."""

    whole = False

    def __init__(self, handle: int) -> None:
        self._handle = handle

    @property
    def size(self) -> int:
        return os.fstat(self._handle).st_size

    def read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._handle, size, offset)
        while len(data) < size and (more := os.pread(self._handle, size - len(data), offset + len(data))):
            data += more  # the system may return fewer at a time
        return data


class ObjectBytes:
    """A journal in an object store, as it was listed. FileNotFoundError if it is gone, CorruptError if entries that
    others follow are: what follows would be read in their place.
    """

    whole = True

    def __init__(self, path: ObjectPath) -> None:
        if path.is_file():
            raise CorruptError(
                f"{path} is one object, as if it had come from a disk: in an object store a journal is a folder of "
                "objects. End the training with its store on the disk, and copy the run"
            )
        self._entries = sorted(
            (entry for entry in path.iterdir() if _NUMBER.fullmatch(entry.name)), key=lambda entry: entry.name
        )
        for number, entry in enumerate(self._entries):
            if int(entry.name) != number:
                raise CorruptError(f"{path} lacks its entry {number:08d}")
        self._sizes = [entry.stat().st_size for entry in self._entries]  # as listed
        self._starts = [0, *accumulate(self._sizes)]
        self._read: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        return self._starts[-1]

    def read(self, size: int, offset: int) -> bytes:
        data = b""
        while len(data) < size and offset + len(data) < self.size:
            at = offset + len(data)
            number = bisect_right(self._starts, at) - 1
            inside = at - self._starts[number]
            data += self._entry(number)[inside : inside + size - len(data)]
        return data

    def _entry(self, number: int) -> bytes:
        """The entry at ``number``. Those that follow are read with it, as many as requests are made at a time."""
        if number not in self._read:
            count = max(1, bisect_right(self._starts, self._starts[number] + AHEAD_BYTES) - 1 - number)
            numbers = range(number, min(number + min(count, IN_FLIGHT), len(self._entries)))
            self._read = dict(zip(numbers, side_by_side(self._get, numbers, len(numbers)), strict=True))
        return self._read[number]

    def _get(self, number: int) -> bytes:
        entry, size = self._entries[number], self._sizes[number]
        data = entry.read_bytes()
        if len(data) != size:
            raise CorruptError(f"{entry} has {len(data)} bytes; the listing says {size}")
        return data


@contextmanager
def opened(path: Path) -> Iterator[JournalBytes]:
    """Open a journal for reading. FileNotFoundError if it is gone, CorruptError if it is no regular file."""
    if isinstance(path, ObjectPath):
        yield ObjectBytes(path)
        return
    with open_regular(path, path.parent.parent) as file:
        yield FileBytes(file.fileno())


@contextmanager
def _writing(path: Path, flags: int = 0) -> Iterator[int]:
    """Open a journal for writing, without following a link or waiting for a pipe."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _write(handle: int, data: memoryview, offset: int) -> int:
    """Write all of ``data``. Returns the offset after it. The system may take fewer bytes at a time."""
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
    return offset


def append(path: Path, number: int, offset: int, pieces: Iterable[memoryview]) -> None:
    """Append the entry ``number``, at byte ``offset``, of ``pieces``, of which the last is the trailer.

    BusyError if another training has appended another one to an object store.
    """
    if isinstance(path, ObjectPath):
        if not (path / f"{number:08d}").create(b"".join(pieces)):
            raise BusyError(
                f"another training writes {path.parent.parent}: it has committed other numbers of these steps. Let one "
                "of them go on, or give the other another `name`"
            )
        return
    *most, trailer = pieces
    begin = offset
    with _writing(path, os.O_CREAT) as handle:
        for data in most:
            offset = _write(handle, data, offset)
        os.fsync(handle)
        # Only now that the entry is on the disk: a trailer must never exist without its entry.
        _write(handle, trailer, offset)
        os.fsync(handle)
    if not begin:
        flush(path.parent)


def cut(path: Path, end: int) -> None:
    """Remove what a dead writer left after byte ``end``; an object store has no such thing."""
    if isinstance(path, ObjectPath):
        return
    with _writing(path) as handle:
        if os.fstat(handle).st_size > end:
            os.ftruncate(handle, end)
            os.fsync(handle)


def remove(path: Path) -> None:
    """Remove a journal, if it is there."""
    if isinstance(path, ObjectPath):
        path.objects.delete(found.key for found in path.objects.below(path.key))
        return
    path.unlink(missing_ok=True)
    flush(path.parent)
