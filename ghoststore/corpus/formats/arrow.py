"""What forms that pyarrow reads have in common: errors that name the file, rows of a table, the columns to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghoststore.corpus.fields import BESIDE_MESSAGES
from ghoststore.corpus.formats.base import KeyedRow, reading
from ghoststore.corpus.formats.compressed import too_large
from ghoststore.errors import CorpusError

ROWS_PER_BATCH = 1024


@contextmanager
def reading_arrow(path: Path) -> Iterator[None]:
    """As :func:`reading`, of what pyarrow reads."""
    import pyarrow

    try:
        with reading(path):
            yield
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: damaged: {error}") from error


def batch_rows(table: Any, first: int, path: Path, largest: int | None = None) -> Iterator[KeyedRow]:
    """The rows of an Arrow table or batch, numbered from ``first``. CorpusError for one above ``largest`` bytes."""
    if largest is not None and table.nbytes > largest:
        for number in range(table.num_rows):
            if table.slice(number, 1).nbytes > largest:
                raise too_large(row_place(path, first + number), largest, advice=True)
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        for number in range(table.num_rows):
            try:
                table.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                place = row_place(path, first + number)
                raise CorpusError(f"{place}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
        raise
    yield from enumerate(rows, start=first)


def wanted(columns: Sequence[str] | None, names: Iterable[str]) -> list[str] | None:
    """The columns to read; all (None) when one is missing that a row must have: the row tells what there is instead."""
    there = set(names)
    if columns is None or not set(columns) - there <= set(BESIDE_MESSAGES):
        return None
    return [name for name in columns if name in there]


def row_place(path: Path, key: int) -> str:
    """The place of a row as a person finds it."""
    return f"{path}, row {key + 1}"
