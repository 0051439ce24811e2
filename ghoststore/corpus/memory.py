"""Data in memory as a corpus: texts, dictionaries, and tables (`datasets.Dataset`, pandas, Arrow)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from ghoststore.corpus.formats.base import Form, KeyedRow, NumberedForm
from ghoststore.corpus.formats.dataset import DatasetForm
from ghoststore.corpus.formats.stream import StreamForm
from ghoststore.corpus.locate import BETWEEN, absolute, corpus_name, load_from_hub, named_on_hub
from ghoststore.corpus.values import RowError, plain_row
from ghoststore.errors import CorpusError, UsageError
from ghoststore.settings.option import in_objects
from ghoststore.settings.shared import Data, in_memory, is_paths, is_stream
from ghoststore.store.base.object_path import location

WHAT = "a path, or a list of paths, of texts or of dicts, a datasets.Dataset, a pandas DataFrame or an Arrow table"


@dataclass(frozen=True, slots=True)
class MemoryForm(NumberedForm):
    """A list of texts and dictionaries. A row's key is its number; a text is the field "text" of its row."""

    items: Sequence[object]
    name: str = "memory"
    largest: int | None = None

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        yield from self.pick(path, columns, range(start, len(self.items)))

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for key in keys:
            if key < len(self.items):
                try:
                    yield key, plain_row(self.items[key])
                except RowError as error:
                    raise CorpusError(f"{self.where(path, key)}: {error}") from None

    def count(self, path: Path) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class MemoryData:
    """Data in memory, and what messages and results call them. Made by `source_of`."""

    name: str
    form: Form

    def __str__(self) -> str:
        return self.name

    def __len__(self) -> int:
        return self.form.count(Path(self.name))


Source: TypeAlias = str | MemoryData
"""Where a corpus is: what `locate` finds files for, or data in memory."""


def source_of(data: Data, *, stream: bool = False) -> Source:
    """The source that a user means by ``data``. UsageError for an object that is no data, or that can be read only
    once.

    With ``stream`` it is read once, in order: a stream in memory is taken, and a dataset of the hub becomes one.
    """
    if stream and is_stream(data):
        return MemoryData(f"a stream ({type(data).__name__})", StreamForm.of(data))
    if stream and isinstance(data, str) and (named := named_on_hub(data)):
        return MemoryData(data, StreamForm.of(load_from_hub(data, *named, streaming=True)))
    if isinstance(data, str | PurePath):
        return _spelled(data)
    if isinstance(data, MemoryData):
        return data
    if is_paths(data):
        return BETWEEN.join(map(_spelled, data))  # type: ignore[arg-type]
    if _is_table(data):
        return MemoryData(_named(data), DatasetForm(_dataset(data)))
    if isinstance(data, Mapping):
        advice = "one of its splits" if type(data).__module__.startswith("datasets") else "a list of such rows"
        raise UsageError(f"a {type(data).__name__} is not data of several rows: give {advice}")
    if isinstance(data, bytes | bytearray) or not isinstance(data, Sequence):
        once = hasattr(data, "__iter__") and not hasattr(data, "__len__")
        advice = (
            "it can be read only once, and data are read several times: give a list of the rows that you want"
            if once
            else f"give {WHAT}"
        )
        raise UsageError(f"data of the type {type(data).__name__} cannot be used: {advice}")
    _refuse_paths(data)
    kinds = "texts" if all(isinstance(item, str) for item in data) else "rows"
    return MemoryData(f"{len(data):,} {kinds} in memory", MemoryForm(data))


def _spelled(path: str | PurePath) -> str:
    """A path as text. A `pathlib.Path` of an address has lost one of its slashes."""
    return re.sub(r"^(\w+):/+", r"\1://", str(path)) if in_objects(path) else str(path)


def _refuse_paths(items: Sequence[object]) -> None:
    """UsageError for a list of the names of files, which would be read as texts."""
    if any(isinstance(item, PurePath) for item in items) or (
        0 < len(items) <= 64
        and all(
            isinstance(item, str) and len(item) < 256 and (in_objects(item) or os.path.exists(item)) for item in items
        )
    ):
        first = str(items[0])
        if in_objects(first):
            location(first, "corpus")  # an address with credentials is shown to nobody
        raise UsageError(
            f"a list holds texts, and {first!r:.100} is a path: for several files give a list of pathlib.Path"
        )


def _package(data: object) -> str:
    return type(data).__module__.partition(".")[0]


def _is_table(data: object) -> bool:
    """Whether ``data`` is a table of a library, by its class: none of them is loaded for that."""
    columns = {"datasets": "select_columns", "pandas": "columns", "pyarrow": "column_names"}.get(_package(data))
    return columns is not None and hasattr(data, columns) and hasattr(data, "__len__") and not isinstance(data, Mapping)


def _named(table: Any) -> str:
    return f"{len(table):,} rows in memory"


def _dataset(table: Any) -> Any:
    """A `datasets.Dataset` with the rows of ``table``."""
    import datasets

    if isinstance(table, datasets.Dataset):
        return table
    if _package(table) == "pandas":
        return datasets.Dataset.from_pandas(table, preserve_index=False)
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def source_name(data: Data | None) -> str:
    """What results and messages call ``data``: the path, or ``3 texts in memory``."""
    if in_memory(data) and _is_table(data):
        return _named(data)  # without a copy of it
    return str(data if data is None else source_of(data))


def part_word(data: Data) -> str:
    """A short word for ``data`` in default names of parts and runs."""
    if is_stream(data):
        return "stream"
    return "memory" if in_memory(data) else corpus_name(str(source_of(data)))


def recorded(source: Source) -> str:
    """What a manifest records of where a corpus lies: its absolute path, or "-" for what cannot be read again."""
    return absolute(source) if isinstance(source, str) and source != "-" else "-"


def same_source(first: Data, second: Data) -> bool:
    """Whether two val sets are the same one."""
    if not (in_memory(first) or in_memory(second)):
        return absolute(str(source_of(first))) == absolute(str(source_of(second)))
    return first is second or (isinstance(first, list) and isinstance(second, list) and first == second)
