"""The forms that a corpus is stored in: each reads the rows of one file, from any row on or at random.

A row has a *key* in its file: the byte offset of its record in text forms (in the decompressed bytes
of .gz and .zst), its number from 0 in parquet and datasets. Key 0 always means the first row.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import orjson
import zstandard

from ghoststore.corpus.fields import BESIDE_MESSAGES
from ghoststore.errors import CorpusError

KeyedRow: TypeAlias = tuple[int, object]

BUFFER = 1 << 17
ROWS_PER_BATCH = 1024
BOM = b"\xef\xbb\xbf"


class Form(Protocol):
    """How one kind of file is read. Every method raises CorpusError for a file it cannot read."""

    @property
    def name(self) -> str: ...

    @property
    def has_offsets(self) -> bool:
        """Whether keys are byte offsets."""

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        """Keys and rows from key ``start`` on; only ``columns`` are needed (None: all)."""

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        """The rows at ``keys`` (ascending, distinct), which `rows` gave before; those that are gone are left out."""

    def count(self, path: Path) -> int:
        """How many rows the file has."""

    def where(self, path: Path, key: int) -> str:
        """The place of a row as a person finds it: the file and the 1-based line or row."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every way in which a file fails to be read into a CorpusError that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise CorpusError(f"{path}: damaged or cut short: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error


@contextmanager
def reading_arrow(path: Path) -> Iterator[None]:
    """The same for what pyarrow reads."""
    import pyarrow

    try:
        with reading(path):
            yield
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: damaged: {error}") from error


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of all frames; EOFError where the last frame is cut short."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = (self._frame.unused_data if self._frame.eof else b"") or self._source.read(1 << 14)
            if not chunk:
                if self._inside:
                    raise EOFError("the last zstd frame does not end")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._inside = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedReader:
    """The decompressed bytes of a file, by its suffix."""
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path, "rb"), BUFFER)
        case ".zst":
            return io.BufferedReader(ZstdReader(io.FileIO(path)), BUFFER)
        case _:
            return io.BufferedReader(io.FileIO(path), BUFFER)


class Lines:
    """The lines of an open file with their endings, without a BOM; ``offset`` is that of the next one."""

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self.path = path
        self.offset = 0
        self._stream = stream

    def move_to(self, offset: int) -> None:
        """Go forward to a byte offset."""
        assert offset >= self.offset
        if self._stream.seekable():
            self._stream.seek(offset - self.offset, io.SEEK_CUR)
        else:
            left = offset - self.offset
            while left and (skipped := self._stream.read(min(left, BUFFER))):
                left -= len(skipped)
        self.offset = offset

    def __iter__(self) -> Iterator[bytes]:
        stream = self._stream
        if self.offset == 0 and (line := stream.readline()):
            self.offset = len(line)
            if line := line.removeprefix(BOM):
                yield line
        for line in stream:
            self.offset += len(line)
            yield line


class KeptLines(Lines):
    """Lines that are kept as they are given, in ``kept``."""

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        super().__init__(path, stream)
        self.kept: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        for line in super().__iter__():
            self.kept.append(line)
            yield line


def decode(line: bytes, lines: Lines) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        place = line_place(lines.path, lines.offset - len(line))
        raise CorpusError(f"{place}: expected UTF-8, found byte 0x{line[error.start]:02x}") from None


