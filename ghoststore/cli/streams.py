"""Standard output and standard error of a command.

If stdout refuses a text, the command ends with a sentence and exit code 6; if its reader has gone (``| head``), it ends
quietly. What stderr refuses is dropped: progress must never end the work. Characters that an encoding lacks are written
as escapes.
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
"""Exit code if the reader of stdout has gone: what shells show for a process that SIGPIPE ended."""


class _Stream:
    """Wraps a stream of text; subclasses control what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _abandon(self) -> None:
        """Send what is still buffered to the null device, so that Python raises no error when it ends."""
        with suppress(OSError, ValueError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self._stream.fileno())
            os.close(handle)


class Stdout(_Stream):
    """Raises StorageError if a write is refused, click's Exit if the reader has gone. Later writes raise the same."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._refusal: Exception | None = None

    def write(self, text: str) -> int:
        if text == "":  # click tests a stream with an empty text, and a full device refuses even that
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
    """Drops what the stream refuses."""

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
        self._log, self._unfinished = log, ""

    def write(self, text: str) -> int:
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._say(line)
        return len(text)

    def flush(self) -> None:
        """Do nothing: a line becomes an event when it is complete."""

    def finish(self) -> None:
        """Write the last line, if it has no line end."""
        self._say(self._unfinished)
        self._unfinished = ""

    def _say(self, line: str) -> None:
        if line.strip():
            self._log.say("stderr", message=line)


@contextmanager
def guarded() -> Iterator[None]:
    """Replace the standard streams by those of this module while a command runs."""
    _fill_closed()
    originals = sys.stdout, sys.stderr
    error_handlers = [(stream, stream.errors) for stream in originals if hasattr(stream, "reconfigure")]
    for stream, _ in error_handlers:
        stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = cast("TextIO", Stdout(originals[0])), cast("TextIO", Stderr(originals[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = originals
        for stream, errors in error_handlers:
            with suppress(OSError, ValueError):  # reconfigure flushes, which may fail
                stream.reconfigure(errors=errors)


def _fill_closed() -> None:
    """Open the null device for every closed standard handle, so that no file of ours gets its number.

    Nothing can be read from it, and writing to stdout fails as it does on a closed handle.
    """
    for handle, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, flags)  # the system gives the lowest free number: this one
    # Python makes no stream for a closed handle.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
