"""Hugging Face datasets, saved on disk or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats.arrow import ROWS_PER_BATCH, batch_rows, reading_arrow, wanted
from ghoststore.corpus.formats.base import KeyedRow, NumberedForm


@dataclass(frozen=True, slots=True)
class DatasetForm(NumberedForm):
    """A `datasets.Dataset`, read as Arrow tables from its memory map. Paths serve only as names in messages."""

    dataset: Any
    name: str = "dataset"
    largest: int | None = None
    adds_nulls = True

    def fields(self, path: Path) -> Sequence[str] | None:
        names: list[str] = self.dataset.column_names
        return names

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        read = self._reader(path, columns)
        with reading_arrow(path):
            for first in range(start, len(self.dataset), ROWS_PER_BATCH):
                yield from read(first, min(first + ROWS_PER_BATCH, len(self.dataset)))

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        read = self._reader(path, columns)
        with reading_arrow(path):
            for key in keys:
                if key < len(self.dataset):
                    yield from read(key, key + 1)

    def count(self, path: Path) -> int:
        return len(self.dataset)

    def schema(self, path: Path) -> Any:
        """The Arrow schema of the dataset, with metadata."""
        return self.dataset.features.arrow_schema

    def _reader(self, path: Path, columns: Sequence[str] | None) -> Callable[[int, int], Iterator[KeyedRow]]:
        columns = wanted(columns, self.dataset.column_names)
        chosen = self.dataset if columns is None else self.dataset.select_columns(columns)
        if "Json(" not in repr(chosen.features):
            tables = chosen.with_format("arrow")
            return lambda first, end: batch_rows(tables[first:end], first, path, self.largest)
        # A Json feature is stored as encoded strings, which only the decoding of datasets turns back.
        decoded = chosen.with_format(None)
        return lambda first, end: enumerate((decoded[row] for row in range(first, end)), start=first)
