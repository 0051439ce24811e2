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


@dataclass(frozen=True, slots=True)
class ParquetForm:
    name: str = "parquet"
    has_offsets: bool = False
    adds_nulls: bool = True

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
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=columns):
                skip = min(max(start - first, 0), batch.num_rows)
                yield from batch_rows(batch.slice(skip), first + skip, path)
                first += batch.num_rows

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for first, inside, table in self.groups(path, columns, keys):
            for key in inside:
                yield from batch_rows(table.slice(key - first, 1), key, path)

    def groups(
        self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[int], Any]]:
        """(first row, those of ``keys`` in it, Arrow table) of each row group with any of ``keys``."""
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
        """Its Arrow schema, with metadata."""
        with parquet_file(path) as file:
            return file.schema_arrow

    def count(self, path: Path) -> int:
        with parquet_file(path) as file:
            return int(file.metadata.num_rows)

    def where(self, path: Path, key: int) -> str:
        return row_place(path, key)


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with reading_arrow(path), pyarrow.parquet.ParquetFile(path) as file:
        yield file
