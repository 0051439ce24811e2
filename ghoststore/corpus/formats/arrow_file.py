"""Arrow's own files: streams (.arrow, as `datasets` writes them) and files with a footer (.feather, .ipc).

Both are read as streams, which is what stands between the magic bytes and the footer of the others. Before a batch is
decoded, the headers of all are looked at: a file that is cut short is refused, and so is a batch that would take too
much memory once it is decompressed.
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats.arrow import ROWS_PER_BATCH, batch_rows, reading_arrow, wanted
from ghoststore.corpus.formats.base import KeyedRow, NumberedForm
from ghoststore.errors import CorpusError
from ghoststore.store.base.opening import open_regular

LARGEST_BATCH = 1 << 30
"""Most bytes of a record batch in memory, decompressed."""
_MAGIC, _FEATHER_1 = b"ARROW1", b"FEA1"
_DICTIONARY, _BATCH = 2, 3
_CONTINUED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ArrowForm(NumberedForm):
    name: str = "arrow"
    largest: int | None = None
    adds_nulls = True

    def fields(self, path: Path) -> Sequence[str] | None:
        names: list[str] = self.schema(path).names
        return names

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        for first, batch in self._batches(path, columns):
            for begin in range(max(start - first, 0), batch.num_rows, ROWS_PER_BATCH):
                yield from batch_rows(batch.slice(begin, ROWS_PER_BATCH), first + begin, path, self.largest)

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for first, inside, table in self.groups(path, columns, keys):
            for key in inside:
                yield from batch_rows(table.slice(key - first, 1), key, path, self.largest)

    def groups(
        self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[int], Any]]:
        """(first row, those of ``keys`` in it, Arrow table) of each batch with any of ``keys``."""
        import pyarrow

        for first, batch in self._batches(path, columns):
            inside = keys[bisect_left(keys, first) : bisect_left(keys, first + batch.num_rows)]
            if inside:
                yield first, inside, pyarrow.Table.from_batches([batch])
            if not keys or first + batch.num_rows > keys[-1]:
                return

    def _batches(self, path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Any]]:
        """(number of the first row, record batch of the ``columns``) of each batch."""
        with self._opened(path) as (stream, _):
            chosen, first = wanted(columns, stream.schema.names), 0
            for batch in stream:
                narrowed = batch if chosen is None else batch.select(chosen)
                narrowed.validate(full=True)  # places in it may lie anywhere otherwise
                yield first, narrowed
                first += batch.num_rows

    def schema(self, path: Path) -> Any:
        """The Arrow schema of the file, with metadata."""
        with self._opened(path) as (stream, _):
            return stream.schema

    def count(self, path: Path) -> int:
        with self._opened(path) as (_, rows):
            return rows

    @contextmanager
    def _opened(self, path: Path) -> Iterator[tuple[Any, int]]:
        """(the stream of batches, number of rows in all), after the headers were checked."""
        import pyarrow

        with reading_arrow(path), open_regular(path) as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise CorpusError(f"{path}: damaged: it is empty") from None
            if mapped[: len(_FEATHER_1)] == _FEATHER_1:
                raise CorpusError(
                    f"{path}: the first version of Feather, which is not read; write it again: pyarrow.feather."
                    "write_feather(pyarrow.feather.read_table(…), …)"
                )
            begin = 0
            if mapped[: len(_MAGIC)] == _MAGIC:
                begin = 8
                if len(mapped) < 16 or mapped[-len(_MAGIC) :] != _MAGIC:
                    raise CorpusError(f"{path}: damaged or cut short: its last bytes are not {_MAGIC.decode()}")
            try:
                rows = _checked_rows(path, mapped, begin, max(self.largest or 0, LARGEST_BATCH))
            except (struct.error, IndexError, OverflowError) as error:
                raise CorpusError(f"{path}: damaged: a header is none ({error})") from None
            try:
                yield pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped).slice(begin)), rows
            except UnicodeDecodeError as error:  # in the name of a column
                raise CorpusError(f"{path}: damaged: {error}") from None


def _checked_rows(path: Path, data: mmap.mmap, at: int, largest: int) -> int:
    """The number of rows of a stream that begins at the byte ``at``. CorpusError if it is cut short, or if a batch
    takes more than ``largest`` bytes in memory.
    """
    rows = 0
    while True:
        if at + 4 > len(data):
            raise CorpusError(f"{path}: cut short, or its writer was not closed: no end of a stream of Arrow")
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size == _CONTINUED:  # older files have the size alone
            (size,) = struct.unpack_from("<I", data, at)
            at += 4
        if size == 0:
            return rows
        header, body = at, at + size
        message = _reached(data, header)
        (length,) = struct.unpack_from("<q", data, place) if (place := _field(data, message, 3)) else (0,)
        at = body + length
        if length < 0 or at > len(data):
            raise CorpusError(f"{path}: damaged or cut short: a batch ends beyond the end of the file")
        kind_at, inner_at = _field(data, message, 1), _field(data, message, 2)
        kind = data[kind_at] if kind_at else 0
        if kind not in (_DICTIONARY, _BATCH) or not inner_at:
            continue
        batch = _reached(data, inner_at)
        if kind == _DICTIONARY:
            if not (inner_at := _field(data, batch, 1)):
                continue
            batch = _reached(data, inner_at)
        elif count_at := _field(data, batch, 0):
            rows += struct.unpack_from("<q", data, count_at)[0]
        taken = _bytes_of(data, batch, body, length)
        if taken > largest:
            raise CorpusError(
                f"{path}: a batch of {taken:,} bytes in memory, at most {largest:,} are read: write the file with "
                "fewer rows a batch (`chunksize` of write_feather), or give `fields.max_record_bytes` a larger number"
            )


def _bytes_of(data: mmap.mmap, batch: int, body: int, length: int) -> int:
    """Bytes of a record batch in memory: of a compressed one, what its buffers say of themselves."""
    buffers_at = _field(data, batch, 2)
    if not buffers_at or not _field(data, batch, 3):
        return length
    buffers = _reached(data, buffers_at)
    total = 0
    for number in range(struct.unpack_from("<I", data, buffers)[0]):
        offset, size = struct.unpack_from("<qq", data, buffers + 4 + 16 * number)
        if size >= 8 and 0 <= offset <= length - 8:
            (whole,) = struct.unpack_from("<q", data, body + offset)
            total += whole if whole >= 0 else size - 8  # -1 says that it is not compressed
    return total


# A header is a flatbuffer: a table begins with the distance back to its vtable, which has the place of each field.


def _reached(data: mmap.mmap, at: int) -> int:
    """The place that the offset at ``at`` leads to."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: mmap.mmap, table: int, number: int) -> int:
    """The place of a field of a table; 0 if the table lacks it."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError("a vtable before the file")
    (size,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + int(offset) if offset else 0
