"""Checks a chunk file by its own checksum, if no record names it."""

from __future__ import annotations

from pathlib import Path

import google_crc32c

from ghoststore.errors import CorruptError, StorageError
from ghoststore.store.base.opening import open_regular, size_open
from ghoststore.store.spans.layout import CRC_BYTES

_PIECE = 1 << 20


def check_crc(path: Path, within: Path) -> None:
    """CorruptError unless the last four bytes of a chunk file are the crc32c of those before."""
    try:
        with open_regular(path, within) as file:
            remaining = size_open(file) - CRC_BYTES
            checksum = 0
            while remaining > 0 and (piece := file.read(min(remaining, _PIECE))):
                checksum, remaining = google_crc32c.extend(checksum, piece), remaining - len(piece)
            stated = file.read()
    except (CorruptError, StorageError):
        raise
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    if remaining or stated != checksum.to_bytes(CRC_BYTES, "little"):
        raise CorruptError(f"{path} is damaged: its crc32c does not hold")
