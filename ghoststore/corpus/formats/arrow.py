"""Functions for the forms that pyarrow reads: errors that name the file, the rows of a table, the columns to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghoststore.corpus.content import BESIDE_MESSAGES
from ghoststore.corpus.formats.base import KeyedRow, reading, row_place
from ghoststore.corpus.formats.compressed import too_large
from ghoststore.corpus.values import column_of
from ghoststore.errors import CorpusError

ROWS_PER_BATCH = 1024


@contextmanager
def reading_arrow(path: Path) -> Iterator[None]:
    """:func:`reading` for files that pyarrow reads: CorpusError for its errors, too."""
    import pyarrow

    try:
        with reading(path):
            yield
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: damaged: {error}") from error


def batch_rows(table: Any, first: int, path: Path, largest: int | None = None) -> Iterator[KeyedRow]:
    """The rows of an Arrow table or batch, numbered from ``first``. CorpusError for a row of more than ``largest``
    bytes.
    """
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
    """Those of ``names``, the columns of the file, that hold the fields ``columns``, each once.

    None, for all columns, if a required one is missing: the error about a row then shows which fields it has.
    """
    if columns is None:
        return None
    available = set(names)
    holding = {name: column_of(name, available) for name in columns}
    if any(column is None for name, column in holding.items() if name not in BESIDE_MESSAGES):
        return None
    return list(dict.fromkeys(column for column in holding.values() if column is not None))
