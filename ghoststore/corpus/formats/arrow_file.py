"""Arrow's own files: streams (.arrow, as `datasets` writes them) and files with a footer (.feather, .ipc).

Both are read as streams, which is what stands between the magic bytes and the footer of the others. Before a batch is
decoded, the headers of all are looked at: a file that is cut short is refused, and so is a batch that would take too
much memory once it is decompressed.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

from ghoststore.corpus.formats.arrow import ROWS_PER_BATCH, batch_rows, reading_arrow, wanted
from ghoststore.corpus.formats.base import KeyedRow, NumberedForm, open_file
from ghoststore.errors import CorpusError
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.object_ranges import RangedFile

LARGEST_BATCH = 1 << 30
"""Most bytes of a record batch in memory, decompressed."""
_MAGIC, _FEATHER_1 = b"ARROW1", b"FEA1"
_DICTIONARY, _BATCH = 2, 3
_CONTINUED = 0xFFFFFFFF
_Bytes: TypeAlias = "mmap.mmap | _Ranges"


@dataclass(frozen=True, slots=True)
class ArrowForm(NumberedForm):
    name: str = "arrow"
    largest: int | None = None
    adds_nulls = True

    def fields(self, path: Path) -> Sequence[str] | None:
        names: list[str] = self.schema(path).names
        return names

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        for first, batch in self._batches(path, columns, lambda first, rows: start < first + rows):
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

        def inside(first: int, rows: int) -> Sequence[int]:
            return keys[bisect_left(keys, first) : bisect_left(keys, first + rows)]

        for first, batch in self._batches(path, columns, lambda first, rows: len(inside(first, rows)) > 0):
            yield first, inside(first, batch.num_rows), pyarrow.Table.from_batches([batch])

    def _batches(
        self, path: Path, columns: Sequence[str] | None, needed: Callable[[int, int], bool]
    ) -> Iterator[tuple[int, Any]]:
        """(number of the first row, record batch of the ``columns``) of each batch that is ``needed``, as that says
        of its first row and the number of its rows.
        """
        with self._opened(path) as opened:
            chosen, first = wanted(columns, opened.schema.names), 0
            for place, rows in enumerate(opened.batches.rows):
                if needed(first, rows):
                    batch = opened.read(place)
                    narrowed = batch if chosen is None else batch.select(chosen)
                    narrowed.validate(full=True)  # places in it may lie anywhere otherwise
                    yield first, narrowed
                first += rows

    def schema(self, path: Path) -> Any:
        """The Arrow schema of the file, with metadata."""
        with self._opened(path) as opened:
            return opened.schema

    def count(self, path: Path) -> int:
        with self._opened(path) as opened:
            return sum(opened.batches.rows)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[_Stream]:
        """The stream of batches, after the headers were checked."""
        import pyarrow

        with reading_arrow(path), open_file(path) as file:
            data = _Ranges(file) if isinstance(path, ObjectPath) else _mapped(path, file)
            if data[: len(_FEATHER_1)] == _FEATHER_1:
                raise CorpusError(
                    f"{path}: the first version of Feather, which is not read; write it again: pyarrow.feather."
                    "write_feather(pyarrow.feather.read_table(…), …)"
                )
            begin = 0
            if data[: len(_MAGIC)] == _MAGIC:
                begin = 8
                if len(data) < 16 or data[len(data) - len(_MAGIC) : len(data)] != _MAGIC:
                    raise CorpusError(f"{path}: damaged or cut short: its last bytes are not {_MAGIC.decode()}")
            try:
                batches = _checked(path, data, begin, max(self.largest or 0, LARGEST_BATCH))
            except (struct.error, IndexError, OverflowError) as error:
                raise CorpusError(f"{path}: damaged: a header is none ({error})") from None
            file.seek(begin)
            source = file if isinstance(data, _Ranges) else pyarrow.py_buffer(data).slice(begin)
            try:
                yield _Stream(pyarrow.ipc.open_stream(source), file, batches)
            except UnicodeDecodeError as error:  # in the name of a column
                raise CorpusError(f"{path}: damaged: {error}") from None


def _mapped(path: Path, file: FileIO) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CorpusError(f"{path}: damaged: it is empty") from None


class _Ranges:
    """The bytes of an object, of which those that are asked for are read."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: int | slice) -> Any:
        start, stop, _ = (key if isinstance(key, slice) else slice(key, key + 1)).indices(self._size)
        self._file.seek(start)
        data = self._file.read(max(0, stop - start)) or b""
        return data if isinstance(key, slice) else data[0]


