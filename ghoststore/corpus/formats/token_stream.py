"""Token ids in a file of nothing else, as nanoGPT's prepare.py writes them: one stream, without borders of documents.

The ids are uint16, or uint32. Files of llm.c have 256 int32 before them: a magic number, a version, the number of ids.

A row is a window of the stream. As with ``overlong=window`` the first token of each is the last of the one before, so
that every token but the first is a target once. Or a row is a document, which ends with a token that the user names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.corpus.content import Tokenized
from ghoststore.corpus.formats.base import KeyedRow, NumberedForm, open_file, reading
from ghoststore.corpus.formats.compressed import too_large
from ghoststore.corpus.formats.megatron import NAMELESS
from ghoststore.errors import CorpusError, UsageError

AT_ONCE = 1 << 19
"""Ids in memory at once, beside those of a document that is longer."""
LOOKED_AT = 4096
"""Ids from which one sees that they are wider than uint16."""
_MAGIC, _HEADER = 20240520, 1024
_VERSIONS = {1: "uint16", 7: "uint32"}
_ARCHIVE = b"PK\x03\x04"
_OF_TORCH = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What is at the head of older files of torch.save, which are called .bin, too; newer ones are archives. The two bytes
that a pickle begins with would not do: they are a token, too."""


@dataclass(frozen=True, slots=True)
class TokenStreamForm(NumberedForm):
    """The windows or documents of a file of token ids. A key is the byte at which a row begins."""

    name: str = "token-stream"
    largest: int | None = None
    ids_dtype: str | None = None
    """uint16 or uint32; None for what the file says, else uint16."""
    ids_window: int | None = None
    """Tokens of a window, at least 2; None as long as nobody has said."""
    ids_document_end: int | None = None
    """The last token of each document; None for windows."""
    has_offsets = True

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with _Stream(path, self) as stream:
            yield from self._rows(stream, stream.place(start))

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        with _Stream(path, self) as stream:
            for key in keys:
                if place := next(self._rows(stream, stream.place(key)), None):
                    yield place

    def count(self, path: Path) -> int:
        with _Stream(path, self) as stream:
            if self.ids_document_end is not None:
                return sum(1 for _ in self._rows(stream, 0))
            return 0 if not stream.ids else max(1, -(-(stream.ids - 1) // (self._window() - 1)))

    def where(self, path: Path, key: int) -> str:
        """See :class:`Form`."""
        with _Stream(path, self) as stream:
            return f"{path}, token {stream.place(key):,}"

    def first_row(self, path: Path) -> Iterator[KeyedRow]:
        """A row like the others, from which one sees the fields, while nobody has said how long a window is."""
        with _Stream(path, self) as stream:
            if stream.ids:
                yield stream.row(0, stream.read(0, 2))

    def _window(self) -> int:
        if self.ids_window is None:
            raise UsageError(
                "token ids in one stream: say how long a row is, `fields.ids_window` (the block_size of the model), or "
                "which token ends a document, `fields.ids_document_end` (50256 in GPT-2)"
            )
        return self.ids_window

    def _rows(self, stream: _Stream, first: int) -> Iterator[KeyedRow]:
        """The rows from the token ``first`` on, at which one begins."""
        if self.ids_document_end is not None:
            yield from self._documents(stream, first, self.ids_document_end)
            return
        step = self._window() - 1
        many = max(1, AT_ONCE // step) * step
        while first < max(stream.ids - 1, min(stream.ids, 1)):
            block = stream.read(first, many + 1)
            for begin in range(0, max(len(block) - 1, 1), step):
                yield stream.row(first + begin, block[begin : begin + step + 1])
            first += many

    def _documents(self, stream: _Stream, first: int, end: int) -> Iterator[KeyedRow]:
        before: list[NDArray[Any]] = []
        place = first
        while first < stream.ids:
            block = stream.read(first, AT_ONCE)
            begin = 0
            for stop in (np.flatnonzero(block == end) + 1).tolist():
                yield stream.row(place, np.concatenate([*before, block[begin:stop]]))
                before, begin, place = [], stop, first + stop
            before.append(block[begin:])
            first += len(block)
            if self.largest is not None and (first - place) * block.itemsize > self.largest:
                raise too_large(f"{stream.path}, token {place:,}", self.largest, advice=True)
        if place < stream.ids:
            yield stream.row(place, np.concatenate(before))


class _Stream:
    """A file of ids, open. CorpusError for one that is no such file."""

    def __init__(self, path: Path, form: TokenStreamForm) -> None:
        self.path = path
        with reading(path):
            self._file = open_file(path)
            size = self._file.seek(0, 2)
            self._file.seek(0)
            head = self._file.read(_HEADER) or b""
        if head.startswith(_ARCHIVE) or _OF_TORCH in head[:64]:
            raise CorpusError(f"{path}: a file of torch, and no token ids (a checkpoint?)")
        own, self._begin = self._header(head)
        if own and form.ids_dtype not in (None, own):
            raise UsageError(f"`fields.ids_dtype={form.ids_dtype}`: {path} says that its ids are {own}")
        self._dtype = np.dtype(own or form.ids_dtype or "uint16").newbyteorder("<")
        self.ids, rest = divmod(size - self._begin, self._dtype.itemsize)
        if rest:
            raise CorpusError(f"{path}: {size:,} bytes are no whole number of {self._dtype.name} ids")
        if own and self.ids != struct.unpack_from("<i", head, 8)[0]:
            raise CorpusError(
                f"{path}: cut short, or damaged: it says another number of ids than the {self.ids:,} there"
            )
        if own is None and form.ids_dtype is None:
            self._refuse_wider()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def place(self, key: int) -> int:
        """The token at which the row ``key`` begins."""
        return max(0, key - self._begin) // self._dtype.itemsize

    def read(self, first: int, count: int) -> NDArray[Any]:
        """At most ``count`` ids, from the token ``first`` on."""
        count = min(count, self.ids - first)
        with reading(self.path):
            self._file.seek(self._begin + first * self._dtype.itemsize)
            data = self._file.read(count * self._dtype.itemsize) or b""
        if len(data) < count * self._dtype.itemsize:
            raise CorpusError(f"{self.path}: has become shorter while it was read")
        return np.frombuffer(data, self._dtype)

    def row(self, first: int, ids: NDArray[Any]) -> KeyedRow:
        """(key, row) of ``ids``, which begin at the token ``first``."""
        if len(ids) and int(ids.max()) >= 1 << 31:
            raise CorpusError(f"{self.path}, token {first:,}: {int(ids.max())} is no token id: are the ids uint16?")
        content = Tokenized(ids.astype("<i4").tobytes(), 1, NAMELESS)
        row = {"id": f"{self.path.name}:{first}", "domain": None, "tokens": content}
        return self._begin + first * self._dtype.itemsize, row

    def _header(self, head: bytes) -> tuple[str | None, int]:
        """(the type of the ids, the byte of the first) by the header of llm.c; (None, 0) without one."""
        if len(head) < _HEADER or struct.unpack_from("<i", head)[0] != _MAGIC:
            return None, 0
        version = struct.unpack_from("<i", head, 4)[0]
        if version not in _VERSIONS:
            raise CorpusError(f"{self.path}: token ids of llm.c in version {version}; known: 1 (uint16), 7 (uint32)")
        return _VERSIONS[version], _HEADER

    def _refuse_wider(self) -> None:
        ids = self.read(0, LOOKED_AT)
        if len(ids) >= 64 and int(ids[1::2].max()) <= 3 < int(ids[::2].max()):
            raise CorpusError(
                f"{self.path}: every second id is at most 3, so these seem to be uint32: say so, "
                "`fields.ids_dtype=uint32`, or `fields.ids_dtype=uint16` if they are not"
            )
