"""The decompressed bytes of a file: plain, gzip or zstd."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any

import zstandard

from ghoststore.corpus.formats.base import open_file
from ghoststore.errors import CorpusError

BUFFER = 1 << 17
PIECE = 1 << 10
"""Compressed bytes to decompress at once. Four bytes of zstd can stand for 128 KiB, so one piece for 32 MiB."""
WINDOW = 1 << 27
"""Most bytes of the window of a zstd file, which its reader keeps in memory. The zstd program has the same limit."""


class ZstdReader(io.RawIOBase):
    """The decompressed bytes of all frames of a zstd file. EOFError if the last frame is cut short.

    zstandard.ZstdError for a frame whose window is larger than ``window`` bytes.
    """

    def __init__(self, source: IO[bytes], window: int = WINDOW) -> None:
        self._source, self._window = source, window
        self._frame = self._new_frame()
        self._inside = False
        self._compressed = memoryview(b"")
        self._ready = memoryview(b"")

    def _new_frame(self) -> Any:
        return zstandard.ZstdDecompressor(max_window_size=self._window).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._compressed:
                self._compressed = memoryview(self._source.read(1 << 14))
            if not self._compressed:
                if self._inside:
                    raise EOFError("the last zstd frame does not end")
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            piece, self._compressed = self._compressed[:PIECE], self._compressed[PIECE:]
            self._ready = memoryview(self._frame.decompress(piece))
            self._inside = not self._frame.eof
            if self._frame.eof and self._frame.unused_data:
                self._compressed = memoryview(self._frame.unused_data + self._compressed.tobytes())
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


class GzipReader(gzip.GzipFile):
    """A gzip.GzipFile that also closes the file that it was given."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__(fileobj=source, mode="rb")
        self._given = source

    def close(self) -> None:
        super().close()
        self._given.close()


def open_bytes(path: Path, largest: int | None = None) -> io.BufferedReader:
    """The bytes of a file, decompressed if its suffix says so. OSError if it is not a regular file.

    ``largest`` is the most bytes of a record (None: no limit). A zstd file may have a window of that size.
    """
    source = open_file(path)
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(GzipReader(source), BUFFER)
        case ".zst":
            window = (1 << 31) if largest is None else min(max(WINDOW, largest), 1 << 31)
            return io.BufferedReader(ZstdReader(source, window), BUFFER)
        case _:
            return io.BufferedReader(source, BUFFER)


def too_large(place: str, largest: int, advice: bool) -> CorpusError:
    """The error for a record of more than ``largest`` bytes at ``place``."""
    give = f"; if it is one, give `fields.max_record_bytes` a larger number ({largest:,} now)" if advice else ""
    return CorpusError(f"{place}: a record of more than {largest:,} bytes{give}")
