"""Workers that build a part side by side: who gets which spans, and what becomes of those of a worker that dies.

How they are started and spoken to is another's: processes of this machine (:mod:`indexer.build.workers`) or actors of a
Ray cluster (:mod:`indexer.build.on_ray`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ghoststore.errors import GhostStoreError, WorkerError
from ghoststore.progress import Progress, Task
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.option import parameters_of
from ghoststore.store import Store
from ghoststore.store.info import describe
from indexer.build.named_part import existing_part, part_name
from indexer.build.report import BUILDING, BuildReport

PIECES = 8
"""Lists of spans that a worker gets at least, one after the other, if all are equally fast. The last are shorter, so
that all end at about the same time.
"""
DEATHS = 5
"""Workers that may die in each place, one after the other, without a span being committed in between."""
LEFT_OUT = {"progress", "workers", "devices", "worker", "engine", "ray_address", "num_gpus"}
"""Parameters of a build that are not those of its workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What a worker says: a bar of progress with its description and total, rows and tokens for it, or a note."""

    task: int | None = None
    begins: tuple[str, int | None, int, str] | None = None
    rows: int = 0
    tokens: int = 0
    ends: bool = False
    words: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Said by a worker when its model is loaded and the part is there."""

    report: BuildReport
    learning: float
    """Seconds that it learned the projection; 0 if another did."""


class Done:
    """Said by a worker when the spans of a list, the first that it has, are committed."""


@dataclass(frozen=True, slots=True)
class Death:
    """Said of a worker that has ended."""

    how: str
    again: bool = True
    """Whether another may have more luck: it was killed, or its machine went."""


class Hand(Protocol):
    """One worker, as the crew sees it."""

    number: int
    """Its place, from 1."""

    def order(self, spans: Sequence[int] | None) -> None:
        """Have it build ``spans`` after those that it has; None: nothing is left, and it may go."""

    def end(self) -> None:
        """End it, and wait until it has ended."""


class Means(Protocol):
    """How workers are started and heard."""

    ahead: int
    """Lists of spans that a worker may have at a time: with two it reads the second while it ends the first."""

    def start(self, number: int, keywords: Mapping[str, Any]) -> Hand:
        """Start the worker ``number`` of a build with ``keywords``."""

    def hear(self, hands: Sequence[Hand]) -> Iterator[tuple[Any, Any]]:
        """(worker, message) of some of ``hands``, after waiting for the first: an Event, Ready, Done, a
        GhostStoreError, or a Death.
        """


class _Place:
    """A worker, what it is at, and what it has told of that."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand
        self.given: set[int] = set()
        """All spans that it ever got."""
        self.lists = 0
        """How many lists of them it has not said to be done."""
        self.rows = 0
        """Rows of them that it has reported."""
        self.leaving = False
        """Whether it was told that nothing is left to do."""
        self.bars: dict[int, Task] = {}
        self.built: set[int] = set()
        """Its tasks whose rows are those of spans: it may be at the corpus still when others build."""

    def end(self) -> None:
        self.hand.end()
        for bar in self.bars.values():
            bar.close()


def keywords_of(options: BuildOptions) -> dict[str, Any]:
    """The keywords that make ``options`` again, without what belongs to this process."""
    names = [parameter.name for parameter in parameters_of(BuildOptions) if parameter.name not in LEFT_OUT]
    return {name: getattr(options, name) for name in names}


def build_by(means: Means, count: int, options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` by ``count`` workers. One that dies is replaced.

    Raises the errors of ``ghoststore.build`` of the first worker that has one, and WorkerError if they die one after
    the other without a span being committed.
    """
    started = time.perf_counter()
    existing = existing_part(options.store, part_name(options), progress)
    before = 0 if existing is None else existing.rows
    crew = _Crew(means, count, options, progress)
    try:
        report = crew.run()
    finally:
        crew.end()
    part = Store.open(options.store).part(report.part)
    built, now = describe(part), time.perf_counter()
    return replace(
        report,
        tokens=built.tokens,
        resumed_rows=before,
        rows_built=part.rows - before,
        statuses=built.statuses,
        # Waiting for the corpus and writing are not told: they are of workers that work at the same time.
        seconds={"total": now - started, "learning": crew.learning, "compute": now - crew.planned},
    )


