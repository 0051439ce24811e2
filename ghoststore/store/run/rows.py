"""The row table of a run: the sample of each row. It is written when the run is made, and read lazily and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.base.opening import size_of
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.spans.gathered import gather
from ghoststore.store.spans.group import create_array
from ghoststore.store.spans.layout import ArraySpec, chunk_keys

if TYPE_CHECKING:
    from ghoststore.store.run.run import Run

LARGEST_STRINGS = 256 << 20
"""Most bytes of a chunk of ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """The sample of each row of a run. The columns are those of a part."""

    sample_id: NDArray[Any]
    """Strings."""
    domain: NDArray[Any]
    """Index into the manifest's ``corpus.domains``, -1 for none."""
    source_row: NDArray[Any]
    source_file: NDArray[Any]
    source_offset: NDArray[Any]
    source_digest: NDArray[Any]
    window_start: NDArray[Any]
    n_tokens: NDArray[Any]

    def checked(self, layout: RunLayout, domains: int) -> dict[str, NDArray[Any]]:
        """The columns in their stored dtypes, by array. UsageError naming the first column that does not fit."""
        columns = {}
        for spec in layout.row_arrays():
            name = spec.name.removeprefix("rows/")
            values = np.asarray(getattr(self, name))
            if values.shape != (layout.rows,):
                raise UsageError(f"{name} of the row table has shape {values.shape}; the run has {layout.rows} rows")
            if spec.dtype is str:
                stored = values.astype(object)
                _check_strings(name, stored, spec)
            else:
                stored = values.astype(spec.dtype) if values.dtype.kind in "iu" else np.empty(0)
                if not np.array_equal(stored, values):
                    raise UsageError(f"{name} of the row table has values that are not {spec.dtype}: {values.dtype}")
            columns[spec.name] = stored
        domain = columns["rows/domain"]
        if domain.min() < -1 or domain.max() >= domains:
            raise UsageError(f"domain of the row table has values outside -1 to {domains - 1}")
        return columns


def _check_strings(name: str, values: NDArray[Any], spec: ArraySpec) -> None:
    """UsageError unless :class:`RunRows` can read every chunk of ``values``."""
    for start in range(0, len(values), spec.chunk_rows):
        chunk = values[start : start + spec.chunk_rows]
        if not all(isinstance(value, str) for value in chunk):
            raise UsageError(f"{name} of the row table has values that are not strings")
        try:
            size = sum(len(value.encode()) + 4 for value in chunk)
        except UnicodeEncodeError as error:
            raise UsageError(f"{name} of the row table has a string that is not Unicode text: {error}") from error
        if size > LARGEST_STRINGS:
            raise UsageError(f"{name} of the row table is too long: {size} bytes in {len(chunk)} rows")


NAMES = tuple(field.name for field in fields(RowTable))


def write_rows(group: zarr.Group, layout: RunLayout, columns: dict[str, NDArray[Any]]) -> None:
    """Write the arrays of the row table to a run's group. ``columns`` are those of :meth:`RowTable.checked`."""
    for spec in layout.row_arrays():
        create_array(group, spec, layout.rows)[...] = columns[spec.name]


class RunRows:
    """Reads the row table lazily. Each file is checked when it is first read.

    Memory: the values that are returned, and one chunk.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return self._run.layout.rows

    def bear_out(self) -> None:
        """CorruptError unless the table is as large as the manifest says.

        Call it before allocating memory for a value of each row. It checks the smallest column.
        """
        spec = self._spec("domain")
        for key in chunk_keys(spec, 0, len(self)):
            if key not in self._run.files:
                raise CorruptError(f"{self._run.path / 'zarr.json'} does not name {key}, a file of its row table")
            self._run.check_chunk(spec, key)

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of one column.

        UsageError for another name or range, CorruptError naming a damaged file.
        """
        spec = self._spec(name)
        if not 0 <= start <= stop <= len(self):
            raise UsageError(f"rows {start} to {stop} of run {self._run.name!r}, which has {len(self)}")
        if start == stop:
            return np.empty(0, dtype=spec.dtype)
        for key in chunk_keys(spec, start, stop):
            if key not in self._checked:
                self._check(spec, key)
        return self._run.slice(spec, len(self), start, stop)

    def read_rows(self, name: str, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[Any]:
        """The value of each of ``rows``, in their order; each chunk is read once. UsageError outside the table."""
        spec = self._spec(name)
        row_N = np.asarray(rows, dtype=np.int64)
        if len(row_N) and (row_N.min() < 0 or row_N.max() >= len(self)):
            raise UsageError(f"rows {row_N.min()} to {row_N.max()} of run {self._run.name!r}, which has {len(self)}")
        size = spec.chunk_rows
        return gather(
            row_N, size, lambda chunk: self.read(name, chunk * size, min((chunk + 1) * size, len(self))), spec.dtype
        )

    def _spec(self, name: str) -> ArraySpec:
        for spec in self._run.layout.row_arrays():
            if spec.name == f"rows/{name}":
                return spec
        raise UsageError(f"the row table of run {self._run.name!r} has no column {name!r}; it has: {', '.join(NAMES)}")

    def _check(self, spec: ArraySpec, key: str) -> None:
        self._run.check_chunk(spec, key)  # before the whole chunk is read
        path = self._run.path / key
        if spec.dtype is str and (size := size_of(path, self._run.path)) > LARGEST_STRINGS + (1 << 20):
            raise CorruptError(f"{path} is not what was written: it has {size} bytes")
        self._run.check_file(key)
        self._checked.add(key)
