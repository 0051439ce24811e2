"""The training runs of a store, as they are now and as they grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ghoststore.errors import GhostStoreError
from ghoststore.server.command_line import run_commands
from ghoststore.server.streams import Event, Streams
from ghoststore.settings.serve import ServeOptions
from ghoststore.store import Run, Store
from ghoststore.store.info import describe_run
from query.training_scores.frame import Frame
from query.training_scores.steps import end_of
from query.training_scores.watch import STEPS_A_FRAME, Watcher, writer_fields

SECONDS = 1.0
"""Between two looks at a run that is watched."""
QUIET = 10
"""Looks without news after which a frame goes out all the same: it says how long ago the last commit was, and that
somebody is still there.
"""
MOST_TEXT = 1000
"""Characters of a text of a frame: its sample has the whole of it."""
MOVING = ("commit_age", "silent", "writer", "seconds_left")
"""Fields of a frame that change without a commit."""


def runs(options: ServeOptions) -> dict[str, Any]:
    """Every run as ``ghoststore info --json`` has it, and its state."""
    store = Store.open(options.store)
    found = [store.run(name) for name in store.run_names()]
    return {"store": str(options.store), "runs": [_entry(run) for run in found]}


def _entry(run: Run) -> dict[str, Any]:
    fields = writer_fields(run, finished=end_of(run) == run.layout.steps)
    return {**asdict(describe_run(run)), "state": fields["state"], "commit_age": fields["commit_age"]}


class WatchedRun:
    """A run of the store that is looked at again and again. UsageError if there is no such run."""

    def __init__(self, options: ServeOptions, name: str) -> None:
        store = Store.open(options.store)
        run = store.run(name)
        self._watcher = Watcher(options.store, name, data=options.data, spread=True)
        self._beside = {
            "part": part_of(store, run),
            "batch": run.layout.batch * run.layout.ranks,
            "commands": run_commands(options, name),
        }

    def look(self, most_steps: int | None = None) -> tuple[Frame, dict[str, Any]]:
        """(frame, its JSON with what the page says beside it), of at most ``most_steps`` new steps (None: all)."""
        frame = self._watcher.look(most_steps)
        document = frame.to_json()
        for sample in (*document["best"], *document["worst"]):
            if sample["text"] is not None:
                sample["text"] = sample["text"][:MOST_TEXT]
        return frame, {**document, "explorer": self._beside}


def part_of(store: Store, run: Run) -> str | None:
    """A part of the very corpus that ``run`` was trained on, whose samples have the same places; None without one."""
    wanted = run.manifest["corpus"].get("fingerprint")
    for name in store.part_names() if wanted is not None else ():
        with suppress(GhostStoreError):  # a damaged part, of which the page of the store speaks, is no reason
            if store.part(name).manifest["corpus"].get("fingerprint") == wanted:
                return name
    return None


async def frames(watched: WatchedRun, streams: Streams) -> AsyncIterator[Event]:
    """``frame`` whenever steps were committed, and ``end`` when the last one was."""
    last: dict[str, Any] | None = None
    quiet = 0
    while not streams.ended.is_set():
        frame, document = await asyncio.to_thread(watched.look, STEPS_A_FRAME)
        still = {name: value for name, value in document.items() if name not in MOVING}
        quiet += 1
        if still != last or quiet >= QUIET:
            yield "frame", document
            last, quiet = still, 0
        if frame.finished and not frame.unread:
            yield "end", {}
            return
        if not frame.unread:
            await streams.pause(SECONDS)
