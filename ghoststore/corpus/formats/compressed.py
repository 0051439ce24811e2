"""The decompressed bytes of a file: plain, gzip or zstd."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any

import zstandard

BUFFER = 1 << 17


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
