"""Answers that grow while they are read: server-sent events, for `fetch` and for programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from ghoststore.errors import BusyError, GhostStoreError
from ghoststore.server.guard import Application, Receive, Scope, Send
from ghoststore.server.problems import description
from ghoststore.shown import json_text

MOST_STREAMS = 16
"""Streams at once: each holds a connection, and the sums of a run."""
LOOKS = 0.1
"""Seconds between two looks whether the server ends."""
Event = tuple[str, dict[str, Any]]
"""Its name and its data."""


class Streams:
    """The streams of a server. ``ended`` is set when it ends: they end, too."""

    def __init__(self, ended: threading.Event) -> None:
        self.ended = ended
        self._open = 0

    def response(self, events: AsyncIterator[Event]) -> Application:
        """A response of ``events``, closed when its reader goes. BusyError if too many are open."""
        if self._open >= MOST_STREAMS:
            raise BusyError(f"{self._open} streams are open already: close a page that watches a run")
        answer = StreamingResponse(self._written(events), media_type="text/event-stream; charset=utf-8")

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            self._open += 1  # as soon as it was checked: nothing else runs in between
            try:
                await answer(scope, receive, send)
            finally:
                self._open -= 1

        return counted

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the server ends."""
        for _ in range(max(1, round(seconds / LOOKS))):
            if self.ended.is_set():
                return
            await asyncio.sleep(LOOKS)

    async def _written(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        try:
            async for name, data in events:
                yield f"event: {name}\ndata: {json_text(data)}\n\n".encode()
        except GhostStoreError as error:  # the status has gone out already
            yield f"event: problem\ndata: {json_text(description(error))}\n\n".encode()
        finally:
            await events.aclose()  # type: ignore[attr-defined]
