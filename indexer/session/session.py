"""ScoringSession: a training, scored and recorded, whoever's loop it is.

``ghoststore train``, GhostEngineManager and GhostStoreCallback translate their loops into these calls::

    with ScoringSession(engine, plan, ranks, note=print) as session:  # opens the run
        session.restore(step, pending, "checkpoint-3")       # where training resumes
        for ... in steps:
            for ... in micro_batches:
                session.prepare(size, rows=places)           # then the forward pass
                session.watch(loss)                          # then the backward pass
                session.collect()
            session.record(session.complete_step(), {"learning_rate": 0.1})

Legend: B samples of one rank's step, K blocks, G val groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.errors import UsageError, WorkerError
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.run import Run
from ghoststore.store.run.writer import SAMPLE_ARRAYS
from indexer.dotprod import GradDotProdEngine, Scores, target_counts
from indexer.dotprod.scoring_batch import ScoringBatch
from indexer.dotprod.segments import Segments
from indexer.session.kept_gradients import OF_SAMPLES, ValStep, arrays_of_samples, arrays_of_step, want_vectors
from indexer.session.own_loss import own_loss, tokens_in
from indexer.session.ranks import Ranks
from indexer.session.repeats import Repeats
from indexer.session.run_plan import RunPlan
from indexer.session.score_log import ScoreLog


def warn(message: str) -> None:
    """What a library has to say where nobody asked to hear it in another way."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@dataclass(slots=True)
class MicroBatch:
    """One rank's micro-batch between :meth:`ScoringSession.prepare` and :meth:`ScoringSession.collect`."""

    size: int
    rows: NDArray[np.int64] | None
    labels: Any
    tokens: int
    segments: Segments | None = None
    """Of packed rows."""
    own_loss: Tensor | None = None
    """The loss that the model returned, where that is the one which is watched."""
    loss: float | None = None
    """Its share of the step's loss, and of what that is divided by; None until the session watches a loss."""
    weight: float = 0.0
    reached: bool = False
    """Whether a backward pass came to the model's own loss."""
    scores: Scores | None = None
    """Where these are chosen among candidates: those of the candidates, which are kept already. The engine is not open
    for the batch."""


@dataclass(frozen=True, slots=True)
class ScoredStep:
    """One rank's part of an optimizer step."""

    arrays: dict[str, NDArray[Any]]
    """(B, …) by array of the run: sample, loss, score, …, as far as they are known; empty without a run."""
    sums: NDArray[np.float64]
    """Σ loss, Σ weight, Σ tokens of the micro-batches whose loss the session watched."""
    seconds: float
    """Spent on scoring (host time)."""
    shared: dict[str, NDArray[Any]] = field(default_factory=dict)
    """By array of the run: what is of the step as a whole, the same on every rank."""