@dataclass(slots=True)
class _Batches:
    """What the headers of a stream say: of each batch where its message begins, and the number of its rows."""

    begins: list[int]
    rows: list[int]
    plain: bool = True
    """Whether no batch needs what another message holds (a dictionary)."""


@dataclass(slots=True)
class _Stream:
    """A stream that is open. Batches are read in ascending order."""

    reader: Any
    file: FileIO
    batches: _Batches
    _next: int = 0

    @property
    def schema(self) -> Any:
        return self.reader.schema

    def read(self, place: int) -> Any:
        """The record batch ``place``. From object storage, it alone is read where that is possible."""
        import pyarrow

        if isinstance(self.file, RangedFile) and self.batches.plain:
            self.file.seek(self.batches.begins[place])
            return pyarrow.ipc.read_record_batch(pyarrow.ipc.read_message(self.file), self.schema)
        while True:
            batch = self.reader.read_next_batch()
            self._next += 1
            if self._next > place:
                return batch


def _checked(path: Path, data: _Bytes, at: int, largest: int) -> _Batches:
    """The batches of a stream that begins at the byte ``at``. CorpusError if it is cut short, or if a batch takes more
    than ``largest`` bytes in memory.
    """
    batches = _Batches([], [])
    while True:
        if at + 4 > len(data):
            raise CorpusError(f"{path}: cut short, or its writer was not closed: no end of a stream of Arrow")
        begin = at
        size = _number("<I", data, at)
        at += 4
        if size == _CONTINUED:  # older files have the size alone
            size = _number("<I", data, at)
            at += 4
        if size == 0:
            return batches
        header, body = at, at + size
        message = _reached(data, header)
        length = _number("<q", data, place) if (place := _field(data, message, 3)) else 0
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
            batches.plain = False
        else:
            batches.begins.append(begin)
            batches.rows.append(_number("<q", data, count_at) if (count_at := _field(data, batch, 0)) else 0)
        taken = _bytes_of(data, batch, body, length)
        if taken > largest:
            raise CorpusError(
                f"{path}: a batch of {taken:,} bytes in memory, at most {largest:,} are read: write the file with "
                "fewer rows a batch (`chunksize` of write_feather), or give `fields.max_record_bytes` a larger number"
            )


def _bytes_of(data: _Bytes, batch: int, body: int, length: int) -> int:
    """Bytes of a record batch in memory: of a compressed one, what its buffers say of themselves."""
    buffers_at = _field(data, batch, 2)
    if not buffers_at or not _field(data, batch, 3):
        return length
    buffers = _reached(data, buffers_at)
    count = _number("<I", data, buffers)
    total = 0
    for offset, size in struct.iter_unpack("<qq", data[buffers + 4 : buffers + 4 + 16 * count]):
        if size >= 8 and 0 <= offset <= length - 8:
            whole = _number("<q", data, body + offset)
            total += whole if whole >= 0 else size - 8  # -1 says that it is not compressed
    return total


# A header is a flatbuffer: a table begins with the distance back to its vtable, which has the place of each field.


def _number(form: str, data: _Bytes, at: int) -> int:
    """The number at the byte ``at``. struct.error if the file ends before."""
    if at < 0:
        raise IndexError("a place before the file")
    return int(struct.unpack(form, data[at : at + struct.calcsize(form)])[0])


def _reached(data: _Bytes, at: int) -> int:
    """The place that the offset at ``at`` leads to."""
    return at + _number("<I", data, at)


def _field(data: _Bytes, table: int, number: int) -> int:
    """The place of a field of a table; 0 if the table lacks it."""
    vtable = table - _number("<i", data, table)
    if vtable < 0:
        raise IndexError("a vtable before the file")
    size = _number("<H", data, vtable)
    if 4 + 2 * number >= size:
        return 0
    offset = _number("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else 0
