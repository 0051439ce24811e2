"""Progress of long work, told to whoever listens: nobody, a terminal, or a program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
ROWS_AT_ONCE = 4096
"""Rows between two words to a task: more often would take longer than the fastest work itself."""


class Task(Protocol):
    """One piece of work with a known number of rows (None: unknown)."""

    def advance(self, rows: int, tokens: int = 0) -> None:
        """``rows`` more rows are done, of ``tokens`` tokens."""

    def expect(self, seconds: float, besides: str) -> None:
        """Before it begins: what is left of it takes about so long, and ``besides`` is not counted in that."""

    def say(self, text: str) -> None:
        """A few words on how it stands, shown beside the bar: a loss, say."""

    def close(self) -> None:
        """The work has ended."""


class Progress(Protocol):
    """A listener. ``ghoststore.cli`` shows progress bars on stderr."""

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        """A piece of work begins, ``done`` of its ``total`` rows done already."""

    def note(self, message: str) -> None:
        """Something the user should know, in a line."""


class _SilentTask:
    def advance(self, rows: int, tokens: int = 0) -> None:
        pass

    def expect(self, seconds: float, besides: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Silent:
    """Tells nobody."""

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        return _SilentTask()

    def note(self, message: str) -> None:
        pass


def counted(rows: Iterable[T], task: Task) -> Iterator[T]:
    """``rows`` as they come; ``task`` advances by some thousand at a time."""
    done = 0
    for row in rows:
        yield row
        done += 1
        if done == ROWS_AT_ONCE:
            task.advance(done)
            done = 0
    task.advance(done)
