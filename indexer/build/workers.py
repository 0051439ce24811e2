"""Processes of one machine that build a part side by side.

Each is a fresh interpreter (:mod:`indexer.build.worker`) on one end of a pipe. It opens the model and the
corpus, then gets lists of spans and builds them. It ends the moment the other end closes, so that none outlives a
process that was killed. What a process that dies has not committed is built by the next.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ghoststore.errors import GhostStoreError, WorkerError
from ghoststore.machine import CORES
from ghoststore.progress import Progress, Task
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.option import parameters_of
from ghoststore.store import Store
from ghoststore.store.info import describe
from indexer.build.inputs import existing_part, part_name
from indexer.build.report import BuildReport

HANG_UP = (EOFError, BrokenPipeError, ConnectionResetError)
PIECES = 8
"""Lists of spans that a worker gets, one after the other, if all are equally fast."""
DEATHS = 5
"""Processes a worker that may die, one after the other, without a span being committed in between."""


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
    """Said by a worker when the spans that it got last are committed."""


class _Worker:
    """One process, seen from the one that started it."""

    def __init__(self, number: int, keywords: dict[str, Any], threads: int) -> None:
        self.number = number
        self.spans: Sequence[int] = ()
        """The spans it is at."""
        self.rows = 0
        """Rows of these that it has reported."""
        self.leaving = False
        """Whether it was told that nothing is left to do."""
        self.bars: dict[int, Task] = {}
        self.pipe: Connection[Any, Any]
        self.pipe, theirs = Pipe()
        with theirs:
            # Its own session: an interrupt reaches the parent alone, which then hangs up.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "indexer.build.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                env={
                    "OMP_NUM_THREADS": str(threads),
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(os.path.abspath(place) for place in sys.path),
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        self.send(keywords)

    def send(self, order: Any) -> None:
        with suppress(*HANG_UP):  # it has died: the pipe says so to whoever reads it
            self.pipe.send(order)

    def death(self) -> str:
        """How it ended."""
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"worker {self.number} (process {self.process.pid}) {how}"

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()
        for bar in self.bars.values():
            bar.close()


def keywords_of(options: BuildOptions) -> dict[str, Any]:
    """The keywords that make ``options`` again, without what belongs to this process."""
    left_out = {"progress", "workers", "devices", "worker"}
    names = [parameter.name for parameter in parameters_of(BuildOptions) if parameter.name not in left_out]
    return {name: getattr(options, name) for name in names}


def build_side_by_side(options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` by several processes of this machine. A process that dies is replaced.

    Raises the errors of ``ghoststore.build`` of the first process that has one, and WorkerError if processes die one
    after the other without a span being committed.
    """
    started = time.perf_counter()
    assert options.workers is not None
    existing = existing_part(options.store, part_name(options), progress)
    before = 0 if existing is None else existing.rows
    crew = _Crew(options, progress)
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
        # Waiting for the corpus and writing are not told: they are of processes that work at the same time.
        seconds={"total": now - started, "learning": crew.learning, "compute": now - crew.planned},
    )


