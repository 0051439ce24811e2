"""The protocol of the forms of a corpus: reading the rows of one file, from any row on or at random.

A row has a *key* in its file. In text forms it is the byte offset of its record (after decompression of .gz and .zst);
in parquet files and datasets it is the number of the row, counted from 0. Key 0 always means the first row.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import zstandard

from ghoststore.errors import CorpusError, StorageError
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.object_ranges import RangedFile, open_ranged
from ghoststore.store.base.opening import open_regular

KeyedRow: TypeAlias = tuple[int, object]


class Form(Protocol):
    """Reads one kind of file. Every method raises CorpusError for a file that it cannot read."""

    @property
    def name(self) -> str: ...

    @property
    def has_offsets(self) -> bool:
        """Whether keys are byte offsets."""

    @property
    def largest(self) -> int | None:
        """Most bytes of a record; None for no limit. A larger one is a CorpusError, if possible before it
        is in memory.
        """

    @property
    def adds_nulls(self) -> bool:
        """Whether a schema gives every object all keys, with null for missing ones."""

    def fields(self, path: Path) -> Sequence[str] | None:
        """The field names that a schema gives all rows; None if each row has its own."""

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        """(key, row) of each row from key ``start`` on. Only ``columns`` are needed (None: all)."""

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        """(key, row) at each of ``keys``, which are ascending and distinct, and come from `rows`. Missing rows are left
        out.
        """

    def count(self, path: Path) -> int:
        """The number of rows of the file."""

    def where(self, path: Path, key: int) -> str:
        """The place of a row for messages: the file, and the line or row counted from 1."""


def row_place(path: Path, key: int) -> str:
    """The place of a row for messages, counted from 1."""
    return f"{path}, row {key + 1}"


class NumberedForm:
    """A form whose keys are the numbers of rows; its rows have names of their own unless it says otherwise."""

    __slots__ = ()
    has_offsets = False
    adds_nulls = False

    def fields(self, path: Path) -> Sequence[str] | None:
        """See :class:`Form`."""
        return None

    def where(self, path: Path, key: int) -> str:
        """See :class:`Form`."""
        return row_place(path, key)


def open_file(path: Path) -> FileIO:
    """A file of a corpus, on a disk (see `open_regular`) or in object storage, where it is read by ranges."""
    return cast(FileIO, open_ranged(path)) if isinstance(path, ObjectPath) else open_regular(path)


def open_again(path: Path, file: Any) -> FileIO:
    """A file that is open as ``file`` for a second time: in object storage, the same version of it."""
    return cast(FileIO, file.again()) if isinstance(file, RangedFile) else open_regular(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into a CorpusError that names the file."""
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
    except StorageError:  # an object store that does not answer says nothing about the file
        raise
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error
