"""Reading an object by ranges: a file that is large, read from its beginning or in places.

:class:`ObjectFile` asks for all bytes up to the end. That is right for the files of a store, which are small and read
whole. A corpus is neither: a text is a few kilobytes somewhere in it, and a pass over it takes minutes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ghoststore.errors import MismatchError, StorageError
from ghoststore.store.base.object_path import ObjectPath, ObjectReader
from ghoststore.store.base.objects import IN_FLIGHT, EndsBeforeError, Found

SMALLEST = 32 << 10
"""Bytes of the first request in a place. Each that follows on asks for four times as many, up to LARGEST."""
LARGEST = 4 << 20
AHEAD = 8
"""Requests of LARGEST bytes that are under way while a file is read on; docs/object-storage.md has the figures."""
BEGINNING = 1 << 20
"""Most bytes that are asked for of a file before the one ahead of it is read to its end."""
BEGINNINGS = 8 << 20
"""Most bytes of the beginnings of such files, of IN_FLIGHT of them at most."""


class RangedFile(ObjectReader):
    """An object, open for reading by ranges. It is one version of the object: another one is a MismatchError.

    FileNotFoundError, when it is first read, if there is no such object; StorageError as :class:`Objects`.
    """

    def __init__(self, path: ObjectPath) -> None:
        super().__init__(path)
        self._found: Found | None = None
        """What the first answer said of the object."""
        self._begin, self._bytes = 0, memoryview(b"")
        """The bytes that are there, and the place of the first of them."""
        self._next = SMALLEST
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[bytearray]]] = deque()
        """(place, answer) of the requests under way, in the order in which they are needed."""
        self._expected: deque[int] = deque()
        self._each = 0

    @property
    def size(self) -> int:
        if self._found is None:
            self._same(self.path.objects.head(self.path.key))
        assert self._found is not None
        return self._found.size

    def again(self) -> RangedFile:
        """Another file of the same version of the object, with a place of its own."""
        other = RangedFile(self.path)
        _ = self.size
        other._found = self._found
        return other

    def expect(self, places: Iterable[int], each: int) -> None:
        """Say where, in ascending order, about ``each`` bytes will be read: several requests are then under way."""
        self._expected, self._each = deque(places), each
        self._look_ahead()

    def begin(self, pool: ThreadPoolExecutor, count: int) -> None:
        """Ask for the first ``count`` bytes, before anything is read."""
        self._next = max(count, SMALLEST)
        self._ahead.append((0, pool.submit(self._fetch, 0, count)))

    def read(self, size: int | None = -1) -> bytes:
        """``size`` bytes, and fewer only at the end, as from a file on a disk."""
        if size is None or size < 0:
            size = max(0, self.size - self._position)
        parts: list[bytes] = []
        while size > 0 and (part := self._take(size, size)):
            parts.append(bytes(part))
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        part = self._take(len(view), 0)
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        for _, answer in self._ahead:
            answer.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _take(self, most: int, wanted: int) -> memoryview:
        """At most ``most`` bytes from the position on, none at the end. A new request asks for ``wanted`` at least."""
        at = self._position - self._begin
        if not 0 <= at < len(self._bytes):
            listed = self._found or self.path.listed
            if (listed is None or self._position >= listed.size) and self._position >= self.size:
                return memoryview(b"")  # no range of bytes begins there
            self._request(wanted)
            at = 0
        part = self._bytes[at : at + most]
        self._position += len(part)
        return part

    def _request(self, wanted: int) -> None:
        """Have the bytes at the position."""
        place = self._position
        follows = place == self._begin + len(self._bytes)
        if not follows:
            self._next = SMALLEST
        while self._ahead and (self._ahead[0][0] < place or not (follows or self._each)):  # not needed after all
            self._ahead.popleft()[1].cancel()
        if self._ahead and self._ahead[0][0] == place:
            data = self._ahead.popleft()[1].result()
        else:
            stop = place + max(self._next, wanted)
            data = self._fetch(place, min(stop, self._ahead[0][0]) if self._ahead else stop)
        self._begin, self._bytes = place, memoryview(data)
        self._next = min(self._next * 4, LARGEST)
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Ask for what will be read after the bytes that are there: expected places, or all that follows."""
        end = self._begin + len(self._bytes)
        if self._each:
            while self._expected and len(self._ahead) < IN_FLIGHT:
                place = self._expected.popleft()
                # Not what is there already, and nothing beyond the end of an object that has become shorter.
                if (self._ahead[-1][0] + self._each if self._ahead else end) <= place < self.size:
                    self._submit(place, self._each)
        elif self._next == LARGEST:
            place = self._ahead[-1][0] + LARGEST if self._ahead else end
            while len(self._ahead) < AHEAD and place < self.size:
                self._submit(place, LARGEST)
                place += LARGEST

    def _submit(self, place: int, count: int) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(IN_FLIGHT, "ghoststore-ranges")
        self._ahead.append((place, self._pool.submit(self._fetch, place, place + count)))

    def _fetch(self, start: int, stop: int) -> bytearray:
        objects = self.path.objects
        if self._found is not None:
            stop = min(stop, self._found.size)
        try:
            found, pieces = objects.get(self.path.key, start, stop)
        except EndsBeforeError:
            raise self._written_again() from None
        self._same(found)
        data = bytearray(max(0, min(stop, found.size) - start))
        view, filled = memoryview(data), 0
        for piece in pieces:  # copied one by one: joined they would be in memory twice
            part = memoryview(piece).cast("B")
            if len(part) > len(data) - filled:
                raise StorageError(f"cannot read {self.path}: the answer has more bytes than were asked for")
            view[filled : filled + len(part)] = part
            filled += len(part)
        if filled != len(data):
            raise StorageError(f"cannot read {self.path}: the answer ends at byte {start + filled:,}")
        return data

    def _same(self, found: Found) -> None:
        if self._found is None:
            self._found = found
        elif self._found.version != found.version:
            raise self._written_again()

    def _written_again(self) -> MismatchError:
        return MismatchError(f"{self.path} was written again while it was read: run the same command again")


