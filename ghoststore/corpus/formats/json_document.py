"""JSON documents: an array of rows, an object that has one (``{"data": […]}``), or one object after another.

A document is streamed. Only one row is in memory, so a document may have any size. The key of a row is the byte at
which it begins, so that a row is read alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import orjson

from ghoststore.corpus.formats.base import Form, KeyedRow, reading
from ghoststore.corpus.formats.compressed import BUFFER, too_large
from ghoststore.corpus.formats.encoded import open_utf8
from ghoststore.corpus.formats.json_text import DEEPEST, loads, why_invalid
from ghoststore.corpus.formats.text import BOM, PACKINGS, line_of
from ghoststore.errors import CorpusError
from ghoststore.store.base.object_ranges import expecting

DATA = "data"
"""The key of the array of rows in a document that is an object."""
Shape: TypeAlias = Literal["array", "inner array", "objects"]

_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^\s,\]}:\[{\"]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
"""All up to the next bracket that is in no string; or up to a string that does not end in what is there."""


class Scanner:
    """Goes through the values of a document, without looking into them. ``offset`` is the byte that comes next.

    CorpusError for a value of more than ``largest`` bytes (None: no limit), before all of it is in memory, for one that
    nests deeper than DEEPEST, and for a document that ends inside one.
    """

    def __init__(self, path: Path, stream: io.BufferedReader, form: JsonForm) -> None:
        self.path = path
        self._form = form
        self._stream = stream
        self._buffer = bytearray()
        self._begin = 0  # the offset of the buffer's first byte
        self._at = 0  # the next byte in the buffer
        self.numbered = False
        """Whether messages name the number of the row. To find it, another scanner goes through the document."""

    @property
    def offset(self) -> int:
        return self._begin + self._at

    def move_to(self, offset: int) -> None:
        """Go forward to a byte offset."""
        assert offset >= self.offset
        ahead = self._begin + len(self._buffer)
        if offset > ahead and self._stream.seekable():
            self._stream.seek(offset - ahead, io.SEEK_CUR)
            self._buffer.clear()
            self._begin, self._at = offset, 0
        while self._begin + len(self._buffer) < offset:
            self._at = len(self._buffer)
            if not self._fill():
                break
        self._at = min(offset - self._begin, len(self._buffer))

    def peek(self) -> bytes:
        """The next byte that is no space; b"" at the end of the document."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._at = self._at if space is None else space.end()
            if self._at < len(self._buffer):
                return bytes(self._buffer[self._at : self._at + 1])
            if not self._fill():
                return b""

    def skip_mark(self) -> None:
        """Go past a byte order mark at the beginning of the document."""
        self.peek()
        if self.offset == 0 and self._buffer.startswith(BOM):
            self._at = len(BOM)

    def take(self, byte: bytes, where: str) -> None:
        """Go past ``byte``, after spaces. CorpusError if another one is there."""
        if self.peek() != byte:
            raise self.unexpected(f"{byte.decode()!r} {where}".rstrip())
        self._at += 1

    def unexpected(self, expected: str) -> CorpusError:
        """The error for what comes next."""
        found = self.peek()
        line = f"{self.path}, line {line_of(self.path, self.offset, self._form.encoding)} (byte {self.offset:,})"
        if not found:
            return CorpusError(f"{line}: cut short: expected {expected}, found the end of the file")
        return CorpusError(f"{line}: expected {expected}, found {found.decode(errors='replace')!r}")

    def value(self) -> bytearray:
        """The bytes of the next value. The scanner is after it then."""
        self.peek()
        begin = self.offset
        self._pass(begin)
        data = self._buffer[begin - self._begin : self._at]
        if self._form.largest is not None and len(data) > self._form.largest:
            raise self._too_large(begin)
        return data

    def skip(self) -> None:
        """Go past the next value, which may have any size."""
        self.peek()
        self._pass(None)

    def _pass(self, begin: int | None) -> None:
        """Go past the next value. It stays in the buffer from the offset ``begin`` on, if that is given."""
        if self.peek() in (b"{", b"["):
            depth = 1
            self._at += 1
            while depth:
                plain = _NO_BRACKET.match(self._buffer, self._at)
                self._at = self._at if plain is None else plain.end()
                byte = self._buffer[self._at] if self._at < len(self._buffer) else 0x22
                if byte == 0x22:  # a string that goes on beyond the buffer, or nothing
                    self._more(self.offset if begin is None else begin)
                    continue
                self._at += 1
                depth += 1 if byte in b"[{" else -1
                if depth > DEEPEST:
                    raise CorpusError(
                        f"{self._place(self.offset if begin is None else begin)}: nests deeper than {DEEPEST:,} levels"
                    )
        elif self.peek() == b'"':
            while (string := _STRING.match(self._buffer, self._at)) is None:
                self._more(self.offset)
            self._at = string.end()
        else:
            self._pass_scalar()

    def _pass_scalar(self) -> None:
        begin = self.offset
        while True:
            scalar = _SCALAR.match(self._buffer, begin - self._begin)
            end = self._at if scalar is None else scalar.end()
            if end < len(self._buffer) or not self._fill(begin):
                break
        if end == self._at:
            raise self.unexpected("a value")
        self._at = end

    def _more(self, begin: int) -> None:
        """Have more in the buffer of what begins at the offset ``begin``."""
        if not self._fill(begin):
            line = line_of(self.path, begin, self._form.encoding)
            raise CorpusError(f"{self.path}, line {line}: cut short: a value begins there that does not end")

    def _fill(self, begin: int | None = None) -> bool:
        """Read more. What is before the offset ``begin`` (None: before the next byte) goes. False at the end."""
        begin = self.offset if begin is None else begin
        there = self._begin + len(self._buffer) - begin
        if self._form.largest is not None and there > self._form.largest:
            raise self._too_large(begin)
        # As much again as is there: to match it from its beginning each time costs twice as much at most, then.
        data = self._stream.read(max(BUFFER, there))
        gone = begin - self._begin
        del self._buffer[:gone]
        self._begin += gone
        self._at -= gone
        self._buffer += data
        return bool(data)

    def _too_large(self, begin: int) -> CorpusError:
        assert self._form.largest is not None
        error = too_large(self._place(begin), self._form.largest, advice=True)
        if begin <= len(BOM) and self._form.key is None:
            return CorpusError(f"{error}; rows under a key of an object are read as `{self.path}:KEY`")
        return error

    def _place(self, begin: int) -> str:
        if self.numbered:
            return self._form.where(self.path, begin)
        return f"{self.path}, line {line_of(self.path, begin, self._form.encoding)}"


