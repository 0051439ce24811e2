"""``ghoststore verify`` of a served store, with its progress, until its reader goes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from ghoststore.errors import BusyError
from ghoststore.progress import Task
from ghoststore.server.streams import LOOKS, Event, Streams
from ghoststore.settings.serve import ServeOptions
from ghoststore.store.verify import verify


class StoppedError(Exception):
    """Nobody reads the result any more."""


class Checks:
    """Verifications of one store: one at a time, because they read every byte."""

    def __init__(self, options: ServeOptions, streams: Streams) -> None:
        self._options, self._streams = options, streams
        self._busy = False

    def events(self, part: str | None, run: str | None) -> AsyncIterator[Event]:
        """``progress`` of each part and run, then the ``report`` of ``ghoststore verify --json``.

        BusyError while another one runs.
        """
        self._refuse_second()
        return self._events(part, run)

    def _refuse_second(self) -> None:
        if self._busy:
            raise BusyError("this store is being verified already: wait for that, or stop it")

    async def _events(self, part: str | None, run: str | None) -> AsyncIterator[Event]:
        self._refuse_second()  # now that it begins
        self._busy = True
        listener = Listener(self._streams.ended)
        work = asyncio.create_task(
            asyncio.to_thread(verify, store=self._options.store, part=part, run=run, progress=listener)
        )
        try:
            told: dict[str, Any] | None = None
            while not work.done():
                await asyncio.wait([work], timeout=LOOKS)
                if listener.state is not None and listener.state != told:
                    told = listener.state
                    yield "progress", told
            yield "report", work.result().to_json()
        except StoppedError:
            return
        finally:
            listener.stopped.set()
            work.add_done_callback(self._over)

    def _over(self, work: asyncio.Task[Any]) -> None:
        self._busy = False
        if not work.cancelled():
            work.exception()  # looked at, so that asyncio does not say that nobody did


class Listener:
    """A listener of progress that holds where it stands, and ends the work when it is stopped or the server ends."""

    def __init__(self, ended: threading.Event) -> None:
        self.state: dict[str, Any] | None = None
        self.stopped = threading.Event()
        self._ended = ended

    def check(self) -> None:
        if self.stopped.is_set() or self._ended.is_set():
            raise StoppedError

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        self.check()
        return _Task(self, description, total, done, unit)

    def note(self, message: str) -> None:
        self.check()


class _Task:
    def __init__(self, listener: Listener, description: str, total: int | None, done: int, unit: str) -> None:
        self._listener, self._about = listener, {"what": description, "total": total, "unit": unit}
        self._done = done
        self.advance(0)

    def advance(self, rows: int, tokens: int = 0) -> None:
        self._listener.check()
        self._done += rows
        self._listener.state = {**self._about, "done": self._done}

    def expect(self, seconds: float, besides: str) -> None:
        self._listener.check()

    def say(self, text: str) -> None:
        self._listener.check()

    def close(self) -> None:
        pass