def expecting(file: Any, places: Iterable[int], each: int = SMALLEST) -> None:
    """:meth:`RangedFile.expect` of the file under a buffer; nothing for others."""
    if isinstance(raw := getattr(file, "raw", file), RangedFile):
        raw.expect(places, each)


def open_ranged(path: ObjectPath) -> RangedFile:
    """An object, open for reading: that whose beginning is under way, if there is one."""
    file, path.opened = path.opened, None
    return RangedFile(path) if file is None else file


def beginnings(paths: Sequence[Path]) -> Iterator[Path]:
    """``paths`` in order. Of objects that a listing named, the first bytes of those that follow are asked for while one
    is read, so that many small ones do not wait for each other; not before the second of them is needed.

    At most IN_FLIGHT requests and BEGINNINGS bytes are under way or unread. What fails does so where it is read.
    """
    if paths:
        yield paths[0]
    ahead: deque[tuple[Path, int]] = deque()
    pool = ThreadPoolExecutor(IN_FLIGHT, "ghoststore-beginnings")
    try:
        for path in paths[1:]:
            listed = path.listed if isinstance(path, ObjectPath) else None
            count = 0 if listed is None else min(listed.size, BEGINNING)
            while ahead and (len(ahead) == IN_FLIGHT or sum(each for _, each in ahead) + count > BEGINNINGS):
                yield ahead.popleft()[0]
            if isinstance(path, ObjectPath) and count:
                path = path.twin()  # by which nobody else opens it
                path.opened = RangedFile(path)
                path.opened.begin(pool, count)
            ahead.append((path, count))
        while ahead:
            yield ahead.popleft()[0]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
