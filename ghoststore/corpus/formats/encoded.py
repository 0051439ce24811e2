"""The bytes of a text file in UTF-8, whatever encoding it has: that of its byte order mark, or one that is given."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats.compressed import BUFFER, open_bytes
from ghoststore.errors import CorpusError

MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)
"""(byte order mark, encoding) of files that say themselves what they are."""
_ZEROS = {b"\1\0\1\0": "utf-16-le", b"\0\1\0\1": "utf-16-be"}
"""(which of the first four bytes are not zero, encoding)."""
NAME_IT = "if the file has another encoding, name it: `fields.encoding` (cp1252 for older files of Windows, say)"


def open_utf8(path: Path, largest: int | None = None, encoding: str | None = None) -> io.BufferedReader:
    """The bytes of a text file, decompressed, in UTF-8. ``largest`` is that of `open_bytes`.

    A file in UTF-8, which is the default, is given as it is and can be sought in. Another one, by its byte order mark
    or by ``encoding``, is decoded as it is read, from its beginning.

    CorpusError for bytes that are not of the encoding, and for a mark that is of another one. OSError if it is not a
    regular file.
    """
    stream = open_bytes(path, largest)
    try:
        head = stream.peek(4)[:4]
    except BaseException:
        stream.close()
        raise
    if len(head) < 4:  # there may be more behind it: peek reads once
        head = stream.read(4)
        stream.close()
        stream = open_bytes(path, largest)
    try:
        used = _encoding(path, head, encoding)
    except CorpusError:
        stream.close()
        raise
    return stream if used in ("utf-8", "utf-8-sig") else io.BufferedReader(_Decoding(path, stream, used), BUFFER)


def _encoding(path: Path, head: bytes, encoding: str | None) -> str:
    """The encoding of a file that begins with the bytes ``head``, where ``encoding`` is given. CorpusError as above."""
    marked = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if encoding is None and marked is None and len(head) == 4 and (of := _ZEROS.get(bytes(map(bool, head)))):
        raise CorpusError(
            f"{path}: every other byte is zero, as in {of.upper()}, and there is no byte order mark: if it is that, "
            f"give `fields.encoding={of}`"
        )
    used = codecs.lookup(encoding or marked or "utf-8").name
    if encoding is not None and marked is not None and not used.replace("utf-8-sig", "utf-8").startswith(marked):
        raise CorpusError(
            f"{path}: its byte order mark is that of {marked.upper()}, and `fields.encoding` says {encoding!r}: leave "
            "it out, files with such a mark are read by it"
        )
    return used


class _Decoding(io.RawIOBase):
    """The text of ``source``, which is in ``encoding``, as bytes of UTF-8."""

    def __init__(self, path: Path, source: io.BufferedReader, encoding: str) -> None:
        self._path, self._source, self._encoding = path, source, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._read = 0
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        ended = False
        while not self._ready and not ended:
            data = self._source.read(BUFFER >> 1)
            ended = not data
            self._read += len(data)
            try:
                self._ready = memoryview(self._decoder.decode(data, ended).encode())
            except UnicodeError as error:
                raise CorpusError(f"{self._path}: {self._problem(error)}") from None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _problem(self, error: UnicodeError) -> str:
        if not isinstance(error, UnicodeDecodeError):
            return f"what it holds is no text in {self._encoding} ({error})"
        place = self._read - len(error.object) + error.start
        byte = error.object[error.start]
        return f"expected {self._encoding}, found byte 0x{byte:02x} at byte {place:,} ({error.reason})"

    def close(self) -> None:
        self._source.close()
        super().close()
