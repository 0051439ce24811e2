"""The listener of progress of a worker: it sends what happens to whoever shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ghoststore.progress import Task
from indexer.build.crew import Event


class Sent:
    """Calls ``send`` with an :class:`Event` for each change, from any thread, one at a time."""

    def __init__(self, send: Callable[[Any], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._tasks = 0

    def send(self, message: Any) -> None:
        """Send any message, between those of progress."""
        with self._lock:
            self._send(message)

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        with self._lock:
            self._tasks += 1
            number = self._tasks
        self.send(Event(task=number, begins=(description, total, done, unit)))
        return _SentTask(self, number)

    def note(self, message: str) -> None:
        self.send(Event(words=message))


class _SentTask:
    def __init__(self, sent: Sent, number: int) -> None:
        self._sent, self._number = sent, number

    def advance(self, rows: int, tokens: int = 0) -> None:
        self._sent.send(Event(task=self._number, rows=rows, tokens=tokens))

    def expect(self, seconds: float, besides: str) -> None:
        pass

    def say(self, text: str) -> None:
        self._sent.send(Event(task=self._number, words=text))

    def close(self) -> None:
        self._sent.send(Event(task=self._number, ends=True))
