"""Parquet files, read by row groups."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats.arrow import ROWS_PER_BATCH, batch_rows, reading_arrow, wanted
from ghoststore.corpus.formats.base import KeyedRow, NumberedForm, open_file
from ghoststore.errors import CorpusError
from ghoststore.settings.fields import LARGEST_RECORD
from ghoststore.store.base.object_path import ObjectPath

AT_ONCE = 64 << 20
"""Approximate bytes of rows in memory at once."""
EXPANDED = 128 << 20
"""And at most what they take where each holds all of its column's dictionary: a value that stands there once may be
that of every row.
"""
_FIRST_PAGE = 64
"""Bytes in which the beginning of a page's header lies."""
_DICTIONARY_PAGE, _NEXT_NUMBER = 2, 0x15


@dataclass(frozen=True, slots=True)
class ParquetForm(NumberedForm):
    name: str = "parquet"
    largest: int | None = None
    adds_nulls = True

    def fields(self, path: Path) -> Sequence[str] | None:
        names: list[str] = self.schema(path).names
        return names

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        with parquet_file(path) as file:
            columns = wanted(columns, file.schema_arrow.names)
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if start < first + size:
                    for batch in self._batches(path, file, group, columns, first):
                        skip = min(max(start - first, 0), batch.num_rows)
                        yield from batch_rows(batch.slice(skip), first + skip, path, self.largest)
                        first += batch.num_rows
                else:
                    first += size

    def _batches(self, path: Path, file: Any, group: int, columns: Sequence[str] | None, first: int) -> Iterator[Any]:
        """The rows of a row group, from row ``first`` of the file on, some at a time: about AT_ONCE bytes by what the
        file says of them, and never more than EXPANDED by what its dictionaries may make of them. CorpusError for a
        dictionary that is too large to be read.
        """
        described = file.metadata.row_group(group)
        bytes_of_row = described.total_byte_size // max(described.num_rows, 1)
        expanded = 0
        for place in range(described.num_columns):
            column = described.column(place)
            if columns is not None and column.path_in_schema.partition(".")[0] not in columns:
                continue
            size = _dictionary_bytes(path, column)
            if self.largest is not None and size > (largest := max(self.largest, LARGEST_RECORD)):
                raise CorpusError(
                    f"{path}, row {first + 1:,}: the dictionary of {column.path_in_schema!r} has {size:,} bytes, at "
                    f"most {largest:,} are read; if it is one, give `fields.max_record_bytes` a larger number"
                )
            expanded += size * -(-column.num_values // max(described.num_rows, 1))
        most = min(AT_ONCE // max(bytes_of_row, 1), EXPANDED // max(expanded, 1), ROWS_PER_BATCH)
        yield from file.iter_batches(max(1, most), row_groups=[group], columns=columns)

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for first, inside, table in self.groups(path, columns, keys):
            for key in inside:
                yield from batch_rows(table.slice(key - first, 1), key, path, self.largest)

    def groups(
        self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[int], Any]]:
        """(first row, those of ``keys`` in it, Arrow table) of each some rows with any of ``keys``."""
        import pyarrow

        with parquet_file(path) as file:
            columns = wanted(columns, file.schema_arrow.names)
            first = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if _inside(keys, first, size):
                    start = first
                    for batch in self._batches(path, file, group, columns, first):
                        if inside := _inside(keys, start, batch.num_rows):
                            yield start, inside, pyarrow.Table.from_batches([batch])
                        start += batch.num_rows
                first += size

    def schema(self, path: Path) -> Any:
        """The Arrow schema of the file, with metadata."""
        with parquet_file(path) as file:
            return file.schema_arrow

    def count(self, path: Path) -> int:
        with parquet_file(path) as file:
            return int(file.metadata.num_rows)


def _inside(keys: Sequence[int], first: int, count: int) -> Sequence[int]:
    """Those of ``keys`` among ``count`` rows from ``first`` on."""
    return keys[bisect_left(keys, first) : bisect_left(keys, first + count)]


def _dictionary_bytes(path: Path, column: Any) -> int:
    """Bytes that the dictionary of a column chunk takes in memory, by the header of its page; 0 if it has none.

    The footer tells where it begins, not how large it is: the header does, in Thrift's compact protocol, whose first
    three fields (kind, size, compressed size) are numbers.
    """
    if column.dictionary_page_offset is None:
        return 0
    with open_file(path) as file:
        file.seek(min(column.dictionary_page_offset, column.data_page_offset))
        data = file.read(_FIRST_PAGE)
    kind, size = _thrift_numbers(data, 2) or (0, 0)  # what is no header, whoever reads the page will say
    return size if kind == _DICTIONARY_PAGE else 0


def _thrift_numbers(data: bytes, count: int) -> list[int]:
    """The first fields of a struct, if they are so many 32-bit numbers, none below 0; else nothing."""
    numbers: list[int] = []
    rest = iter(data)
    while len(numbers) < count:
        if next(rest, None) != _NEXT_NUMBER:
            return []
        value = shift = 0
        for byte in rest:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value >> 1)
    return numbers


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    # Pages are read when needed. A row group at once could be the whole file.
    buffer = AT_ONCE >> (3 if isinstance(path, ObjectPath) else 6)  # each is a request there
    with (
        reading_arrow(path),
        open_file(path) as source,
        pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=buffer) as file,
    ):
        yield file
