"""The rows of a part that are exported, with their texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ghoststore.progress import Progress
from ghoststore.settings.shared import Data
from ghoststore.store import Part
from ghoststore.store.manage.exported import OfPart, Rows
from query.common.texts import texts_of

TEXTS_AT_ONCE = 8192
"""Texts in memory. A compressed corpus is read from its beginning for so many."""


class _OnceEach:
    """Progress that passes each note once, however many pieces of the work have it."""

    def __init__(self, progress: Progress) -> None:
        self._noted: set[str] = set()
        self._progress = progress
        self.task = progress.task

    def note(self, message: str) -> None:
        if message not in self._noted:
            self._noted.add(message)
            self._progress.note(message)


class WithTexts:
    """``source`` with the column ``text``: None where the corpus is gone or the sample has changed, with a note."""

    def __init__(self, source: OfPart, part: Part, progress: Progress, data: Data | None) -> None:
        self._source, self._part, self._data = source, part, data
        self._progress = _OnceEach(progress)
        self.stored, self.encoding, self.groups = source.stored, source.encoding, source.groups
        self.name, self.storage = source.name, source.storage
        names = list(source.fields)
        names.insert(names.index("id") + 1, "text")
        self.fields = {name: source.fields.get(name, "string") for name in names}

    @property
    def rows(self) -> int:
        """Their number."""
        return self._source.rows

    def pieces(self) -> Iterator[Rows]:
        """All rows, some at a time."""
        rows = self._part.row_numbers[self._source.chosen]
        texts: list[str | None] = []
        done = 0
        for piece in self._source.pieces():
            count = len(piece.vectors)
            while len(texts) < count:
                first = done + len(texts)
                more = rows[first : first + TEXTS_AT_ONCE].tolist()
                texts += texts_of(self._part, more, self._progress, self._data)
            of_piece: Any = np.empty(count, dtype=object)
            of_piece[:] = texts[:count]
            texts, done = texts[count:], done + count
            columns = {**piece.fields, "text": of_piece}
            yield Rows(piece.vectors, piece.scale, {name: columns[name] for name in self.fields})
