"""Random access to single rows of a part, each checked against a digest in the index.

The checksum of a chunk covers the whole chunk. With that check alone, a few hundred rows of a large part would take
reading nearly all of the part.

Legend: R rows, D numbers of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import CorruptError
from ghoststore.store import Part
from ghoststore.store.base.object_path import ObjectPath, at_once, piece
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import open_regular
from ghoststore.store.part.index_manifest import ROW_BYTES
from ghoststore.store.spans.layout import ArraySpec, chunk_keys

ROW = np.dtype([("row", "<i8"), ("digest", "<u8"), ("length", "<f8")])
"""One row of an index: its row in the part, the :func:`digest_of` its numbers, and its Euclidean length."""
assert ROW.itemsize == ROW_BYTES


def digest_of(row_D: NDArray[np.float32]) -> int:
    """xxh3-64 of a row's numbers as little-endian float32, whatever their stored encoding."""
    return xxhash.xxh3_64_intdigest(row_D.astype("<f4", copy=False).data)


class CheckedRows:
    """Reads and checks rows of ``part`` that are in ``table``, the :data:`ROW` table of an index."""

    def __init__(self, part: Part, table: NDArray[np.void]) -> None:
        self.part, self.table = part, table

    def read(self, places: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """(R, D) float32: the rows at ``places`` of the table, in this order. Ascending places are fastest.

        CorruptError, with the name of the chunk, for a row that differs from what was indexed.
        """
        entries = self.table[np.asarray(places, dtype=np.int64)]
        vectors_RD = np.empty((len(entries), self.part.layout.dimension), dtype=np.float32)
        for part, at, rows in self.part.located(entries["row"]):
            vectors_RD[at] = _PartRows(part).read(rows.tolist(), entries["digest"][at].tolist())
        return torch.from_numpy(vectors_RD)


class _PartRows:
    """Rows of one part."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def read(self, rows: list[int], digests: list[int]) -> NDArray[np.float32]:
        """(R, D): ``rows``, each compared with its digest."""
        encoding = self.part.encoding
        scale = self._stored("scale", rows) if encoding.scaled else None
        vectors_RD = np.asarray(encoding.decode(self._stored("vectors", rows), scale, self.part.groups))
        for row, digest, row_D in zip(rows, digests, vectors_RD, strict=True):
            if digest_of(row_D) != digest:
                raise CorruptError(
                    f"{self._chunk(row)}: row {row} is not what was indexed; `ghoststore verify` tells whether the "
                    "chunk or the index is damaged"
                )
        return vectors_RD

    def _chunk(self, row: int, array: str = "vectors") -> Path:
        (key,) = chunk_keys(self.part.spec(array), row, row + 1)
        return self.part.path / key

    def _stored(self, array: str, rows: list[int]) -> NDArray[Any]:
        """(R, columns): rows of the array called ``array``, as stored, read row by row."""
        spec = self.part.spec(array)
        size = spec.width * spec.dtype.itemsize
        if isinstance(self.part.path, ObjectPath):
            return self._requested(spec, rows)
        stored = np.empty((len(rows), spec.width), dtype=spec.dtype)
        place = 0
        while place < len(rows):
            chunk = rows[place] // spec.chunk_rows
            path = self._chunk(rows[place], array)
            try:
                with open_regular(path, self.part.path) as file:
                    while place < len(rows) and rows[place] // spec.chunk_rows == chunk:
                        file.seek(rows[place] % spec.chunk_rows * size)
                        if file.readinto(stored[place].data.cast("B")) != size:
                            raise CorruptError(f"{path} is cut short at row {rows[place]}; see `ghoststore verify`")
                        place += 1
            except (FileNotFoundError, NotADirectoryError):
                raise CorruptError(
                    f"{path} is missing, though its span is committed; see `ghoststore verify`"
                ) from None
            except CorruptError:
                raise
            except OSError as error:
                raise CorruptError(f"{path} cannot be read: {error}") from error
        return stored

    def _requested(self, spec: ArraySpec, rows: list[int]) -> NDArray[Any]:
        """:meth:`_stored` of a part in an object store: a request for each row, several at a time."""
        size = spec.width * spec.dtype.itemsize

        def read(row: int) -> bytes:
            path, start = self._chunk(row, spec.name), row % spec.chunk_rows * size
            assert isinstance(path, ObjectPath)
            try:
                data = piece(path, start, start + size)
            except FileNotFoundError:
                raise CorruptError(
                    f"{path} is missing, though its span is committed; see `ghoststore verify`"
                ) from None
            if len(data) != size:
                raise CorruptError(f"{path} is cut short at row {row}; see `ghoststore verify`")
            return data

        stored = b"".join(side_by_side(read, rows, at_once(self.part.path)))
        return np.frombuffer(bytearray(stored), dtype=spec.dtype).reshape(len(rows), spec.width)
