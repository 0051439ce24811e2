"""Streams in memory: objects that give rows each time they are iterated over, and have no length.

A stream may say with what state it goes on behind the row that it gave last: ``state_dict()`` and
``load_state_dict()``, as `datasets.IterableDataset` has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.corpus.formats.base import KeyedRow, NumberedForm, row_place
from ghoststore.corpus.values import RowError, plain_row
from ghoststore.errors import CorpusError, GhostStoreError


@dataclass(slots=True)
class Reading:
    """The reading of a stream so far: where it stands, and where it is to go on."""

    twin: Any = None
    """A copy of the object, which is iterated over in its place: loading a state must not change what was given."""
    begun: tuple[Iterator[KeyedRow], KeyedRow] | None = None
    """Rows of which the first was given, and that row."""
    resume: tuple[int, str] | None = None
    """(number of a row, the state with which the stream goes on with that row)."""


@dataclass(frozen=True, slots=True)
class StreamForm(NumberedForm):
    """A stream of dictionaries or texts. A row's key is its number."""

    items: Any
    reading: Reading
    name: str = "stream"
    largest: int | None = None
    adds_nulls: bool = False

    @classmethod
    def of(cls, items: Any) -> StreamForm:
        """Of an object that is read from the beginning each time it is iterated over."""
        return cls(items, Reading(), adds_nulls=_is_dataset(items))

    def state(self) -> str | None:
        """JSON of the state with which the stream goes on behind the row that it gave last; None if it has none."""
        if not hasattr(self.items, "state_dict") or not hasattr(self.items, "load_state_dict"):
            return None
        try:
            return json.dumps(self.reading.twin.state_dict())
        except (TypeError, ValueError):  # objects in it, which no file keeps
            return None

    def first_row(self, path: Path) -> Iterator[KeyedRow]:
        """The first row. A following :meth:`rows` from the beginning does not read it again."""
        if self.reading.begun is None:
            rows = self._numbered(path, 0)
            if (first := next(rows, None)) is not None:
                self.reading.begun = rows, first
        if self.reading.begun is not None:
            yield self.reading.begun[1]

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        """See :class:`Form`. Of a row that has a state to go on with, what comes before is not read."""
        begun, self.reading.begun = self.reading.begun, None
        if begun is not None and start == 0:
            yield begun[1]
            yield from begun[0]
        else:
            yield from self._numbered(path, start)

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        raise CorpusError(f"{path}: a stream, whose rows are read once, in order")

    def count(self, path: Path) -> int:
        raise CorpusError(f"{path}: a stream, of which nobody knows how many rows it has")

    def _numbered(self, path: Path, first: int) -> Iterator[KeyedRow]:
        """(number, row) from ``first`` on. CorpusError where the stream cannot be read on, as by an error of the
        network.
        """
        import pyarrow

        self.reading.twin, number = _twin(self.items), 0
        if self.reading.resume is not None and self.reading.resume[0] == first:
            number = first
            self.reading.twin.load_state_dict(json.loads(self.reading.resume[1]))
        try:
            for item in self.reading.twin:
                if number >= first:
                    yield number, _row_of(item, path, number)
                number += 1
        except GhostStoreError:
            raise
        except (OSError, ValueError, EOFError, pyarrow.ArrowException) as error:
            raise CorpusError(f"{row_place(path, number)}: a stream that cannot be read on: {error}") from error


def _twin(items: Any) -> Any:
    """A copy of an object with a state, which may be iterated over and be given states without a change to ``items``.

    Datasets keep their state in attributes of their own, and `copy` has a copy of one share them. Of other objects all
    is copied: one may hold another, which has the state. One that cannot be copied has a copy of its attributes.
    """
    if not hasattr(items, "state_dict") or not hasattr(items, "__dict__"):
        return items
    if not _is_dataset(items):
        with suppress(TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError):
            return deepcopy(items)
    twin = object.__new__(type(items))
    twin.__dict__.update(vars(items))
    return twin


def _is_dataset(items: Any) -> bool:
    return type(items).__module__.startswith("datasets.")


def _row_of(item: object, path: Path, number: int) -> dict[str, object]:
    try:
        return plain_row(item)
    except RowError as error:
        raise CorpusError(f"{row_place(path, number)}: {error}") from None
