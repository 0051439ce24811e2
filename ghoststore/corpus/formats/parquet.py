"""Parquet files, read by row groups."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats.arrow import ROWS_PER_BATCH, batch_rows, reading_arrow, row_place, wanted
from ghoststore.corpus.formats.base import KeyedRow
from ghoststore.store.base.opening import open_regular

AT_ONCE = 64 << 20
"""Approximate bytes of rows in memory at once."""


@dataclass(frozen=True, slots=True)
class ParquetForm:
    """Parquet files. The key of a row is its number in the file."""

    name: str = "parquet"
    has_offsets: bool = False
    adds_nulls: bool = True
    largest: int | None = None

    def fields(self, path: Path) -> Sequence[str] | None:
        names: list[str] = self.schema(path).names
        return names

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with parquet_file(path) as file:
            columns = wanted(columns, file.schema_arrow.names)
            groups: list[int] = []
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if groups or start < first + size:
                    groups.append(group)
                else:
                    first += size
            for batch in file.iter_batches(self._rows_at_once(file, groups), row_groups=groups, columns=columns):
                skip = min(max(start - first, 0), batch.num_rows)
                yield from batch_rows(batch.slice(skip), first + skip, path, self.largest)
                first += batch.num_rows

    def _rows_at_once(self, file: Any, groups: Sequence[int]) -> int:
        """How many rows have about AT_ONCE bytes, from the metadata of the file."""
        described = [file.metadata.row_group(group) for group in groups]
        bytes_of_row = max((group.total_byte_size // max(group.num_rows, 1) for group in described), default=1)
        return max(1, min(ROWS_PER_BATCH, AT_ONCE // max(bytes_of_row, 1)))

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for first, inside, table in self.groups(path, columns, keys):
            for key in inside:
                yield from batch_rows(table.slice(key - first, 1), key, path, self.largest)

    def groups(
        self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[int], Any]]:
        """(first row, the ``keys`` in it, Arrow table) of each row group that holds any of ``keys``."""
        with parquet_file(path) as file:
            columns = wanted(columns, file.schema_arrow.names)
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                inside = keys[bisect_left(keys, first) : bisect_left(keys, first + size)]
                if inside:
                    yield first, inside, file.read_row_group(group, columns=columns)
                first += size

    def schema(self, path: Path) -> Any:
        """The Arrow schema of the file, with metadata."""
        with parquet_file(path) as file:
            return file.schema_arrow

    def count(self, path: Path) -> int:
        with parquet_file(path) as file:
            return int(file.metadata.num_rows)

    def where(self, path: Path, key: int) -> str:
        return row_place(path, key)


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """The open parquet file ``path``. CorpusError if it cannot be read."""
    import pyarrow.parquet

    # Pages are read when needed. A row group at once could be the whole file.
    with (
        reading_arrow(path),
        open_regular(path) as source,
        pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=AT_ONCE >> 6) as file,
    ):
        yield file
