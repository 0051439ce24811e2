"""Scores on their way into the store: gathered from all ranks at every save interval, written by the first.

Legend: S steps since the last save, R ranks, B samples of one rank's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import BusyError, CorruptError, StorageError, WorkerError
from ghoststore.settings.train import OnStoreError
from ghoststore.store.run.run import Run, RunWriter
from indexer.session.ranks import Ranks


class ScoreLog:
    """``log.add(step, own, shared)`` on every rank, every step; the store gets whole save intervals.

    ``run`` is the run on the rank that leads, None on the others. Training is never changed: if the store cannot be
    written, StorageError on every rank (``stop``), or one note and no more writing (``continue``).
    """

    def __init__(
        self, run: Run | None, ranks: Ranks, *, interval: int, on_error: OnStoreError, note: Callable[[str], None]
    ) -> None:
        self._ranks = ranks
        self._interval = interval
        self._on_error = on_error
        self._note = note
        self._writer = RunWriter(run) if run is not None else None
        self._failed = False
        self._stack = ExitStack()
        self._waiting: list[tuple[int, dict[str, NDArray[Any]], dict[str, Any]]] = []

    def __enter__(self) -> ScoreLog:
        writer = self._writer
        self._ranks.led(lambda: None if writer is None else self._stack.enter_context(writer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.save()
            self._guard(lambda: self._writer.flush() if self._writer is not None else None)
        self._stack.__exit__(kind, error, trace)

    def add(self, step: int, own: Mapping[str, NDArray[Any]], shared: Mapping[str, Any]) -> None:
        """One finished step (from 0): ``own`` arrays (B, …) of this rank, some of which some steps alone have, and
        ``shared`` values of the step.
        """
        if self._failed:
            return
        self._waiting.append((step, dict(own), dict(shared)))
        if (step + 1) % self._interval == 0:
            self.save()

    def save(self) -> None:
        """Gather what waits and hand it to the writer. Called by every rank alike."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        names = sorted({name for _, own, _ in waiting for name in own})  # in one order: each is a collective
        having = {name: [step for step, own, _ in waiting if name in own] for name in names}
        gathered = {
            name: self._gathered(np.stack([own[name] for _, own, _ in waiting if name in own])) for name in names
        }

        def write() -> None:
            if self._writer is None:
                return
            for step, own, shared in waiting:
                arrays = {name: gathered[name][:, having[name].index(step)] for name in own}
                self._writer.append(step, {**shared, **arrays})

        self._guard(write)

    def pending(self) -> dict[str, NDArray[Any]]:
        """What the store does not have yet, for a checkpoint; empty on ranks that do not write."""
        self.save()
        arrays: dict[str, NDArray[Any]] = {}

        def take() -> None:
            if self._writer is not None:
                arrays.update(self._writer.pending())

        self._guard(take)
        return arrays

    def restore(self, step: int, pending: Mapping[str, NDArray[Any]]) -> None:
        """Go on after ``step`` finished steps with what :meth:`pending` gave."""
        if self._writer is None:
            return
        first, steps = self._writer.next_step, self._writer.run.layout.steps
        begin = min([*pending.get("step", np.zeros(0)).tolist(), step])
        if pending:
            self._writer.restore(pending)
        if first < begin:
            self._note(
                f"run {self._writer.run.name!r} lacks steps {first + 1} to {begin}, and training goes on after them: "
                "the store could not be written then, or is another one"
            )
        if self._writer.next_step < step < steps:
            self._writer.skip_to(step)

    def _gathered(self, values_SB: NDArray[Any]) -> NDArray[Any]:
        """(R, S, B, …) of every rank."""
        if self._ranks.count == 1:
            return values_SB[None]
        moved = values_SB.view(np.uint8) if values_SB.dtype == np.uint16 else values_SB  # gloo has no such numbers
        return self._ranks.stacked(torch.from_numpy(moved)).numpy().view(values_SB.dtype)

    def _guard(self, write: Callable[[], None]) -> None:
        """Write on the rank that leads; every rank hears how it went."""
        failure: StorageError | BusyError | CorruptError | None = None
        try:
            write()
        except (StorageError, BusyError, CorruptError) as error:  # the last where a journal is read back
            failure = error
        if not self._ranks.any(failure is not None):
            return
        if self._on_error == "stop":
            raise failure or WorkerError("the first rank could not write the store; see its message")
        self._failed = True
        if failure is not None:
            self._note(f"{failure}. Training goes on without scores in the store (`on_store_error=continue`)")
        self._writer = None
        with suppress(StorageError, BusyError, CorruptError):
            self._stack.close()
