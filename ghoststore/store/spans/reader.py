"""Streams chunks of a part or a run with read-ahead, in bounded memory, and checks every checksum.

A chunk file holds its numbers, little endian and row by row, and their crc32c in four bytes (Zarr's ``bytes`` and
``crc32c`` codecs). Reading it directly into a reused buffer is 1.5 to 2 times as fast as through Zarr;
``tests/store/test_reader.py`` checks that both give the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, StorageError
from ghoststore.store.base.object_path import ObjectPath, at_once
from ghoststore.store.base.objects import IN_FLIGHT, side_by_side
from ghoststore.store.base.opening import open_regular, size_open
from ghoststore.store.spans.group import Spanned
from ghoststore.store.spans.layout import CRC_BYTES, ArraySpec

PIECE_BYTES = 1 << 19
READ_AHEAD = 2
"""Chunks in memory beside the one in use."""
Bytes: TypeAlias = NDArray[np.uint8]
NOTHING: Bytes = np.empty(0, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Entries ``start`` to ``stop`` of one array, in the stored dtype. Valid until the next chunk is read."""

    start: int
    stop: int
    data: NDArray[Any]


def read_chunk(path: Path, size: int, buffer: NDArray[np.uint8] = NOTHING, within: Path | None = None) -> Bytes:
    """Read a chunk file of ``size`` bytes, into ``buffer`` if that has the same size, else into a new one.

    No memory is allocated before the size of the file is checked. CorruptError naming the file if it is damaged.
    """
    try:
        with open_regular(path, within) as file:
            present = size_open(file)
            if present != size:
                raise CorruptError(f"{path} has {present} bytes; {size} were written")
            if len(buffer) != size:
                buffer = np.empty(size, dtype=np.uint8)
            view, filled, checksum = memoryview(buffer.data), 0, 0
            numbers = len(buffer) - CRC_BYTES
            while filled < len(view) and (count := file.readinto(view[filled : filled + PIECE_BYTES])):
                # Here, while the piece is in the processor's cache.
                checksum = google_crc32c.extend(checksum, buffer[filled : min(filled + count, numbers)])
                filled += count
            end = file.read(1) if filled == len(view) else b""
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptError(f"{path} is missing, though its span is committed; see `ghoststore verify`") from None
    except (CorruptError, StorageError):
        raise
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    if filled != len(buffer) or end:
        raise CorruptError(f"{path} has {'more than ' * bool(end)}{filled} bytes; {len(buffer)} were written")
    stated = int.from_bytes(buffer[-CRC_BYTES:].tobytes(), "little")
    if checksum != stated:
        raise CorruptError(f"{path} is damaged: its crc32c does not hold; see `ghoststore verify`")
    return buffer


class WarmChunks:
    """Chunks of objects that stay in memory from one scan to the next, the first ones up to ``largest`` bytes. Threads
    share it.

    What is committed never changes, so they are never asked for again.
    """

    def __init__(self, largest: int) -> None:
        self._room = largest
        self._lock = threading.Lock()
        self._chunks: dict[Path, Bytes] = {}

    def read(self, path: Path, size: int, buffer: Bytes = NOTHING, within: Path | None = None) -> Bytes:
        """As :func:`read_chunk`. The bytes are the caller's."""
        data = self._chunks.get(path)
        if data is None or len(data) != size:
            return self._keep(path, read_chunk(path, size, buffer, within))
        if len(buffer) != size:
            return data.copy()
        buffer[:] = data
        return buffer

    def _keep(self, path: Path, data: Bytes) -> Bytes:
        with self._lock:
            if path not in self._chunks and len(data) <= self._room:
                self._room -= len(data)
                self._chunks[path] = data.copy()
        return data


class ReadAhead:
    """Chunks of objects that were asked for before they are needed. One thread announces them, others take them.

    :data:`~ghoststore.store.base.objects.IN_FLIGHT` requests are under way at a time. With ``warm`` what that holds is
    not asked for again.
    """

    def __init__(self, warm: WarmChunks | None = None) -> None:
        self._read = read_chunk if warm is None else warm.read
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "ghoststore-read-ahead")
        self._chunks: dict[Path, Future[Bytes]] = {}

    def announce(self, path: Path, size: int, within: Path) -> None:
        """Begin to read a chunk, as :func:`read_chunk` does."""
        self._chunks[path] = self._pool.submit(self._read, path, size, within=within)

    def take(self, path: Path, size: int, buffer: Bytes = NOTHING, within: Path | None = None) -> Bytes:
        """As :func:`read_chunk`, of a chunk that was announced once, or of any other."""
        future = self._chunks.pop(path, None)
        if future is None:
            return read_chunk(path, size, buffer, within)
        data = future.result()
        if len(buffer) == size:
            buffer[:] = data
            return buffer
        return data

    def close(self, *, taken: bool) -> None:
        """No chunk is announced any more. With ``taken`` those that were will be taken, else they are given up."""
        self._pool.shutdown(wait=False, cancel_futures=not taken)
        if not taken:
            self._chunks.clear()


