"""Check: how fast is the disk of the store? A file is written and flushed to the disk, read back and removed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time

from query.doctor.finding import Check, Finding, right, skipped
from query.doctor.subject import Subject

FILE = 256 << 20
PIECE = 4 << 20
SECONDS = 5.0
"""Longest time for writing, and for reading, on a slow disk."""
FREE = 4
"""The file takes at most 1/FREE of the free space."""
SLOW = 100e6
"""Bytes a second below which an exact query waits for the disk."""


def examine(subject: Subject) -> Finding:
    """Measure writing and then reading, in bytes a second, in the folder that holds or will hold the store."""
    folder = subject.store.resolve()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
        if free < FREE * PIECE:
            return skipped(f"{folder} has {free / 2**20:.0f} MiB left, too few to measure")
        with tempfile.TemporaryFile(dir=folder) as file:
            size, write = _write(file.fileno(), min(FILE, free // FREE))
            evicted = _evict(file.fileno())
            read = _read(file.fileno(), size)
    except OSError as error:
        return skipped(f"{folder} cannot be written: {error.strerror or error}")
    details = {
        "folder": str(folder),
        "bytes": size,
        "write_bytes_per_second": write,
        "read_bytes_per_second": read,
        "read_from_disk": evicted,
        "free_bytes": free,
    }
    summary = f"{write / 1e6:,.0f} MB/s written with fsync, {read / 1e6:,.0f} MB/s read{'' if evicted else ' (memory)'}"
    if min(write, read) >= SLOW:
        return right(summary, **details)
    return right(
        summary,
        "An exact query reads every vector at this speed: keep the store on a local disk, or fewer numbers a row "
        "(`ghoststore build --proj-compress`).",
        **details,
    )


def _write(handle: int, limit: int) -> tuple[int, float]:
    """(bytes written, bytes a second) of writing random bytes and flushing them to the disk."""
    piece, size, started = os.urandom(PIECE), 0, time.perf_counter()
    while size + PIECE <= limit and time.perf_counter() - started < SECONDS:
        size += os.write(handle, piece)
    os.fsync(handle)
    return size, size / (time.perf_counter() - started)


def _evict(handle: int) -> bool:
    """Drop the file's pages from memory, so that reading reads the disk. Returns whether that is possible here."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read(handle: int, size: int) -> float:
    """Bytes a second of reading the file from its beginning."""
    os.lseek(handle, 0, os.SEEK_SET)
    done, started = 0, time.perf_counter()
    while done < size and time.perf_counter() - started < SECONDS:
        done += len(os.read(handle, PIECE))
    return done / (time.perf_counter() - started)


CHECK = Check(name="disk", asks="How fast is the disk of the store?", run=examine)