class ScoringSession:
    """One training on one rank: its engine (None: samples are recorded without scores), and its run in the store
    (``plan`` None: nothing is stored). Every rank makes the same calls.

    A context manager. Left without an exception, it commits every recorded step; where that is in the middle of a
    save interval whose steps :meth:`pending` has not given out, the rest of the interval is committed without samples,
    and the run ends there.
    """

    def __init__(
        self,
        engine: GradDotProdEngine | None = None,
        plan: RunPlan | None = None,
        ranks: Ranks | None = None,
        *,
        note: Callable[[str], None] = warn,
    ) -> None:
        self.engine = engine
        self.ranks = ranks or Ranks()
        self.run: Run | None = None
        """On the rank that leads; None on the others, and where nothing is stored."""
        self.batch: MicroBatch | None = None
        """The micro-batch that is open: it is not scored yet."""
        self.next_step = 0
        """The step that is recorded next."""
        self._layout = None if plan is None else plan.layout
        self._plan = plan
        self._note = note
        self._new = True
        self._log: ScoreLog
        self._repeats: Repeats
        self._val_step = ValStep()
        self._stack = ExitStack()
        self._given_out = 0
        """The step before which everything is committed or in what :meth:`pending` gave."""
        self._forget()

    def __enter__(self) -> ScoringSession:
        if self._plan is not None:
            opened = self.ranks.led(self._plan.open)
            if opened is not None:
                self.run, self._new = opened
            log = ScoreLog(
                self.run,
                self.ranks,
                interval=self._plan.layout.interval,
                on_error=self._plan.on_store_error,
                note=self._note,
            )
            self._log = self._stack.enter_context(log)
            self._repeats = Repeats(self.run, self.ranks, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._parts:
            self._end_interval()
        self._stack.__exit__(kind, error, trace)

    def keep_open(self) -> None:
        """The run does not end with this session: what is not in a full save interval is left to a loop that resumes
        and repeats it.
        """
        self._given_out = self.next_step
        self._forget()

    def discard(self) -> None:
        """Forget the micro-batches of a step that does not come, the open one among them."""
        self._forget()
        if self.engine is not None:
            self.engine.discard()

    def _forget(self) -> None:
        self.batch = None
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._sums = np.zeros(3)
        self._seconds = 0.0
        self._shared: dict[str, NDArray[Any]] = {}

    # Once a micro-batch.

    def prepare(
        self,
        size: int,
        *,
        rows: NDArray[np.int64] | None,
        labels: Any = None,
        tokens: int = 0,
        loss_scale: float = 1.0,
        segments: Segments | None = None,
    ) -> None:
        """Open the engine for the forward and backward pass of ``size`` samples at the places ``rows`` (needed where
        there is a run). The val gradient is refreshed if it is due. ``labels`` are those of the model's own loss where
        its forward pass is not given any; ``tokens``, ``loss_scale`` and ``segments`` as in the engine.
        """
        if self.engine is not None:
            self._want_vectors(self.engine, loss_scale)
            opening = partial(self.engine.prepare, size, tokens=tokens, loss_scale=loss_scale, segments=segments)
            self._prepare(self.engine, opening)
        self.batch = MicroBatch(size, rows, labels, tokens, segments)

    def _prepare(self, engine: GradDotProdEngine, prepare: Callable[[], None]) -> None:
        """Open ``engine``. A val pass may fail on one rank alone (its val data, a function of the user's): then it
        fails on all, and is due on all.
        """
        if not engine.val_due:
            prepare()
            return
        try:
            self.ranks.each(prepare)
        except WorkerError:
            engine.discard()
            engine.set_validation(engine.val_batches)
            raise

    def watch(
        self, loss: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None, batch: Any = None
    ) -> None:
        """Say what the training loss is of, as in the engine; it counts in the step's mean loss."""
        engine, opened = self._open()
        engine.watch(loss, weights=weights, labels=labels, batch=batch)
        opened.loss = float(loss.detach())
        if weights is not None:
            opened.weight = float(weights.sum())
            return
        opened.weight = float(opened.size) if labels is None else float(target_counts(labels).sum())
        opened.loss *= opened.weight

    def watch_own_loss(self, kwargs: Mapping[str, Any], output: Any) -> bool:
        """Watch the loss that a causal language model of transformers returned in ``output`` when it was called with
        ``kwargs``: the mean over targets of this batch, or of the whole step. False where it returned none.
        """
        engine, opened = self._open()
        opened.tokens = tokens_in(kwargs) or opened.tokens
        labels, items = kwargs.get("labels", opened.labels), kwargs.get("num_items_in_batch")
        own = own_loss(output, labels, items, opened.segments)
        if own is None:
            return False
        if opened.scores is None:
            engine.watch(own.loss, weights=own.weights, labels=own.labels, log_probs=own.log_probs)
        opened.own_loss = own.loss
        opened.loss = float(own.loss.detach()) * own.divisor
        opened.weight = float(own.weights.sum()) * own.divisor

        def reached(gradient: Tensor) -> None:
            opened.reached = True

        source = own.loss if own.log_probs is None else own.log_probs
        source.register_hook(reached)  # type: ignore[no-untyped-call]
        return True

    def _open(self) -> tuple[GradDotProdEngine, MicroBatch]:
        assert self.engine is not None
        assert self.batch is not None, "prepare() comes first"
        return self.engine, self.batch

    def collect(self, loss_B: NDArray[np.float32] | None = None) -> Scores | None:
        """After the backward pass: keep the batch's scores, and the samples' own losses where they are known."""
        batch = self.batch
        assert batch is not None, "prepare() comes first"
        scores = batch.scores
        if scores is None:
            if self.engine is not None:
                scores = self.engine.collect()
                self._seconds += scores.seconds
            self._parts.append({} if self._layout is None else self._arrays(self._layout, batch, loss_B, scores))
        if batch.loss is not None:
            self._sums += (batch.loss, batch.weight, batch.tokens)
        self.batch = None
        return scores

    def scoring(
        self, size: int, *, tokens: int = 0, loss_scale: float = 1.0, hold: bool = False
    ) -> AbstractContextManager[ScoringBatch]:
        """Open the engine for ``size`` candidates, as its own ``scoring``; they are kept by :meth:`take`."""
        assert self.engine is not None
        self._want_vectors(self.engine, loss_scale)
        return self.engine.scoring(size, tokens=tokens, loss_scale=loss_scale, hold=hold)

    def _want_vectors(self, engine: GradDotProdEngine, loss_scale: float) -> None:
        kept = None if self._layout is None else self._layout.gradients
        want_vectors(engine, kept, self.next_step, scaled=loss_scale != 1.0)

    def take(
        self, rows: NDArray[np.int64], loss_B: NDArray[np.float32], scores: Scores, weights_B: NDArray[Any]
    ) -> None:
        """Keep candidates that were scored and are no train batch: how each counts in the step is its weight, 0 for
        those that were not chosen. What scoring them took is in ``scores.seconds``.
        """
        self._seconds += scores.seconds
        arrays: dict[str, NDArray[Any]] = {}
        if self._layout is not None:
            arrays = self._arrays(self._layout, MicroBatch(len(loss_B), rows, None, 0), loss_B, scores)
            if self._layout.weights:
                arrays["weight"] = weights_B
        self._parts.append(arrays)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the open step that were collected or taken."""
        return len(self._parts)

    def open_chosen(self, size: int, *, labels: Any, tokens: int, scores: Scores) -> None:
        """What was chosen among candidates that :meth:`take` kept is trained on now: its loss is watched for the
        step's mean alone. ``scores`` are those of the candidates.
        """
        self.batch = MicroBatch(size, None, labels, tokens, scores=scores)

    def _arrays(
        self, layout: RunLayout, batch: MicroBatch, loss_B: NDArray[np.float32] | None, scores: Scores | None
    ) -> dict[str, NDArray[Any]]:
        """What the run keeps of a micro-batch."""
        assert batch.rows is not None, "a run needs the places of its samples"
        arrays: dict[str, NDArray[Any]] = {"sample": batch.rows}
        if loss_B is not None:
            arrays["loss"] = loss_B
        if scores is None or self.engine is None:
            return arrays
        arrays["score"] = _numbers(scores.total)
        if layout.groups:
            # A val gradient holds the groups of its own val samples; the others have no score this time.
            column = {name: place for place, name in enumerate(self.engine.group_names)}
            absent_B = np.full(batch.size, np.nan, dtype=np.float32)
            each = [_numbers(scores.groups[:, column[name]]) if name in column else absent_B for name in layout.groups]
            arrays["group_score"] = np.stack(each, axis=1)
        if layout.blocks:
            arrays["block_score"] = np.stack([_numbers(scores.blocks[name]) for name in layout.blocks], axis=1)
        if layout.dimension is not None:
            assert scores.vectors is not None
            arrays["vector"] = scores.vectors.cpu().numpy()
        val_step = self._val_step.of(self.next_step, scores)
        if layout.gradients is not None and layout.gradients.holds(self.next_step):
            arrays |= arrays_of_samples(layout.gradients, scores)
            self._shared = arrays_of_step(layout.gradients, scores, val_step)
        return arrays

    # Once a step.

    def complete_step(self) -> ScoredStep:
        """What was collected since the last step, taken out of the session."""
        parts, sums, seconds, shared = self._parts, self._sums, self._seconds, self._shared
        assert parts, "a step has at least one micro-batch"
        self._forget()
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return ScoredStep(arrays, sums, seconds, shared)

    def record(self, step: ScoredStep, shared: Mapping[str, float]) -> None:
        """Optimizer step ``next_step`` is done: hand it to the store. ``shared`` are numbers that every rank has alike.
        The mean loss and the tokens are those that the session watched, if ``shared`` has no ``train_loss``.

        UsageError if it has more samples than the run has places; MismatchError if the store has this step already,
        with other samples.
        """
        if self._layout is not None:
            own = self._empty_step(OF_SAMPLES if OF_SAMPLES[0] in step.arrays else ())
            count = len(step.arrays["sample"])
            if count > self._layout.batch:
                raise UsageError(
                    f"step {self.next_step} has {count} samples; the run was made for {self._layout.batch} a step and "
                    "rank"
                )
            for name, values in step.arrays.items():
                own[name][:count] = values  # the last batch of an epoch may be smaller
            if "train_loss" not in shared:
                loss, weight, tokens = self.ranks.stacked(torch.from_numpy(step.sums)).sum(0).tolist()
                shared = {"train_loss": loss / weight if weight else float("nan"), "tokens": int(tokens), **shared}
            self._add(own, {**step.shared, **shared, "score_seconds": step.seconds})
            if self.next_step + 1 == self._layout.steps:
                self._log.save()
        self.next_step += 1

    def skip(self) -> None:
        """Step ``next_step`` was not scored (an error in it): it is stored without samples."""
        if self._layout is not None:
            self._add(self._empty_step(), {})
        self._val_step.forget()
        self.next_step += 1

    def _add(self, own: dict[str, NDArray[Any]], shared: Mapping[str, Any]) -> None:
        self._repeats.check(self.next_step, own["sample"], own["score"])
        self._log.add(self.next_step, own, shared)

    def _empty_step(self, also: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """One rank's arrays of a step without samples; ``also`` are those of its gradients, where it keeps them."""
        assert self._layout is not None
        specs = [spec for spec in self._layout.arrays() if spec.name in ("sample", *SAMPLE_ARRAYS, *also)]
        return {spec.name: np.full(spec.columns[1:], spec.fill, dtype=spec.dtype) for spec in specs}

    def save(self) -> None:
        """Hand what was recorded to the store's writer now."""
        if self._layout is not None:
            self._log.save()

    # Resuming, and the end.

    def pending(self) -> dict[str, NDArray[Any]]:
        """Recorded steps that the store does not have yet, for a checkpoint; empty on ranks that do not write."""
        self._given_out = self.next_step
        return {} if self._layout is None else self._log.pending()

    def restore(
        self, step: int, pending: Mapping[str, NDArray[Any]], source: str, *, gaps_are_known: bool = False
    ) -> None:
        """Go on after ``step`` finished steps with what :meth:`pending` gave; ``source`` is where it comes from.

        UsageError if the run began earlier and steps before ``step`` are neither in it nor in ``pending``. With
        ``gaps_are_known``, ``on_store_error="continue"`` or a new run that is only noted.
        """
        goes_on = self._plan is not None and self._plan.on_store_error == "continue"
        note_gaps = gaps_are_known or self._new or goes_on
        self.ranks.led(lambda: self._restore(step, pending, source, note_gaps=note_gaps))
        self.next_step = self._given_out = step

    def _restore(self, step: int, pending: Mapping[str, NDArray[Any]], source: str, *, note_gaps: bool) -> None:
        if self.run is None:
            return
        steps = self.run.layout.steps
        if not 0 <= step <= steps:
            raise UsageError(f"{source} is of step {step}; the run was made for {steps} steps")
        present = {*self.run.committed_steps().tolist(), *np.asarray(pending.get("step", [])).tolist()}
        lacking = sorted(set(range(step)) - present)
        if lacking and not note_gaps:
            raise UsageError(
                f"run {self.run.name!r} lacks steps {lacking[0]} to {lacking[-1]}, and they are not in {source} of "
                f"step {step}: give what was saved of this run, or a run with another name"
            )
        self._log.restore(step, pending)

    def _end_interval(self) -> None:
        """Commit the steps of a save interval that does not become full."""
        if self._layout is None or self.next_step == self._given_out:
            return
        interval = self._layout.interval
        end = min(-(-self.next_step // interval) * interval, self._layout.steps)
        for step in range(self.next_step, end):
            self._log.add(step, self._empty_step(), {})


def _numbers(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()