def chunks_of(source: Spanned[Any], spec: ArraySpec, spans: list[int]) -> Iterator[tuple[Path, int, int]]:
    """(file, start, stop) of each chunk of the spans; the range is in entries."""
    for span in spans:
        start, stop = spec.entries(*source.layout.span_of(span))
        for key in source.layout.chunk_keys(spec, span):
            first = int(key.split("/")[2]) * spec.chunk_rows
            yield source.path / key, max(first, start), min(first + spec.chunk_rows, stop)


def chunk_numbers(buffer: NDArray[np.uint8], spec: ArraySpec, count: int) -> NDArray[Any]:
    """A view of the first ``count`` entries of a chunk that :func:`read_chunk` has read."""
    numbers: NDArray[Any] = buffer[:-CRC_BYTES].view(spec.dtype)
    return numbers.reshape(-1, *spec.columns)[:count]


def read_span(source: Spanned[Any], name: str, span: int) -> NDArray[Any]:
    """One committed span of a numeric array with one chunk a span, checked, in the stored dtype."""
    home, own = source.home(span)
    if home is not source:
        return source.seen(name, span, read_span(home, name, own))
    spec = source.spec(name)
    start, stop = spec.entries(*source.layout.span_of(span))
    (key,) = source.layout.chunk_keys(spec, span)
    read = read_chunk if source.ahead is None else source.ahead.take
    buffer = read(source.path / key, spec.chunk_bytes + CRC_BYTES, within=source.path)
    return chunk_numbers(buffer, spec, stop - start)


def stream(source: Spanned[Any], name: str, spans: list[int] | None = None) -> Iterator[Chunk]:
    """Chunks of a numeric array over ``spans`` (default: all committed), in order, read ahead by a thread.

    Memory: READ_AHEAD + 1 chunks, whatever the size of the part or run; from an object store one for each request.
    """
    for home, own, shift in source.homes(source.spans if spans is None else spans):
        with closing(_stream(home, name, own)) as chunks:
            for chunk in chunks:
                yield replace(chunk, start=chunk.start + shift, stop=chunk.stop + shift) if shift else chunk


def _stream(source: Spanned[Any], name: str, spans: list[int]) -> Generator[Chunk]:
    spec = source.spec(name)
    chunks = list(chunks_of(source, spec, spans))
    if isinstance(source.path, ObjectPath):
        yield from _requested(source, spec, chunks)
        return
    free: queue.Queue[NDArray[np.uint8] | None] = queue.Queue()
    full: queue.Queue[tuple[NDArray[np.uint8], int, int] | BaseException] = queue.Queue()
    for _ in range(min(READ_AHEAD + 1, len(chunks))):
        free.put(NOTHING)  # the buffers are made when the size of a chunk is checked

    def read_ahead() -> None:
        try:
            for path, start, stop in chunks:
                buffer = free.get()
                if buffer is None:
                    return
                buffer = read_chunk(path, spec.chunk_bytes + CRC_BYTES, buffer, source.path)
                full.put((buffer, start, stop))
        except BaseException as error:  # noqa: BLE001 - carried to the reader, which raises it
            full.put(error)

    thread = threading.Thread(target=read_ahead, name="ghoststore-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in chunks:
            item = full.get()
            if isinstance(item, BaseException):
                raise item
            buffer, start, stop = item
            yield Chunk(start, stop, chunk_numbers(buffer, spec, stop - start))
            free.put(buffer)
    finally:
        free.put(None)
        thread.join()


def _requested(source: Spanned[Any], spec: ArraySpec, chunks: list[tuple[Path, int, int]]) -> Iterator[Chunk]:
    """:func:`stream` from an object store: several chunks are on their way at a time."""

    def read(chunk: tuple[Path, int, int]) -> Bytes:
        return read_chunk(chunk[0], spec.chunk_bytes + CRC_BYTES, within=source.path)

    for (_, start, stop), buffer in zip(chunks, side_by_side(read, chunks, at_once(source.path)), strict=True):
        yield Chunk(start, stop, chunk_numbers(buffer, spec, stop - start))
