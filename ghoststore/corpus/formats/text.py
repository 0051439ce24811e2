"""Forms whose records are lines of UTF-8, possibly compressed: jsonl, csv and plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson

from ghoststore.corpus.formats.base import Form, KeyedRow, reading
from ghoststore.corpus.formats.compressed import BUFFER, open_bytes, too_large
from ghoststore.errors import CorpusError

BOM = b"\xef\xbb\xbf"


class Lines:
    """The lines of an open file with their endings, without a BOM. ``offset`` is the byte offset of the next line.

    CorpusError for a line of more than ``largest`` bytes (None: no limit), before all of it is in memory.
    """

    def __init__(self, path: Path, stream: io.BufferedReader, largest: int | None = None) -> None:
        self.path = path
        self.offset = 0
        self.largest = largest
        self._stream = stream

    def move_to(self, offset: int) -> None:
        """Go forward to a byte offset."""
        assert offset >= self.offset
        if self._stream.seekable():
            self._stream.seek(offset - self.offset, io.SEEK_CUR)
        else:
            remaining = offset - self.offset
            while remaining and (skipped := self._stream.read(min(remaining, BUFFER))):
                remaining -= len(skipped)
        self.offset = offset

    def __iter__(self) -> Iterator[bytes]:
        read, most = self._stream.readline, -1 if self.largest is None else self.largest + 1
        if self.offset == 0 and (line := read(most)):
            self.offset = len(line)
            self.check(0)
            if line := line.removeprefix(BOM):
                yield line
        while line := read(most):
            self.offset += len(line)
            if len(line) == most:
                self.check(self.offset - most)
            yield line

    def check(self, begin: int) -> None:
        """CorpusError if more than ``largest`` bytes were read since the beginning of the record, at ``begin``."""
        if self.largest is not None and self.offset - begin > self.largest:
            raise too_large(line_place(self.path, begin), self.largest, advice=True)


class RecordedLines(Lines):
    """Lines that also keeps every line it has given."""

    def __init__(self, path: Path, stream: io.BufferedReader, largest: int | None = None) -> None:
        super().__init__(path, stream, largest)
        self.recorded: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        for line in super().__iter__():
            self.recorded.append(line)
            yield line


def decode(line: bytes, lines: Lines) -> str:
    """The text of ``line``, the last one that ``lines`` gave. CorpusError if it is not UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        place = line_place(lines.path, lines.offset - len(line))
        raise CorpusError(f"{place}: expected UTF-8, found byte 0x{line[error.start]:02x}") from None


def line_place(path: Path, offset: int) -> str:
    """``file, line n`` for the line that begins at the byte ``offset``. Reads the file up to there."""
    number, remaining = 1, offset
    with reading(path), open_bytes(path) as stream:
        while remaining and (chunk := stream.read(min(remaining, BUFFER))):
            number += chunk.count(b"\n")
            remaining -= len(chunk)
    return f"{path}, line {number}"


def json_rows(lines: Lines) -> Iterator[KeyedRow]:
    """Rows of jsonl: one JSON value a line. Blank lines are allowed only at the end of the file."""
    each = iter(lines)
    loads = orjson.loads
    for line in each:
        begin = lines.offset - len(line)
        try:
            row = loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                if any(later_line.strip() for later_line in each):
                    place = line_place(lines.path, begin)
                    raise CorpusError(f"{place}: expected a JSON object, found a blank line") from None
                return
            decode(line, lines)
            place = line_place(lines.path, begin)
            raise CorpusError(f"{place}: invalid JSON at column {error.colno}: {error.msg}") from None
        yield begin, row


def text_rows(lines: Lines) -> Iterator[KeyedRow]:
    """Rows of plain text: each line, without its ending (LF or CRLF), is the field "text" of one row."""
    for line in lines:
        text = decode(line, lines)
        text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
        yield lines.offset - len(line), {"text": text}


def csv_records(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """(offset, cells) of each record of a CSV file (RFC 4180). A record may span several lines."""
    csv.field_size_limit((1 << 31) - 1)
    begin = lines.offset
    blank = -1

    def decoded() -> Iterator[str]:
        for line in lines:
            lines.check(begin)  # an open quote may continue over many lines
            yield decode(line, lines)

    # csv.reader takes one line at a time, and none after its record, so the next record begins at lines.offset.
    records = csv.reader(decoded(), strict=True)
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
    """Rows of a CSV file as dictionaries. If ``lines`` is past the header, that is read from the file again."""
    if lines.offset:
        with open_bytes(lines.path) as stream:
            _, header = next(csv_records(Lines(lines.path, stream, lines.largest)), (0, []))
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
    """Records in lines of UTF-8, possibly compressed. ``parse`` must not take lines after the row that it yields."""

    name: str
    parse: Callable[[Lines], Iterator[KeyedRow]]
    has_offsets: bool = True
    adds_nulls: bool = False
    largest: int | None = None
    """Most bytes of a record; None for no limit."""

    def fields(self, path: Path) -> Sequence[str] | None:
        return None

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with reading(path), open_bytes(path, self.largest) as stream:
            lines = Lines(path, stream, self.largest)
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
        """(key, row, bytes of the record) at each of ``keys``, as in `pick`. The bytes include the line
        ending, if any.
        """
        with reading(path), ExitStack() as stack:
            lines = self._recorded(path, stack)
            for key in keys:
                if lines.offset > key:  # the file has changed: a longer record reaches past the next key
                    lines = self._recorded(path, stack)
                lines.move_to(key)
                lines.recorded.clear()
                try:
                    parsed = next(self.parse(lines), None)
                except CorpusError:
                    continue
                if parsed is not None:
                    yield key, parsed[1], b"".join(lines.recorded)

    def _recorded(self, path: Path, stack: ExitStack) -> RecordedLines:
        return RecordedLines(path, stack.enter_context(open_bytes(path, self.largest)), self.largest)

    def header(self, path: Path) -> bytes:
        """The bytes before the first record, without a BOM: the header of a CSV file, else nothing."""
        first, _ = next(self.rows(path, None, 0), (0, None))
        with reading(path), open_bytes(path) as stream:
            return stream.read(first).removeprefix(BOM)

    def count(self, path: Path) -> int:
        return sum(1 for _ in self.rows(path, None, 0))

    def where(self, path: Path, key: int) -> str:
        return line_place(path, key)


def text_forms(name: str, parse: Callable[[Lines], Iterator[KeyedRow]], *suffixes: str) -> dict[str, Form]:
    """A text form for each of ``suffixes``, plain and compressed."""
    packings = ("", ".gz", ".zst")
    return {suffix + packed: TextForm(name + packed, parse) for suffix in suffixes for packed in packings}
