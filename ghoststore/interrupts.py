"""Ctrl-C and SIGTERM: how work ends early, and with which exit code."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 1.0
"""Seconds within which a second signal counts as the first: a terminal and a launcher (torchrun) may both send it."""
WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    ``message`` says what is left of the work. None means that it is still to be said, "" that there is nothing to say.
    """

    def __init__(self, number: int, message: str | None = None) -> None:
        super().__init__(*([] if message is None else [message]))
        self.number = number
        self.message = message

    @property
    def exit_code(self) -> int:
        """The exit code that a shell shows for a process that a signal ended."""
        return 128 + self.number


def word(number: int) -> str:
    """The first word of a sentence on what a signal did."""
    return WORDS.get(signal.Signals(number), "Interrupted")


@contextmanager
def terminating() -> Iterator[None]:
    """Make SIGTERM raise :class:`Interrupted`, as Ctrl-C raises KeyboardInterrupt, so that open files are closed.

    It has no effect outside the main thread, where Python does not allow it.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class Stopping:
    """Within this block the first Ctrl-C or SIGTERM is only recorded in :attr:`number`.

    A second one, more than a second later, raises :class:`Interrupted`. Ignored signals stay ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0 if none did."""
        self._since = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
        elif now - self._since > SAME:
            raise Interrupted(number)
