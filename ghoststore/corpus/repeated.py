"""Ids that more than one sample has: counted in bounded memory, however many samples there are.

An id is a name for people; nothing stops two rows from having the same one. Whatever joins or sums does so by a
sample's place, and summaries say how many ids do not tell samples apart.
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
"""Hashes in memory at once (8 bytes each); more are sorted into a temporary file (TMPDIR)."""

Repeated: TypeAlias = dict[str, int]
"""``ids`` that occur more than once, and the ``samples`` that have them."""


class RepeatedIds:
    """Ids pass by, each once a sample; :meth:`count` says how many of them occur more than once.

    Two ids are the same where their 64-bit hashes are: a billion different ones look repeated with a chance of 3 %.
    """

    def __init__(self) -> None:
        self._held = array("Q")
        self._file: IO[bytes] | None = None
        self._pieces: list[int] = []
        """Lengths of the sorted pieces in the file."""

    @classmethod
    def of(cls, ids: Iterable[str]) -> Repeated | None:
        """See :meth:`count`."""
        counter = cls()
        for name in ids:
            counter.add(name)
        return counter.count()

    def add(self, name: str) -> None:
        """The id of the next sample. StorageError where a temporary file is needed and cannot be written."""
        self._held.append(xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")))
        if len(self._held) == HELD:
            self._spill()

    def count(self) -> Repeated | None:
        """How many ids occur more than once, and in how many samples; None where every id is unique. Once."""
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
                self._file = tempfile.TemporaryFile(prefix="ghoststore-")  # noqa: SIM115 - goes with this object
            self._file.write(np.sort(np.frombuffer(self._held, dtype=np.uint64)).tobytes())
            self._file.flush()
        self._pieces.append(len(self._held))
        self._held = array("Q")

    def _merged(self, file: IO[bytes]) -> tuple[int, int]:
        """Range by range of the hashes, which are spread evenly: what is in memory is about as much as was held."""
        whole = np.memmap(file, dtype=np.uint64, mode="r")
        pieces = np.split(whole, np.cumsum(self._pieces)[:-1])
        ranges = math.ceil(len(whole) / HELD)
        begun = [0] * len(pieces)
        ids = samples = 0
        for place in range(1, ranges + 1):
            last = np.uint64((place << 64) // ranges - 1)
            stops = [int(np.searchsorted(piece, last, side="right")) for piece in pieces]
            inside = [piece[start:stop] for piece, start, stop in zip(pieces, begun, stops, strict=True)]
            some = _repeated(np.concatenate(inside))
            ids, samples, begun = ids + some[0], samples + some[1], stops
        return ids, samples


def _repeated(hashes: NDArray[np.uint64]) -> tuple[int, int]:
    """(values that occur more than once, how often they do together)."""
    _, times = np.unique(hashes, return_counts=True)
    return int((times > 1).sum()), int(times[times > 1].sum())


def repeated_words(repeated: Repeated | None) -> str | None:
    """A summary's line; None where every id is unique."""
    if repeated is None:
        return None
    return f"{repeated['ids']:,} id(s) occur more than once, in {repeated['samples']:,} samples: tell them apart by row"
