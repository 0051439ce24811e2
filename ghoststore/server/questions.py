"""The questions of the explorer: one after the other, by a session that keeps the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ghoststore.errors import BusyError, UsageError
from ghoststore.progress import Task
from ghoststore.server.command_line import command_line
from ghoststore.settings.serve import ServeOptions
from ghoststore.shown import json_text
from ghoststore.store import Store
from query.answer.query import query
from query.answer.session import OF_SESSION, Session
from query.answer.session import open as open_session
from query.ask.unit import metric_words, unit_words

MOST_WAITING = 8
"""Questions that wait or are worked on."""
MOST_ROWS = 1000
"""Rows of a ranking."""
ROWS = ("val_set", "minus")
"""Of a question: lists of texts, or of rows as in a jsonl file."""
RANKING = (
    *ROWS,
    "part",
    "group_field",
    "combine",
    "metric",
    "where",
    "layers",
    "exclude_layers",
    "lexical",
    "phrase",
    "max_samples",
)
"""Options that say what rows are ranked by: for an answer, or to choose some of them."""
OFFERED = (*RANKING, "near", "top_k", "bottom_k", "each", "tokens", "histogram")
"""Options of ``ghoststore.query`` that a question may have: none of them writes a file, or reads one."""


class WithdrawnError(Exception):
    """Nobody waits for the answer any more."""


class Questions:
    """Answers questions about the parts of one store. All methods but :meth:`end` belong to the event loop's thread."""

    def __init__(self, options: ServeOptions, beside: Questions | None = None) -> None:
        """``beside`` are those of another store of the same server: of all together one is answered at a time."""
        self._options = options
        self._turn: asyncio.Lock = asyncio.Lock() if beside is None else beside._turn
        self._together: list[Questions] = [] if beside is None else beside._together
        self._together.append(self)
        self._waiting = 0
        self._ended = threading.Event()
        self._session: Session | None = None
        self._manifest: Mapping[str, Any] = {}

    async def answer(self, question: Mapping[str, Any], withdrawn: threading.Event) -> bytes:
        """The JSON of the answer: that of ``ghoststore query --json``, and what the page says beside it.

        ``withdrawn`` is set when nobody waits for it any more. Raises what ``Session.query`` raises, UsageError for a
        question that cannot be asked here, BusyError if too many others wait, WithdrawnError.
        """
        checked = check(question)
        return await self.work(lambda progress: self._answer(checked, progress), withdrawn)

    async def work(self, job: Callable[[Watched], bytes], withdrawn: threading.Event) -> bytes:
        """``job(progress)`` in a thread, when its turn has come. Raises what it raises, BusyError if too many others
        wait, WithdrawnError when ``withdrawn`` is set or the server ends.
        """

        def run() -> bytes:
            progress = Watched(self._ended, withdrawn)
            progress.check()
            return job(progress)

        if self._waiting >= MOST_WAITING:
            raise BusyError(f"{self._waiting} questions wait already: ask again when one is answered")
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(run)
        finally:
            self._waiting -= 1

    def end(self) -> None:
        """Give up what is asked, now and ever after. Any thread, and a handler of a signal, may call it."""
        self._ended.set()

    def let_go(self) -> None:
        """Let go of the model, whichever store of the server it is of: one is kept at a time."""
        for questions in self._together:
            questions.close()

    def close(self) -> None:
        """Let go of the model of this store."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _answer(self, question: dict[str, Any], progress: Watched) -> bytes:
        part = question.pop("part", None)
        if "near" in question:  # no model is needed
            of_server = {name: getattr(self._options, name) for name in ("store", "data", "device")}
            result = query(**of_server, part=part, **question, progress=progress)
        else:
            session = self._opened(part)
            result = session.query(**question, progress=progress)
        settings = result.settings
        beside = {
            "metric": metric_words(settings),
            "unit": None if settings["unit"] is None else unit_words(settings),
            "notes": progress.notes,
            "command": command_line(self._options, {"part": settings["part"], **question}),
        }
        return json_text({**result.to_json(), "explorer": beside}).encode()

    def _opened(self, name: str | None) -> Session:
        """The session of part ``name``: the one that is open, if it is of that part and the part is the same still."""
        part = Store.open(self._options.store).part(name)
        if self._session is None or self._session.name != part.name or self._manifest != part.manifest:
            self.let_go()
            own = {spec.name for spec in fields(ServeOptions)}  # a server has fewer options than a session
            given = {key: getattr(self._options, key) for key in OF_SESSION if key in own}
            self._session, self._manifest = open_session(**given, part=part.name), part.manifest
        return self._session


def check(question: Mapping[str, Any]) -> dict[str, Any]:
    """``question`` as keywords of a session. UsageError for options that are unknown, and for val sets that are no
    lists of texts or rows: a word would be a path.
    """
    given = given_of(question, "a question to the explorer", OFFERED)
    if "val_set" not in given and "near" not in given:
        raise UsageError("a question needs a `val_set`: a list of texts, or of rows; or a row to be `near`")
    for name in ("top_k", "bottom_k"):
        if isinstance(given.get(name), int) and given[name] > MOST_ROWS:
            raise UsageError(f"`{name}={given[name]}`: the explorer ranks at most {MOST_ROWS:,} rows")
    return given


def given_of(request: Mapping[str, Any], what: str, offered: Sequence[str]) -> dict[str, Any]:
    """The options of ``request`` that are given, with its val sets as rows. UsageError for keywords that are not
    ``offered``, for val sets that are no lists of texts or rows, and for several parts.
    """
    for name in request:
        if name not in offered:
            raise UsageError(f"{what} has no keyword {name!r:.80}; it has {', '.join(offered)}")
    given = {name: value for name, value in request.items() if value is not None}
    if not isinstance(given.get("part", ""), str):
        raise UsageError(f"`part` is the name of one part, not {given['part']!r:.80}")
    for name in ROWS:
        rows = given.get(name, [""])
        if not isinstance(rows, list) or not rows or not any(_all(rows, kind) for kind in (str, dict)):
            raise UsageError(f'`{name}` is a list of texts, or of rows ({{"text": …}}), not {rows!r:.80}')
        if name in given:  # as rows, texts are never looked at as if they were paths
            given[name] = [{"text": row} if isinstance(row, str) else row for row in rows]
    return given


def _all(rows: list[Any], kind: type) -> bool:
    return all(isinstance(row, kind) for row in rows)


class _WatchedTask:
    def __init__(self, progress: Watched) -> None:
        self._progress = progress

    def advance(self, rows: int, tokens: int = 0) -> None:
        self._progress.check()

    def expect(self, seconds: float, besides: str) -> None:
        self._progress.check()

    def say(self, text: str) -> None:
        self._progress.check()

    def close(self) -> None:
        pass


class Watched:
    """A listener of progress that keeps notes, and ends work that nobody waits for."""

    def __init__(self, *ends: threading.Event) -> None:
        self.notes: list[str] = []
        self._ends = ends

    def check(self) -> None:
        if any(event.is_set() for event in self._ends):
            raise WithdrawnError

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        self.check()
        return _WatchedTask(self)

    def note(self, message: str) -> None:
        self.notes.append(message)
