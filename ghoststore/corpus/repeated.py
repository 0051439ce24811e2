"""Counting ids that several samples share, in bounded memory for any number of samples.

An id is a name for people, and several rows may have the same one. So joins and sums use the place of a sample, and
summaries say how many ids repeat.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections.abc import Iterable
from typing import IO, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from ghoststore.store.base.disk import storage_errors

HELD = 1 << 20
"""Most hashes in memory (8 bytes each). More are written, sorted, to a temporary file (in TMPDIR)."""

Repeated: TypeAlias = dict[str, int]
"""Number of ``ids`` that occur more than once, and of ``samples`` that have them."""


class RepeatedIds:
    """Counts repeated ids. :meth:`add` the id of every sample, then :meth:`count`.

    Ids are compared by 64-bit hashes. For a billion different ids, the probability of a false repetition is 3 %.
    """

    def __init__(self) -> None:
        self._held = array("Q")
        self._file: IO[bytes] | None = None
        self._pieces: list[int] = []
        """Lengths of the sorted pieces in the file."""

    @classmethod
    def of(cls, ids: Iterable[str]) -> Repeated | None:
        """The result of :meth:`count` for ``ids``."""
        counter = cls()
        for name in ids:
            counter.add(name)
        return counter.count()

    def add(self, name: str) -> None:
        """Add the id of the next sample. StorageError if a temporary file is needed and cannot be written."""
        self._held.append(xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")))
        if len(self._held) == HELD:
            self._spill()

    def count(self) -> Repeated | None:
        """How many ids occur more than once, and in how many samples; None if every id is unique. Call it once."""
        if self._file is None:
            ids, samples = _repeated(np.frombuffer(self._held, dtype=np.uint64))
        else:
            self._spill()
            with self._file as file:
                ids, samples = self._merged(file)
        return {"ids": ids, "samples": samples} if ids else None

    def _spill(self) -> None:
        with storage_errors(tempfile.gettempdir()):
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="ghoststore-")  # noqa: SIM115 - deleted with this object
            self._file.write(np.sort(np.frombuffer(self._held, dtype=np.uint64)).tobytes())
            self._file.flush()
        self._pieces.append(len(self._held))
        self._held = array("Q")

    def _merged(self, file: IO[bytes]) -> tuple[int, int]:
        """(ids, samples) that repeat, counted for one range of hashes after another.

        Hashes are spread evenly, so each range has about HELD of them.
        """
        hashes = np.memmap(file, dtype=np.uint64, mode="r")
        pieces = np.split(hashes, np.cumsum(self._pieces)[:-1])
        ranges = math.ceil(len(hashes) / HELD)
        starts = [0] * len(pieces)
        ids = samples = 0
        for place in range(1, ranges + 1):
            last = np.uint64((place << 64) // ranges - 1)
            stops = [int(np.searchsorted(piece, last, side="right")) for piece in pieces]
            inside = [piece[start:stop] for piece, start, stop in zip(pieces, starts, stops, strict=True)]
            in_range = _repeated(np.concatenate(inside))
            ids, samples, starts = ids + in_range[0], samples + in_range[1], stops
        return ids, samples


def _repeated(hashes: NDArray[np.uint64]) -> tuple[int, int]:
    """(number of values that occur more than once, number of their occurrences)."""
    _, times = np.unique(hashes, return_counts=True)
    return int((times > 1).sum()), int(times[times > 1].sum())


def repeated_words(repeated: Repeated | None) -> str | None:
    """A line about repeated ids for a summary; None if every id is unique."""
    if repeated is None:
        return None
    return f"{repeated['ids']:,} id(s) occur more than once, in {repeated['samples']:,} samples: tell them apart by row"