class _Crew:
    """The workers of a build, and the spans that none has begun."""

    def __init__(self, means: Means, count: int, options: BuildOptions, progress: Progress) -> None:
        self._means, self._count, self._options, self._progress = means, count, options, progress
        self._left: deque[int] | None = None
        """Spans that nobody builds yet; None until a worker has told which there are."""
        self._length = 1
        """How many of them a worker gets at once."""
        self._places: dict[int, _Place] = {}
        self._shown: _Place | None = None
        """The worker whose bars are shown: the one that begins the part."""
        self._task: Task | None = None
        self._report: BuildReport | None = None
        self._deaths = 0
        self.learning = 0.0
        """Seconds that one of them learned the projection."""
        self.planned = time.perf_counter()
        """When the first span was given away."""

    def run(self) -> BuildReport:
        for number in range(1, self._count + 1):
            self._start(number)
        while self._places:
            hands = [place.hand for place in self._places.values()]
            for hand, message in self._means.hear(hands):
                place = self._places.get(hand.number)
                if place is None or place.hand is not hand:
                    continue  # it has been replaced
                if isinstance(message, Death):
                    self._replace(place, message)
                else:
                    self._hear(place, message)
        assert self._report is not None
        return self._report

    def end(self) -> None:
        for place in self._places.values():
            place.end()
        if self._task is not None:
            self._task.close()

    def _start(self, number: int) -> None:
        self._places[number] = _Place(self._means.start(number, keywords_of(self._options)))

    def _hear(self, place: _Place, message: Any) -> None:
        if isinstance(message, GhostStoreError):
            raise message
        if isinstance(message, Event):
            self._show(place, message)
        elif isinstance(message, Ready):
            if self._left is None:
                self._plan(message)
            self.learning = max(self.learning, message.learning)
            self._order(place)
        else:
            assert isinstance(message, Done)
            self._deaths = 0
            place.lists -= 1
            self._order(place)

    def _order(self, place: _Place) -> None:
        """Give its worker the next spans, or let it go. The last go to those that have none."""
        assert self._left is not None
        while self._left and (not place.lists or (place.lists < self._means.ahead and len(self._left) > self._count)):
            length = min(self._length, max(1, len(self._left) // (2 * self._count)))
            spans = [self._left.popleft() for _ in range(length)]
            place.given.update(spans)
            place.lists += 1
            place.hand.order(spans)
        if not place.lists:
            place.leaving = True
            place.hand.order(None)

    def _plan(self, ready: Ready) -> None:
        self._report, self.planned = ready.report, time.perf_counter()
        part = Store.open(self._options.store).damaged_part(ready.report.part)
        missing = sorted(set(range(part.layout.spans)) - set(part.spans))
        self._left, self._length = deque(missing), max(1, len(missing) // (PIECES * self._count))
        if missing:
            self._task = self._progress.task(BUILDING, part.layout.rows, done=part.rows)

    def _replace(self, place: _Place, death: Death) -> None:
        """After its worker has ended: if it was not to, start another, for what it has not committed."""
        del self._places[place.hand.number]
        place.end()
        if place.leaving:
            return
        if self._shown is place:
            self._shown = None
        if not death.again:
            raise WorkerError(
                f"{death.how}; what it said is above. What was committed is intact: the same command resumes"
            )
        self._deaths += 1
        if self._deaths > DEATHS * self._count:
            raise WorkerError(
                f"{death.how}, the last of {self._deaths} that died without a span being committed in between. What "
                "was committed is intact: the same command resumes. If memory ran out, give fewer `workers`, or a "
                "smaller `batch_tokens`"
            )
        self._progress.note(f"{death.how}: another takes its place")
        if self._left is not None:
            assert self._report is not None
            part = Store.open(self._options.store).damaged_part(self._report.part)
            done = place.given & set(part.spans)
            if done:
                self._deaths = 0
            self._left.extendleft(sorted(place.given - done, reverse=True))
            if self._task is not None:  # what it had begun and not committed is built again
                self._task.advance(sum(stop - start for start, stop in map(part.layout.span_of, done)) - place.rows)
        self._start(place.hand.number)

    def _show(self, place: _Place, event: Event) -> None:
        if event.words is not None and event.task is None:
            self._progress.note(event.words)
            return
        assert event.task is not None
        if event.begins is not None and event.begins[0] == BUILDING:
            place.built.add(event.task)
        if self._left is not None:
            if event.rows and event.task in place.built and self._task is not None:
                place.rows += event.rows
                self._task.advance(event.rows, event.tokens)
        elif event.begins is not None and (self._shown is None or self._shown is place):
            self._shown = place
            place.bars[event.task] = self._progress.task(*event.begins)
        if (bar := place.bars.get(event.task)) is None:
            return
        if event.ends:
            bar.close()
            del place.bars[event.task]
        elif self._left is None and event.rows:
            bar.advance(event.rows, event.tokens)
        elif event.words is not None:
            bar.say(event.words)