@dataclass(frozen=True, slots=True)
class JsonForm:
    """A JSON document, possibly compressed. ``key`` is that of the array of rows in an object (None: DATA)."""

    name: str = "json"
    has_offsets: bool = True
    adds_nulls: bool = False
    largest: int | None = None
    encoding: str | None = None
    key: str | None = None

    def fields(self, path: Path) -> Sequence[str] | None:
        return None

    def open(self, path: Path) -> io.BufferedReader:
        """The bytes of a file, decompressed and in UTF-8: offsets are places in these."""
        return open_utf8(path, self.largest, self.encoding)

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with reading(path), self.open(path) as stream:
            scanner = Scanner(path, stream, self)
            scanner.numbered = True
            for begin in self._begins(scanner, start):
                yield begin, self._parsed(scanner.value(), path, begin)

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for key, row, _ in self.records(path, keys):
            yield key, row

    def records(self, path: Path, keys: Sequence[int]) -> Iterator[tuple[int, object, bytes]]:
        """(key, row, bytes of the row) at each of ``keys``, as in `pick`."""
        with reading(path), ExitStack() as stack:
            stream = stack.enter_context(self.open(path))
            expecting(stream, keys, BUFFER)
            scanner = Scanner(path, stream, self)
            for key in keys:
                if scanner.offset > key:  # the file has changed: a longer row reaches past the next key
                    scanner = Scanner(path, stack.enter_context(self.open(path)), self)
                scanner.move_to(key)
                try:
                    data = scanner.value()
                    row = self._parsed(data, path, key)
                except CorpusError:
                    continue
                yield key, row, bytes(data)

    def header(self, path: Path) -> bytes:
        """Nothing: rows are written into an array of their own."""
        return b""

    def count(self, path: Path) -> int:
        return sum(1 for _ in self.rows(path, None, 0))

    def where(self, path: Path, key: int) -> str:
        number = self._number(path, key)
        line = line_of(path, key, self.encoding)
        return f"{path}, line {line}" if number is None else f"{path}, row {number} (line {line})"

    def _number(self, path: Path, key: int) -> int | None:
        """The number, from 1, of the row that begins at ``key``; None if none does."""
        with suppress(CorpusError), reading(path), self.open(path) as stream:
            scanner = Scanner(path, stream, self)
            for number, begin in enumerate(self._begins(scanner, 0), start=1):
                if begin >= key:
                    return number if begin == key else None
                scanner.skip()
        return None

    def _parsed(self, data: bytearray, path: Path, begin: int) -> object:
        try:
            return loads(data)
        except orjson.JSONDecodeError as error:
            raise CorpusError(f"{self.where(path, begin)}: {why_invalid(data, error)}") from None

    def _begins(self, scanner: Scanner, start: int) -> Iterator[int]:
        """The offset of each row from ``start`` on. The scanner is there, and has to be after the row for the next."""
        shape, first = self._shape(scanner.path)
        scanner.move_to(max(start, first))
        if shape == "objects":
            while scanner.peek():
                yield scanner.offset
            return
        more = True
        if start == 0 and scanner.peek() == b"]":
            scanner.take(b"]", "")
            more = False
        while more:
            if scanner.peek() in (b"]", b",", b""):
                raise scanner.unexpected("a row")
            yield scanner.offset
            more = scanner.peek() == b","
            scanner.take(b"," if more else b"]", "or ',' after a row")
        if shape == "inner array":
            self._check_rest(scanner)
        if scanner.peek():
            raise scanner.unexpected("the end of the file (rows that stand one a line: let its name end in .jsonl)")

    def _shape(self, path: Path) -> tuple[Shape, int]:
        """What the document is, and the byte from which on its rows stand."""
        with self.open(path) as stream:
            scanner = Scanner(path, stream, self)
            scanner.skip_mark()
            first, begin = scanner.peek(), scanner.offset
            if first not in (b"", b"{", b"["):
                raise scanner.unexpected("an array of rows, or an object")
            if first == b"[" and self.key is None:
                scanner.take(b"[", "")
                return "array", scanner.offset
            if first == b"{":
                for key in _keys(scanner):
                    if key == self._rows_key and scanner.peek() == b"[":
                        scanner.take(b"[", "")
                        if self.key is not None or scanner.peek() in (b"{", b"]"):
                            return "inner array", scanner.offset
                        break  # an array of numbers, say, in a row
                    scanner.skip()
            if self.key is not None:
                raise CorpusError(f"{path}:{self.key}: expected an object with an array of rows under {self.key!r}")
            return "objects", begin

    @property
    def _rows_key(self) -> str:
        return DATA if self.key is None else self.key

    def _check_rest(self, scanner: Scanner) -> None:
        """Read to the end of the object whose array of rows ends here."""
        if scanner.peek() == b",":
            scanner.take(b",", "")
            for key in _keys(scanner, begun=True):
                if key == self._rows_key:
                    raise CorpusError(f"{scanner.path}: has {key!r} twice: which rows are meant cannot be known")
                scanner.skip()
        else:
            scanner.take(b"}", "or ',' after the rows")


def _keys(scanner: Scanner, begun: bool = False) -> Iterator[object]:
    """Each key of an object. The scanner is at its value, and has to be after that for the next key.

    ``begun`` says that the scanner is inside the object already, at a key.
    """
    if not begun:
        scanner.take(b"{", "")
        if scanner.peek() == b"}":
            scanner.take(b"}", "")
            return
    more = True
    while more:
        if scanner.peek() != b'"':
            raise scanner.unexpected("a key in quotes")
        key = scanner.value()
        scanner.take(b":", "after a key")
        try:
            name: object = orjson.loads(key)
        except orjson.JSONDecodeError:
            name = None
        yield name
        more = scanner.peek() == b","
        scanner.take(b"," if more else b"}", "or ',' after a value")


def json_forms() -> dict[str, Form]:
    """The form for each suffix, plain and compressed."""
    return {f".json{packed}": JsonForm(f"json{packed}") for packed in PACKINGS}
