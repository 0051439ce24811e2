"""Standard output and standard error as commands write to them.

What stdout refuses is one sentence and exit code 6; a reader that went away (``| head``) ends the command quietly;
what stderr refuses is dropped, for progress must never end the work. Characters that an encoding lacks are written as
escapes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from click.exceptions import Exit

from ghoststore.cli.events import EventLog
from ghoststore.errors import StorageError, reason_of

READER_GONE = 141
"""Exit status where the reader of stdout has gone: that of a process ended by SIGPIPE, as shells show it."""


class _Stream:
    """A stream of text, with writing to it in our hands."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _abandon(self) -> None:
        """Let nothing that is still held be refused when Python ends."""
        with suppress(OSError, ValueError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self._stream.fileno())
            os.close(handle)


class Stdout(_Stream):
    """Raises StorageError for what is refused, click's Exit where the reader has gone; from then on, always."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._refusal: Exception | None = None

    def write(self, text: str) -> int:
        if text == "":  # click asks in this way whether a stream takes text; a full device refuses even that
            return 0
        with self._refusals():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._refusals():
            self._stream.flush()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        if self._refusal is not None:
            raise self._refusal
        try:
            yield
        except BrokenPipeError:
            self._refusal = Exit(READER_GONE)
        except OSError as error:
            self._refusal = StorageError(f"cannot write to standard output: {reason_of(error)}")
        if self._refusal is not None:
            self._abandon()
            raise self._refusal


class Stderr(_Stream):
    """Drops what is refused."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._abandon()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._abandon()


class EventStderr(_Stream):
    """Turns each line that a library writes to stderr into an event."""

    def __init__(self, stream: TextIO, log: EventLog) -> None:
        super().__init__(stream)
        self._log, self._begun = log, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._say(line)
        return len(text)

    def flush(self) -> None:
        """A line is an event once it is whole."""

    def finish(self) -> None:
        """Say what has no line end."""
        self._say(self._begun)
        self._begun = ""

    def _say(self, line: str) -> None:
        if line.strip():
            self._log.say("stderr", message=line)


@contextmanager
def guarded() -> Iterator[None]:
    """Standard streams as this module says, for as long as a command runs."""
    _fill_closed()
    before = sys.stdout, sys.stderr
    ways = [(stream, stream.errors) for stream in before if hasattr(stream, "reconfigure")]
    for stream, _ in ways:
        stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast("TextIO", Stdout(before[0])), cast("TextIO", Stderr(before[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream, errors in ways:
            with suppress(OSError, ValueError):  # it flushes
                stream.reconfigure(errors=errors)


def _fill_closed() -> None:
    """Give every standard handle that is closed a file, so that no file of ours gets its number.

    Nothing can be read from it, and writing to stdout fails as on a closed one.
    """
    for handle, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free: this one
    # Python made none where the handle was closed.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
