"""Streams of rows: with a state and without, such as break off, and such as count the rows that live."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.store import Part, Store
from tests.conftest import sample_rows

if TYPE_CHECKING:
    from tests.conftest import Lab

PLAIN = ProjectionConfig(precondition="none", rank_total=64)
SPAN = 4
ROWS = sample_rows(42, seed=3)


def build(lab: Lab, store: Path, data: Any, **settings: Any) -> ghoststore.BuildReport:
    given = {"checkpoint": lab.checkpoint, "name": "part", "span_rows": SPAN, "device": "cpu", "projection": PLAIN}
    return ghoststore.build(store=store, data=data, **(given | settings))


def part_of(store: Path) -> Part:
    return Store.open(store).part("part")


class Rows:
    """Rows that may be iterated over again, and nothing more. ``read`` has the number of every row that was read."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows, self.read = list(rows), list[int]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows):
            self.read.append(number)
            yield row


class StatefulRows(Rows):
    """Rows that say where they stand."""

    at = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> StatefulRows:
        twin = type(self)(self.rows)
        twin.at, twin.read = self.at, self.read  # what copies of it read is counted with it
        return twin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.rows):
            self.read.append(self.at)
            self.at += 1
            yield self.rows[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Broken(Rows):
    """It breaks off behind 30 rows, and says nothing of where it stands."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(super().__iter__()):
            if number == 30:
                raise Cut
            yield row


class Cut(Exception):
    """The stream breaks off."""


class Breaking:
    """``stream``, which breaks off behind ``at`` rows."""

    def __init__(self, stream: Any, at: int) -> None:
        self.stream, self.at = stream, at

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.stream):
            if number == self.at:
                raise Cut
            yield row

    def state_dict(self) -> Any:
        return self.stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.stream.load_state_dict(state)


def cut(lab: Lab, store: Path, stream: Any, at: int, **settings: Any) -> None:
    """A build that breaks off where ``at`` rows were read."""
    with pytest.raises(Cut):
        build(lab, store, Breaking(stream, at), **settings)


class Living(Rows):
    """Rows that are made as they are read. ``most`` is the largest number of them that lived at once."""

    def __init__(self, count: int) -> None:
        super().__init__(())
        self.count, self.most = count, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        living: weakref.WeakSet[Any] = weakref.WeakSet()
        for number in range(self.count):
            text = Text(f"{ROWS[number % 42]['text']} {number}")
            living.add(text)
            self.most = max(self.most, len(living))
            yield {"id": str(number), "text": text}


class Text(str):
    """A text that can be counted while it lives."""

    __hash__ = object.__hash__  # equal texts are two
