"""Writes a run during training: gathers steps into save intervals and commits these in the background."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghoststore.errors import UsageError
from ghoststore.store.run.saver import Saver
from ghoststore.store.spans.layout import ArraySpec
from ghoststore.store.spans.writer import BackgroundWriter, SpanData, writing

if TYPE_CHECKING:
    from ghoststore.store.run.run import Run

SAMPLE_ARRAYS = ("score", "loss", "weight", "group_score", "block_score", "vector")
"""Arrays with numbers for each sample; NaN if there is no sample."""


class RunWriter:
    """The one writer of a run: ``with RunWriter(run) as writer: writer.append(step, values)``.

    It keeps other writers out (BusyError) and removes leftovers of dead ones. Steps of a save interval stay in memory
    until the last is appended; then a thread commits the interval, while at most one more waits. Leaving the block
    waits for full intervals. Steps of an interval that is not full are only in :meth:`pending`, for a checkpoint.

    Errors of the thread (StorageError, BusyError, CorruptError) are raised by the next call or at the end of the block;
    nothing is written after an error.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._layout = run.layout
        self._specs = {spec.name: spec for spec in run.layout.arrays()}
        self._stack = ExitStack()
        self._saver = Saver(run)
        self._background: BackgroundWriter
        self._recorded: set[int] = set()
        """Spans that were committed when the block was entered."""
        self._saved: set[int] = set()
        """Save intervals of other spans that are committed, or handed to the thread."""
        self._next = 0
        """The step to append next."""
        self._gathered: dict[str, NDArray[Any]] | None = None
        """Arrays of the save interval of ``_next``, filled up to that step; None at its first step."""

    def __enter__(self) -> RunWriter:
        with ExitStack() as stack:
            stack.enter_context(writing(self.run))
            self._saver.begin()
            self.run.reload()
            self._background = stack.enter_context(BackgroundWriter(self.run, self._saver.save))
            self._stack = stack.pop_all()
        self._recorded = set(self.run.spans)
        starts = [start for journal in self.run.journals.values() for start in journal.starts]
        self._saved = {start // self._layout.interval for start in starts}
        self._next = self._first_open(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def next_step(self) -> int:
        """The first step that is neither committed nor appended."""
        return self._next

    def append(self, step: int, values: Mapping[str, ArrayLike]) -> None:
        """Append one step, numbered from 0: ``values`` by array, each of the array's shape without its first axis.

        ``sample`` is required. Other arrays default to their fill value: ``tokens`` 0, floats NaN. An array of
        some steps only must not be given for others. Append steps in order, from the first that is not committed or the
        one after what was restored; steps of committed save intervals are accepted and dropped.

        UsageError (a ValueError) naming the array or the step that does not fit.
        """
        self._background.check()
        checked = self._checked(step, values)
        if self._is_done(step // self._layout.interval):
            return
        if step != self._next:
            raise UsageError(f"step {step} is out of order: step {self._next} comes next in run {self.run.name!r}")
        self._keep(checked)

    def pending(self) -> dict[str, NDArray[Any]]:
        """The appended steps that are not committed, for a training checkpoint: every array, and ``step``, the steps.

        It waits as :meth:`flush` does, so that committed and pending steps together are all that were appended.
        """
        self.flush()
        start = self._next - self._next % self._layout.interval if self._gathered is not None else self._next
        arrays = self._gathered if self._gathered is not None else self._empty(0)
        pending = {name: array[: self._specs[name].count(self._next - start)].copy() for name, array in arrays.items()}
        return {"step": np.arange(start, self._next), **pending}

    def restore(self, pending: Mapping[str, NDArray[Any]]) -> None:
        """Append the steps that :meth:`pending` returned, before any other, unless their interval is committed by now.

        Earlier steps that are not committed are given up, as by :meth:`skip_to`. UsageError if they are not the
        beginning of a save interval, or have other arrays than the run.
        """
        steps = np.asarray(pending.get("step")).tolist()
        if self._gathered is not None:
            raise UsageError("pending steps are restored before others are appended")
        if not isinstance(steps, list) or set(pending) != {"step", *self._specs}:
            raise UsageError(
                f"pending steps have the arrays {sorted(pending)}; expected step, {', '.join(self._specs)}"
            )
        if not steps:
            return
        begin = steps[0]
        if begin % self._layout.interval or steps != list(range(begin, begin + len(steps))):
            raise UsageError(f"pending steps {steps[:3]}… are not the beginning of a save interval")
        if len(steps) >= self._layout.interval:
            raise UsageError(f"{len(steps)} pending steps are more than a save interval leaves pending")
        checked_steps = [
            self._checked(
                step,
                {
                    name: pending[name][index // spec.every]
                    for name, spec in self._specs.items()
                    if not index % spec.every
                },
            )
            for index, step in enumerate(steps)
        ]
        if self._is_done(begin // self._layout.interval):
            return
        self._give_up(begin // self._layout.interval)
        self._next = begin
        for checked in checked_steps:
            self._keep(checked)

    def skip_to(self, step: int) -> None:
        """Give up all steps before ``step`` that are not committed; ``step`` is to be appended next.

        This is for a training that continues without the steps that its store has lost. Save intervals that end before
        ``step`` are given up: :meth:`ghoststore.store.run.run.Run.committed_steps` shows the gap. Earlier steps of its
        own interval are written without samples. UsageError if ``step`` is not ahead.
        """
        if self._gathered is not None or not self._next <= step < self._layout.steps:
            raise UsageError(f"cannot skip to step {step}: step {self._next} comes next in run {self.run.name!r}")
        self._give_up(step // self._layout.interval)
        self._next = self._first_open(step // self._layout.interval)
        no_samples = np.full((self._layout.ranks, self._layout.batch), -1)
        while self._next < step:
            self._keep(self._checked(self._next, {"sample": no_samples}))

    def flush(self) -> None:
        """Wait until every full save interval is committed, and reload :attr:`run`."""
        self._background.wait()
        self.run.reload()

    def _is_done(self, interval: int) -> bool:
        return interval in self._saved or interval * self._layout.interval // self._layout.span_steps in self._recorded

    def _first_open(self, interval: int) -> int:
        """First step of the first save interval, from ``interval`` on, that is not done."""
        while interval < self._layout.intervals and self._is_done(interval):
            interval += 1
        return min(interval * self._layout.interval, self._layout.steps)

    def _give_up(self, until: int) -> None:
        """Give up the save intervals before ``until`` that are not done."""
        intervals = range(self._next // self._layout.interval, until)
        lost = [self._layout.interval_of(interval) for interval in intervals if not self._is_done(interval)]
        self._background.wait()  # while the thread works, only that may use the saver
        self._saver.skip(lost)

    def _empty(self, count: int) -> dict[str, NDArray[Any]]:
        return {
            name: np.empty((spec.count(count), *spec.columns), dtype=spec.dtype) for name, spec in self._specs.items()
        }

    def _keep(self, checked: Mapping[str, NDArray[Any]]) -> None:
        """Add one step to its save interval, and hand that over when it is full."""
        interval = self._next // self._layout.interval
        start, stop = self._layout.interval_of(interval)
        if self._gathered is None:
            self._gathered = self._empty(stop - start)
        for name, value in checked.items():
            self._gathered[name][(self._next - start) // self._specs[name].every] = value
        self._next += 1
        if self._next == stop:
            full, self._gathered = self._gathered, None
            self._saved.add(interval)
            self._next = self._first_open(interval)
            self._background.put(SpanData(interval, full))

    def _checked(self, step: int, values: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """One step's value for every array, in stored dtypes."""
        if not 0 <= step < self._layout.steps:
            raise UsageError(f"step {step} is outside run {self.run.name!r} of {self._layout.steps} steps")
        unknown = sorted(set(values) - set(self._specs))
        if unknown:
            raise UsageError(f"run {self.run.name!r} has no arrays {unknown}; it has: {', '.join(self._specs)}")
        if "sample" not in values:
            raise UsageError(f"step {step} lacks 'sample', the rows it was trained on")
        checked = {name: _stored(spec, values[name]) for name, spec in self._specs.items() if name in values}
        sample = checked["sample"]
        if sample.min() < -1 or sample.max() >= self._layout.rows:
            raise UsageError(
                f"'sample' of step {step} has rows {sample.min()} to {sample.max()}; the run has rows 0 to "
                f"{self._layout.rows - 1}, and -1 for none"
            )
        for name in SAMPLE_ARRAYS:
            if name in checked and not np.isnan(checked[name][sample < 0]).all():
                raise UsageError(f"{name!r} of step {step} has numbers where 'sample' is -1: NaN is expected there")
        for name, spec in self._specs.items():
            if step % spec.every:
                if name in checked:
                    raise UsageError(
                        f"{name!r} is of one step in {spec.every}, from 0, and step {step} is none of them"
                    )
            elif name not in checked:
                checked[name] = np.full(spec.columns, spec.fill, dtype=spec.dtype)
        return checked


def _stored(spec: ArraySpec, value: ArrayLike) -> NDArray[Any]:
    """``value`` in the dtype of ``spec``. UsageError naming the array if shape or kind do not fit."""
    array = np.asarray(value)
    if array.shape != spec.columns:
        raise UsageError(f"{spec.name!r} of a step has shape {array.shape}; expected {spec.columns}")
    if array.dtype.kind not in ("iu" if spec.dtype.kind in "iu" else "iuf"):
        raise UsageError(f"{spec.name!r} of a step is of {array.dtype}; expected {spec.dtype}")
    with np.errstate(over="ignore"):  # numbers too large for float32 become infinite
        return array.astype(spec.dtype)
