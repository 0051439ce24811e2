"""What every form of corpus gives: the rows of one file, from any row on or at random.

A row has a *key* in its file: the byte offset of its record in text forms (in the decompressed bytes
of .gz and .zst), its number from 0 in parquet and datasets. Key 0 always means the first row.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeAlias

import zstandard

from ghoststore.errors import CorpusError

KeyedRow: TypeAlias = tuple[int, object]


class Form(Protocol):
    """How one kind of file is read. Every method raises CorpusError for a file it cannot read."""

    @property
    def name(self) -> str: ...

    @property
    def has_offsets(self) -> bool:
        """Whether keys are byte offsets."""

    @property
    def largest(self) -> int | None:
        """Bytes of a record; CorpusError for a larger one, where it can be before it is in memory. None: any number."""

    @property
    def adds_nulls(self) -> bool:
        """Whether a schema gives every object all its keys, null where the data had none."""

    def fields(self, path: Path) -> Sequence[str] | None:
        """The names that a schema gives all rows; None where each row has names of its own."""

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        """Keys and rows from key ``start`` on; only ``columns`` are needed (None: all)."""

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        """The rows at ``keys`` (ascending, distinct), which `rows` gave before; those that are gone are left out."""

    def count(self, path: Path) -> int:
        """How many rows the file has."""

    def where(self, path: Path, key: int) -> str:
        """The place of a row as a person finds it: the file and the 1-based line or row."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn every way in which a file fails to be read into a CorpusError that names it."""
    try:
        yield
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise CorpusError(
                f"{path}: whoever compressed it has its reader keep more in memory than is given to it; if it is "
                "yours, give `fields.max_record_bytes` the size of its window (2147483648 for what zstd calls long=31)"
            ) from error
        raise CorpusError(f"{path}: damaged or cut short: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path}: damaged or cut short: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error