def line_place(path: Path, offset: int) -> str:
    """``file, line n`` of the line that begins at a byte offset; reads the file up to it."""
    number, left = 1, offset
    with reading(path), open_bytes(path) as stream:
        while left and (chunk := stream.read(min(left, BUFFER))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return f"{path}, line {number}"


def json_rows(lines: Lines) -> Iterator[KeyedRow]:
    """One JSON value a line; only the end of the file may have blank lines."""
    each = iter(lines)
    loads = orjson.loads
    for line in each:
        begin = lines.offset - len(line)
        try:
            row = loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                if any(rest.strip() for rest in each):
                    place = line_place(lines.path, begin)
                    raise CorpusError(f"{place}: expected a JSON object, found a blank line") from None
                return
            decode(line, lines)
            place = line_place(lines.path, begin)
            raise CorpusError(f"{place}: invalid JSON at column {error.colno}: {error.msg}") from None
        yield begin, row


def text_rows(lines: Lines) -> Iterator[KeyedRow]:
    """One sample a line, without its ending (LF or CRLF), as the field "text"."""
    for line in lines:
        text = decode(line, lines)
        text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
        yield lines.offset - len(line), {"text": text}


def csv_records(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """Records of RFC 4180 with the offset at which each begins; a record may span lines."""
    csv.field_size_limit((1 << 31) - 1)
    begin = lines.offset
    blank = -1
    # The reader takes one line at a time and none beyond its record: the next record begins at lines.offset.
    records = csv.reader((decode(line, lines) for line in lines), strict=True)
    while True:
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            raise CorpusError(f"{line_place(lines.path, begin)}: invalid CSV: {error}") from None
        if not cells:
            blank = begin if blank < 0 else blank
        elif blank >= 0:
            place = line_place(lines.path, blank)
            raise CorpusError(f"{place}: expected a CSV record, found a blank line")
        else:
            yield begin, cells
        begin = lines.offset


def csv_rows(lines: Lines) -> Iterator[KeyedRow]:
    """Rows as dictionaries by the header, which is read from the file again when ``lines`` is past it."""
    if lines.offset:
        with open_bytes(lines.path) as stream:
            _, header = next(csv_records(Lines(lines.path, stream)), (0, []))
    else:
        _, header = next(csv_records(lines), (0, []))
        if len(set(header)) < len(header):
            raise CorpusError(f"{lines.path}, line 1: the header names a column twice: {header}")
    for begin, cells in csv_records(lines):
        if len(cells) != len(header):
            place = line_place(lines.path, begin)
            raise CorpusError(f"{place}: expected {len(header)} cells as in the header, found {len(cells)}")
        yield begin, dict(zip(header, cells, strict=True))


@dataclass(frozen=True, slots=True)
class TextForm:
    """Records in lines of UTF-8, possibly compressed; ``parse`` takes no line beyond the row it yields."""

    name: str
    parse: Callable[[Lines], Iterator[KeyedRow]]
    has_offsets: bool = True

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with reading(path), open_bytes(path) as stream:
            lines = Lines(path, stream)
            lines.move_to(start)
            rows = self.parse(lines)
            first = next(rows, None)
            if first is not None:
                yield first
                yield from rows
            elif start:
                raise CorpusError(f"{path}: no record at byte {start}: the file has changed")

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for key, row, _ in self.records(path, keys):
            yield key, row

    def records(self, path: Path, keys: Sequence[int]) -> Iterator[tuple[int, object, bytes]]:
        """As `pick`, and the bytes of each record with its line ending, where it has one."""
        with reading(path), ExitStack() as stack:
            lines = KeptLines(path, stack.enter_context(open_bytes(path)))
            for key in keys:
                if lines.offset > key:  # a record that grew reaches past the next key
                    lines = KeptLines(path, stack.enter_context(open_bytes(path)))
                lines.move_to(key)
                lines.kept.clear()
                try:
                    found = next(self.parse(lines), None)
                except CorpusError:
                    continue
                if found is not None:
                    yield key, found[1], b"".join(lines.kept)

    def header(self, path: Path) -> bytes:
        """What stands before the first record, without a BOM: a header, or nothing."""
        first, _ = next(self.rows(path, None, 0), (0, None))
        with reading(path), open_bytes(path) as stream:
            return stream.read(first).removeprefix(BOM)

    def count(self, path: Path) -> int:
        return sum(1 for _ in self.rows(path, None, 0))

    def where(self, path: Path, key: int) -> str:
        return line_place(path, key)


def batch_rows(table: Any, first: int, path: Path) -> Iterator[KeyedRow]:
    """The rows of an Arrow table or batch, numbered from ``first``."""
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        for number in range(table.num_rows):
            try:
                table.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                place = f"{path}, row {first + number + 1}"
                raise CorpusError(f"{place}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
        raise
    yield from enumerate(rows, start=first)


def wanted(columns: Sequence[str] | None, names: Iterable[str]) -> list[str] | None:
    """The columns to read; all (None) when one is missing that a row must have: the row tells what there is instead."""
    there = set(names)
    if columns is None or not set(columns) - there <= set(BESIDE_MESSAGES):
        return None
    return [name for name in columns if name in there]


@dataclass(frozen=True, slots=True)
class ParquetForm:
    name: str = "parquet"
    has_offsets: bool = False

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with parquet_file(path) as file:
            columns = wanted(columns, file.schema_arrow.names)
            groups: list[int] = []
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if groups or start < first + size:
                    groups.append(group)
                else:
                    first += size
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=columns):
                skip = min(max(start - first, 0), batch.num_rows)
                yield from batch_rows(batch.slice(skip), first + skip, path)
                first += batch.num_rows

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for first, inside, table in self.groups(path, columns, keys):
            for key in inside:
                yield from batch_rows(table.slice(key - first, 1), key, path)

    def groups(
        self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[int], Any]]:
        """(first row, those of ``keys`` in it, Arrow table) of each row group with any of ``keys``."""
        with parquet_file(path) as file:
            columns = wanted(columns, file.schema_arrow.names)
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                inside = keys[bisect_left(keys, first) : bisect_left(keys, first + size)]
                if inside:
                    yield first, inside, file.read_row_group(group, columns=columns)
                first += size

    def schema(self, path: Path) -> Any:
        """Its Arrow schema, with metadata."""
        with parquet_file(path) as file:
            return file.schema_arrow

    def count(self, path: Path) -> int:
        with parquet_file(path) as file:
            return int(file.metadata.num_rows)

    def where(self, path: Path, key: int) -> str:
        return f"{path}, row {key + 1}"


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with reading_arrow(path), pyarrow.parquet.ParquetFile(path) as file:
        yield file


@dataclass(frozen=True, slots=True)
class DatasetForm:
    """A `datasets.Dataset`, read as Arrow tables from its memory map; paths only name it."""

    dataset: Any
    name: str = "dataset"
    has_offsets: bool = False

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        read = self._reader(path, columns)
        with reading_arrow(path):
            for first in range(start, len(self.dataset), ROWS_PER_BATCH):
                yield from read(first, min(first + ROWS_PER_BATCH, len(self.dataset)))

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        read = self._reader(path, columns)
        with reading_arrow(path):
            for key in keys:
                if key < len(self.dataset):
                    yield from read(key, key + 1)

    def count(self, path: Path) -> int:
        return len(self.dataset)

    def where(self, path: Path, key: int) -> str:
        return f"{path}, row {key + 1}"

    def schema(self, path: Path) -> Any:
        """Its Arrow schema, with metadata."""
        return self.dataset.features.arrow_schema

    def _reader(self, path: Path, columns: Sequence[str] | None) -> Callable[[int, int], Iterator[KeyedRow]]:
        columns = wanted(columns, self.dataset.column_names)
        chosen = self.dataset if columns is None else self.dataset.select_columns(columns)
        if "Json(" not in repr(chosen.features):
            tables = chosen.with_format("arrow")
            return lambda first, end: batch_rows(tables[first:end], first, path)
        # A Json feature is stored as encoded strings, which only datasets' own decoding turns back.
        decoded = chosen.with_format(None)
        return lambda first, end: enumerate((decoded[row] for row in range(first, end)), start=first)


def text_forms(name: str, parse: Callable[[Lines], Iterator[KeyedRow]], *suffixes: str) -> dict[str, Form]:
    """A text form under its suffixes, plain and compressed."""
    packings = ("", ".gz", ".zst")
    return {suffix + packed: TextForm(name + packed, parse) for suffix in suffixes for packed in packings}


FORMS: dict[str, Form] = {
    **text_forms("jsonl", json_rows, ".jsonl", ".ndjson"),
    **text_forms("csv", csv_rows, ".csv"),
    **text_forms("txt", text_rows, ".txt"),
    ".parquet": ParquetForm(),
}


def form_of(path: Path) -> Form | None:
    """The form of a file by its suffix, in any case; None for another suffix."""
    name = path.name.lower()
    return next((form for suffix, form in FORMS.items() if name.endswith(suffix)), None)
