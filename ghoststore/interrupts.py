"""Ctrl-C and SIGTERM: how work ends early, and with which exit status."""

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
"""Seconds within which a second signal is the first: a terminal and a launcher (torchrun) both send it."""
WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. ``message`` says what is kept of it; None: nobody has said yet, and "" says nothing."""

    def __init__(self, number: int, message: str | None = None) -> None:
        super().__init__(*([] if message is None else [message]))
        self.number = number
        self.message = message

    @property
    def exit_code(self) -> int:
        """As a shell gives it for a process that a signal ended."""
        return 128 + self.number


def word(number: int) -> str:
    """What a signal did, as the first word of a sentence."""
    return WORDS.get(signal.Signals(number), "Interrupted")


@contextmanager
def terminating() -> Iterator[None]:
    """Have SIGTERM raise :class:`Interrupted`, as Ctrl-C raises KeyboardInterrupt, so that what is open is left in
    order. Only in the main thread, where Python allows it.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Stopping:
    """While it is entered, the first Ctrl-C or SIGTERM is only noted: :attr:`number`. A second one, more than a second
    later, does what it did before. Signals that are ignored stay so.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0 while none has."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
        elif now - self._since > SAME:
            raise Interrupted(number)
