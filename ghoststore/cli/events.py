"""The events of ``--log-json``: one JSON object a line on stderr. ``docs/output.md`` describes them."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

FLAG = "--log-json"
INTERVAL = 1.0
"""Least seconds between two progress events of a task."""
SINGLE = (bool, int, float, str, type(None))
LONGEST = 1000
"""Longer texts are left out of the event of a result, which is on stdout as a whole."""


class EventLog:
    """Writes events to ``stream``. It is a listener of progress, too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._tasks = 0
        self._noted: set[str] = set()
        rank = os.environ.get("RANK", "")
        self._shared = {"rank": int(rank)} if rank.isdigit() else {}

    def say(self, event: str, **fields: Any) -> None:
        """Write one event. It is pure ASCII, so that it is valid in every locale."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"event": event, "time": now, **self._shared, **fields}) + "\n"
        with self._lock:
            self._stream.write(line)
            self._stream.flush()

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> EventTask:
        """Begin a task. See :class:`ghoststore.progress.Progress`."""
        self._tasks += 1
        return EventTask(self, self._tasks, {"description": description, "unit": unit, "total": total}, done)

    def note(self, message: str) -> None:
        """Write a note, once: a command may open one val set several times."""
        from ghoststore.cli.options import renderer

        message = renderer()(message)
        if message not in self._noted:
            self._noted.add(message)
            self.say("note", message=message)

    def result(self, value: dict[str, Any], event: str) -> None:
        """Write the result of a command: the numbers, words and truth values at the top of its ``--json`` document."""
        short = (entry for entry in value.items() if not isinstance(entry[1], str) or len(entry[1]) < LONGEST)
        self.say(event, result={name: entry for name, entry in short if isinstance(entry, SINGLE)})

    def end(self, exit_code: int) -> None:
        """Write that the command has ended."""
        self.say("end", exit_code=exit_code, seconds=round(time.monotonic() - self._start, 3))


class EventTask:
    """A task. Its progress is an event at most once a second."""

    def __init__(self, log: EventLog, number: int, about: dict[str, Any], done: int) -> None:
        self._log, self._number, self._about = log, number, about
        self._done, self._first, self._tokens, self._words = done, done, 0, ""
        self._start = self._last_event = time.monotonic()
        self._closed = False
        log.say("task", task=number, **about, done=done)

    def advance(self, rows: int, tokens: int = 0) -> None:
        self._done += rows
        self._tokens += tokens
        if time.monotonic() - self._last_event >= INTERVAL:
            self._last_event = time.monotonic()
            self._write("progress")

    def expect(self, seconds: float, besides: str) -> None:
        about = {**self._about, "done": self._done}
        self._log.say("estimate", task=self._number, **about, seconds=round(seconds, 3), besides=besides)

    def say(self, text: str) -> None:
        self._words = text

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._write("task_end")

    def _write(self, event: str) -> None:
        seconds = time.monotonic() - self._start
        self._log.say(
            event,
            task=self._number,
            **self._about,
            done=self._done,
            tokens=self._tokens,
            words=self._words,
            seconds=round(seconds, 3),
            rate=round((self._done - self._first) / seconds, 3) if seconds else None,
        )


_current: EventLog | None = None


def current() -> EventLog | None:
    """The log of the command that runs; None without ``--log-json``."""
    return _current


@contextmanager
def logging_to(stream: TextIO, arguments: Sequence[str], version: str) -> Iterator[EventLog]:
    """Log the command of ``arguments`` to ``stream``. Python's warnings are events, too."""
    global _current
    log = _current = EventLog(stream)
    log.say("start", arguments=list(arguments), version=version, process=os.getpid())

    def warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        log.say("warning", type=category.__name__, message=str(message), file=filename, line=lineno)

    original, warnings.showwarning = warnings.showwarning, warn  # type: ignore[assignment]
    try:
        yield log
    finally:
        warnings.showwarning = original
        _current = None
