"""Fresh interpreters on one end of a pipe, which get orders and answer, and end the moment the other end closes: none
outlives a process that was killed.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ghoststore.errors import GhostStoreError
from ghoststore.processes import end_with

_HANG_UP = (EOFError, BrokenPipeError, ConnectionResetError)


class Ended(Exception):
    """A process has ended. Its text says how."""

    def __init__(self, pid: int, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        super().__init__(f"(process {pid}) {how}")
        self.killed = code < 0
        """Whether a signal ended it; if not, it failed, and would fail again."""


class PipedProcess:
    """``python -m module``, seen from the process that starts it. ``defaults`` are variables that the environment may
    have otherwise. What the module runs is in :func:`orders`.
    """

    def __init__(self, module: str, **defaults: str) -> None:
        self.pipe: Connection[Any, Any]
        self.pipe, theirs = Pipe()
        with theirs:
            # Its own session: an interrupt reaches the parent alone, which then hangs up.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env={
                    **defaults,
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )

    def send(self, order: Any) -> None:
        """Send an order. Nothing happens if the process has ended: :meth:`receive` says so."""
        with suppress(*_HANG_UP):
            self.pipe.send(order)

    def receive(self) -> Any:
        """What it says next. Raises :class:`Ended`."""
        try:
            return self.pipe.recv()
        except (*_HANG_UP, pickle.UnpicklingError, OSError):  # the last two if it was killed while it wrote
            with suppress(subprocess.TimeoutExpired):
                raise Ended(self.process.pid, self.process.wait(timeout=60)) from None
            raise

    def end(self) -> None:
        """End it, whatever it is at."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True, slots=True)
class _Unread:
    error: Exception


class Orders:
    """The other end: what comes from the process that started this one."""

    def __init__(self, pipe: Connection[Any, Any]) -> None:
        self._pipe = pipe
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> Any:
        """The next order, once it comes. Raises what kept it from being read, such as a class that is not here."""
        order = self._waiting.get()
        if isinstance(order, _Unread):
            raise order.error
        return order

    def wake(self) -> None:
        """Have a thread that waits for the next order get None."""
        self._waiting.put(None)

    def answer(self, value: Any) -> None:
        """Send ``value``."""
        self._pipe.send(value)

    def _listen(self) -> None:
        try:
            while True:
                self._waiting.put(self._pipe.recv())
        except _HANG_UP:
            os._exit(0)
        except Exception as error:  # noqa: BLE001 - the thread that waits for the order raises it
            self._waiting.put(_Unread(error))


@contextmanager
def orders() -> Iterator[Orders]:
    """The orders of the process that started this one as a :class:`PipedProcess`. A GhostStoreError that ends the block
    is sent to it as an answer.
    """
    coming = Orders(Connection(int(sys.argv[1])))
    end_with(int(sys.argv[2]))
    try:
        try:
            yield coming
        except GhostStoreError as error:
            coming.answer(error)
            coming.next()  # the other end hangs up
    except _HANG_UP:
        os._exit(0)
    # All ends with the process. Without this the interpreter looks through it for garbage first: a second of torch.
    gc.freeze()
