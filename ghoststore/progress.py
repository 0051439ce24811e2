"""Progress of long work, for a listener: none, a terminal, or a program."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")
ROWS_AT_ONCE = 4096
"""Rows between two updates of a task: more frequent ones would take longer than the fastest work."""
BYTES = "bytes"
"""The unit of a task that copies; people are shown MiB and GiB."""


class Task(Protocol):
    """A piece of work, with its number of rows if that is known."""

    def advance(self, rows: int, tokens: int = 0) -> None:
        """Add ``rows`` finished rows, with ``tokens`` tokens."""

    def expect(self, seconds: float, besides: str) -> None:
        """Before it begins: what is left of it takes about so long, and ``besides`` is not counted in that."""

    def say(self, text: str) -> None:
        """Show a few words beside the bar, such as a loss."""

    def close(self) -> None:
        """End the task."""


class Progress(Protocol):
    """A listener of progress. That of ``ghoststore.cli`` shows bars on stderr."""

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        """Begin a task of ``total`` rows (None: not known), of which ``done`` are finished already."""

    def note(self, message: str) -> None:
        """Show a line that the user should know."""


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
    """A listener that does nothing."""

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        return _SilentTask()

    def note(self, message: str) -> None:
        pass


class Late:
    """A task of ``total`` rows that is shown once it takes longer than ``after`` seconds; most are done before."""

    def __init__(self, progress: Progress, description: str, total: int, after: float) -> None:
        self._progress, self._description, self._total, self._after = progress, description, total, after
        self._begun, self._done = time.monotonic(), 0
        self._task: Task | None = None

    def advance(self, rows: int) -> None:
        """Add ``rows`` finished rows."""
        self._done += rows
        if self._task is not None:
            self._task.advance(rows)
        elif 0 < self._done < self._total and time.monotonic() - self._begun >= self._after:
            self._task = self._progress.task(self._description, self._total, self._done)

    def close(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.close()


def counted(rows: Iterable[T], task: Task) -> Iterator[T]:
    """Yield ``rows``, and advance ``task`` by some thousand at a time."""
    done = 0
    for row in rows:
        yield row
        done += 1
        if done == ROWS_AT_ONCE:
            task.advance(done)
            done = 0
    task.advance(done)
