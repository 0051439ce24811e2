"""Forms whose records are lines, possibly compressed: jsonl and plain text. `delimited` has the tables in text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson

from ghoststore.corpus.formats.base import Form, KeyedRow, reading
from ghoststore.corpus.formats.compressed import BUFFER, too_large
from ghoststore.corpus.formats.encoded import open_utf8
from ghoststore.corpus.formats.json_text import loads, not_utf8, why_invalid
from ghoststore.errors import CorpusError
from ghoststore.store.base.object_ranges import expecting

BOM = b"\xef\xbb\xbf"
PACKINGS = ("", ".gz", ".zst")
_DOCUMENT = "a file that is one array, or whose objects go over several lines, is read where its name ends in .json"


class Lines:
    """The lines of an open file with their endings, without a BOM. ``offset`` is the byte offset of the next line.

    CorpusError for a line of more bytes than a record of ``form`` may have, before all of it is in memory.
    """

    def __init__(self, path: Path, stream: io.BufferedReader, form: TextForm) -> None:
        self.path = path
        self.form = form
        self.offset = 0
        self.header: list[str] | None = None
        """The cells of the first record of a table, once they are read."""
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
        read, most = self._stream.readline, -1 if self.form.largest is None else self.form.largest + 1
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
        """CorpusError if more than the largest record was read since the beginning of the record, at ``begin``."""
        if self.form.largest is not None and self.offset - begin > self.form.largest:
            raise too_large(self.place(begin), self.form.largest, advice=True)

    def place(self, offset: int) -> str:
        """``file, line n`` for the line that begins at the byte ``offset``."""
        return self.form.where(self.path, offset)


class RecordedLines(Lines):
    """Lines that also keeps every line it has given."""

    def __init__(self, path: Path, stream: io.BufferedReader, form: TextForm) -> None:
        super().__init__(path, stream, form)
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
        raise CorpusError(f"{lines.place(lines.offset - len(line))}: {not_utf8(line, error)}") from None


def line_of(path: Path, offset: int, encoding: str | None) -> int:
    """The number, from 1, of the line that holds the byte ``offset``. Reads the file up to there."""
    number, remaining = 1, offset
    with reading(path), open_utf8(path, None, encoding) as stream:
        while remaining and (chunk := stream.read(min(remaining, BUFFER))):
            number += chunk.count(b"\n")
            remaining -= len(chunk)
    return number


def json_rows(lines: Lines) -> Iterator[KeyedRow]:
    """Rows of jsonl: one JSON value a line. Blank lines are allowed only at the end of the file."""
    each = iter(lines)
    for line in each:
        begin = lines.offset - len(line)
        try:
            row = loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                if any(later_line.strip() for later_line in each):
                    raise CorpusError(f"{lines.place(begin)}: expected a JSON object, found a blank line") from None
                return
            hint = f"; {_DOCUMENT}" if begin <= len(BOM) and line.strip() in (b"{", b"[") else ""
            raise CorpusError(f"{lines.place(begin)}: {why_invalid(line, error)}{hint}") from None
        if begin <= len(BOM) and isinstance(row, list):
            raise CorpusError(f"{lines.place(begin)}: expected a JSON object, found {row!r:.80} (list); {_DOCUMENT}")
        yield begin, row


def text_rows(lines: Lines) -> Iterator[KeyedRow]:
    """Rows of plain text: each line, without its ending (LF or CRLF), is the field "text" of one row."""
    for line in lines:
        text = decode(line, lines)
        text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
        yield lines.offset - len(line), {"text": text}


@dataclass(frozen=True, slots=True)
class TextForm:
    """Records in lines, possibly compressed. ``parse`` must not take lines after the row that it yields."""

    name: str
    parse: Callable[[Lines], Iterator[KeyedRow]]
    has_offsets: bool = True
    adds_nulls: bool = False
    largest: int | None = None
    """Most bytes of a record; None for no limit."""
    encoding: str | None = None
    """That of the file; None for UTF-8, or what its byte order mark says."""
    delimiter: str | None = None
    """The character between cells; None in forms without cells."""

    def fields(self, path: Path) -> Sequence[str] | None:
        return None

    def open(self, path: Path) -> io.BufferedReader:
        """The bytes of a file, decompressed and in UTF-8: offsets are places in these."""
        return open_utf8(path, self.largest, self.encoding)

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with reading(path), self.open(path) as stream:
            lines = Lines(path, stream, self)
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
            lines = self._recorded(path, stack, keys)
            for place, key in enumerate(keys):
                if lines.offset > key:  # the file has changed: a longer record reaches past the next key
                    lines = self._recorded(path, stack, keys[place:])
                lines.move_to(key)
                lines.recorded.clear()
                try:
                    parsed = next(self.parse(lines), None)
                except CorpusError:
                    continue
                if parsed is not None:
                    yield key, parsed[1], b"".join(lines.recorded)

    def _recorded(self, path: Path, stack: ExitStack, keys: Sequence[int]) -> RecordedLines:
        stream = stack.enter_context(self.open(path))
        expecting(stream, keys)
        return RecordedLines(path, stream, self)

    def header(self, path: Path) -> bytes:
        """The bytes before the first record, without a BOM: the header of a CSV file, else nothing."""
        first, _ = next(self.rows(path, None, 0), (0, None))
        with reading(path), self.open(path) as stream:
            return stream.read(first).removeprefix(BOM)

    def count(self, path: Path) -> int:
        return sum(1 for _ in self.rows(path, None, 0))

    def where(self, path: Path, key: int) -> str:
        return f"{path}, line {line_of(path, key, self.encoding)}"


def text_forms(
    name: str, parse: Callable[[Lines], Iterator[KeyedRow]], *suffixes: str, delimiter: str | None = None
) -> dict[str, Form]:
    """A text form for each of ``suffixes``, plain and compressed."""
    return {
        suffix + packed: TextForm(name + packed, parse, delimiter=delimiter)
        for suffix in suffixes
        for packed in PACKINGS
    }
