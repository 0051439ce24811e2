"""The layout on disk of parts and runs: arrays, chunks and spans.

Legend: the **length** is that of the first axis of every array: rows of a part, steps of a run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK_BYTES = 8 << 20
"""The size to aim for in a chunk of vectors. Above 32 MiB reading becomes much slower."""
LARGEST_ROW_BYTES = 32 << 20
CRC_BYTES = 4
"""The checksum at the end of a chunk file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """A Zarr array. ``columns`` are the lengths of the axes after the first; empty for a number or string an entry."""

    name: str
    dtype: Any
    """A little-endian numpy dtype, or ``str``."""
    chunk_rows: int
    """Length of a chunk along the first axis; the other axes are never split."""
    columns: tuple[int, ...] = ()
    axes: tuple[str, ...] = ("row", "column")
    """Names of the axes in the metadata; those beyond the number of axes are not used."""
    fill: Any = 0
    """The value that a plain Zarr reader sees in chunks that are not written."""
    every: int = 1
    """Rows (or steps) between two entries of the first axis."""

    def entries(self, start: int, stop: int) -> tuple[int, int]:
        """The range of entries of rows (or steps) ``start`` to ``stop``; it may be empty."""
        return -(-start // self.every), -(-stop // self.every)

    def count(self, length: int) -> int:
        """Number of entries of ``length`` rows (or steps), counted from one that has an entry."""
        return -(-length // self.every)

    @property
    def width(self) -> int:
        """Numbers of an entry."""
        return math.prod(self.columns)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk of a numeric array, without its checksum."""
        return self.chunk_rows * self.width * int(self.dtype.itemsize)


SAMPLE_COLUMNS: dict[str, Any] = {
    "sample_id": str,
    "domain": "<i2",
    "source_row": "<i8",
    "source_file": "<i4",
    "source_offset": "<i8",
    "source_digest": "<u8",
    "window_start": "<i4",
    "n_tokens": "<i4",
}
"""Arrays that identify the sample, or its window, of each row of a part or of a run's row table."""


def column_specs(dtypes: Mapping[str, Any], chunk_rows: int, folder: str = "") -> list[ArraySpec]:
    """Arrays of one number, or string, a row."""
    return [
        ArraySpec(name=folder + name, dtype=str, chunk_rows=chunk_rows, fill="")
        if dtype is str
        else ArraySpec(name=folder + name, dtype=np.dtype(dtype), chunk_rows=chunk_rows)
        for name, dtype in dtypes.items()
    ]


class SpanLayout(ABC):
    """The arrays of a part or a run, and the fixed ranges in which they are written and committed."""

    __slots__ = ()

    @property
    @abstractmethod
    def length(self) -> int:
        """Length of every array."""

    @property
    @abstractmethod
    def span_length(self) -> int:
        """Length of a span; the last may be shorter."""

    @abstractmethod
    def arrays(self) -> list[ArraySpec]:
        """Every array, in the order in which a span writes them."""

    @property
    def spans(self) -> int:
        """Number of spans."""
        return -(-self.length // self.span_length)

    def span_of(self, span: int) -> tuple[int, int]:
        """The range of rows (or steps) of ``span``."""
        if not 0 <= span < self.spans:
            raise IndexError(f"span {span} of {self.spans}")
        return span * self.span_length, min((span + 1) * self.span_length, self.length)

    def most_chunks(self) -> int:
        """The largest number of chunks that an array has in a span."""
        length = min(self.span_length, self.length)
        return max(-(-spec.count(length) // spec.chunk_rows) for spec in self.arrays())

    def chunk_keys(self, spec: ArraySpec, span: int) -> list[str]:
        """Paths, relative to the part or run, of the chunks of one array that ``span`` writes."""
        return chunk_keys(spec, *self.span_of(span))

    def span_keys(self, span: int) -> list[str]:
        """:meth:`chunk_keys` of all arrays: every file of ``span``."""
        return [key for spec in self.arrays() for key in self.chunk_keys(spec, span)]


def chunk_keys(spec: ArraySpec, start: int, stop: int) -> list[str]:
    """Paths of the chunks of one array that hold rows (or steps) ``start`` to ``stop``."""
    first, last = spec.entries(start, stop)
    tail = "/0" * len(spec.columns)
    chunks = range(first // spec.chunk_rows, (last - 1) // spec.chunk_rows + 1) if first < last else ()
    return [f"{spec.name}/c/{chunk}{tail}" for chunk in chunks]


def first_row(spec: ArraySpec, chunk: int) -> int:
    """The first row (or step) of a chunk."""
    return chunk * spec.chunk_rows * spec.every