class _Crew:
    """The processes of a build, and the spans that none has begun."""

    def __init__(self, options: BuildOptions, progress: Progress) -> None:
        self._options, self._progress = options, progress
        self._devices = devices_of(options)
        self._threads = max(1, CORES // (options.workers or 1))
        self._pieces: deque[Sequence[int]] | None = None
        """Spans to build; None until a worker has told which there are."""
        self._workers: dict[Any, _Worker] = {}
        self._shown: _Worker | None = None
        """The worker whose bars are shown: the one that begins the part."""
        self._task: Task | None = None
        self._report: BuildReport | None = None
        self._deaths = 0
        self.learning = 0.0
        """Seconds that one of them learned the projection."""
        self.planned = time.perf_counter()
        """When the first span was given away."""

    def run(self) -> BuildReport:
        assert self._options.workers is not None
        for number in range(1, self._options.workers + 1):
            self._start(number)
        while self._workers:
            for pipe in wait(list(self._workers)):
                worker = self._workers[pipe]
                try:
                    message = worker.pipe.recv()
                except HANG_UP:
                    self._replace(worker)
                    continue
                except (pickle.UnpicklingError, OSError):
                    self._replace(worker)  # it was killed while it wrote
                    continue
                self._hear(worker, message)
        assert self._report is not None
        return self._report

    def end(self) -> None:
        for worker in self._workers.values():
            worker.end()
        if self._task is not None:
            self._task.close()

    def _start(self, number: int) -> None:
        device = self._devices[(number - 1) % len(self._devices)]
        worker = _Worker(number, {**keywords_of(self._options), "device": device}, self._threads)
        self._workers[worker.pipe] = worker

    def _hear(self, worker: _Worker, message: Any) -> None:
        if isinstance(message, GhostStoreError):
            raise message
        if isinstance(message, Event):
            self._show(worker, message)
        elif isinstance(message, Ready):
            if self._pieces is None:
                self._plan(message)
            self.learning = max(self.learning, message.learning)
            self._order(worker)
        else:
            assert isinstance(message, Done)
            self._deaths = 0
            self._order(worker)

    def _order(self, worker: _Worker) -> None:
        """Give ``worker`` its next spans, or let it go."""
        assert self._pieces is not None
        if self._pieces:
            worker.spans, worker.rows = self._pieces.popleft(), 0
            worker.send(worker.spans)
        else:
            worker.leaving = True
            worker.send(None)

    def _plan(self, ready: Ready) -> None:
        self._report, self.planned = ready.report, time.perf_counter()
        part = Store.open(self._options.store).damaged_part(ready.report.part)
        missing = sorted(set(range(part.layout.spans)) - set(part.spans))
        length = max(1, len(missing) // (PIECES * (self._options.workers or 1)))
        self._pieces = deque(missing[at : at + length] for at in range(0, len(missing), length))
        if missing:
            self._task = self._progress.task("building", part.layout.rows, done=part.rows)

    def _replace(self, worker: _Worker) -> None:
        """After ``worker`` has ended: if it was not to, start another in its place, for what it has not committed."""
        del self._workers[worker.pipe]
        how = worker.death()
        worker.end()
        if worker.leaving:
            return
        if self._shown is worker:
            self._shown = None
        self._deaths += 1
        if self._deaths > DEATHS * (self._options.workers or 1):
            raise WorkerError(
                f"{how}, the last of {self._deaths} that died without a span being committed in between. What was "
                "committed is intact: the same command resumes. If memory ran out, give fewer `workers`, or a smaller "
                "`batch_tokens`"
            )
        self._progress.note(f"{how}: another takes its place")
        if self._pieces is not None:
            assert self._report is not None
            part = Store.open(self._options.store).damaged_part(self._report.part)
            done = [span for span in worker.spans if span in set(part.spans)]
            if done:
                self._deaths = 0
            if left := sorted(set(worker.spans) - set(done)):
                self._pieces.appendleft(left)
            if self._task is not None:  # what it had begun and not committed is built again
                self._task.advance(sum(stop - start for start, stop in map(part.layout.span_of, done)) - worker.rows)
        self._start(worker.number)

    def _show(self, worker: _Worker, event: Event) -> None:
        if event.words is not None and event.task is None:
            self._progress.note(event.words)
            return
        assert event.task is not None
        if self._pieces is not None:
            if event.rows and self._task is not None:
                worker.rows += event.rows
                self._task.advance(event.rows, event.tokens)
        elif event.begins is not None and (self._shown is None or self._shown is worker):
            self._shown = worker
            worker.bars[event.task] = self._progress.task(*event.begins)
        if (bar := worker.bars.get(event.task)) is None:
            return
        if event.ends:
            bar.close()
            del worker.bars[event.task]
        elif self._pieces is None and event.rows:
            bar.advance(event.rows, event.tokens)
        elif event.words is not None:
            bar.say(event.words)


def devices_of(options: BuildOptions) -> list[str]:
    """The devices of the workers, in turn: those given; every GPU where GPUs are asked for and none by its number."""
    if options.devices:
        return [
            f"cuda:{device}" if device.isdigit() else device for word in options.devices for device in word.split(",")
        ]
    if options.device in ("auto", "cuda") and torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [options.device]
