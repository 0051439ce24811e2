"""GhostEngineManager: the engines in a training loop of the user's own, with the same calls for every method.

Legend: B samples of a micro-batch.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from indexer.dotprod import GradDotProdEngine, Scores
from indexer.dotprod.val_data import ValLosses
from indexer.encode.modes import outside_graphs
from indexer.integrations.batches import AttachedBatch, ranks_of, size_of
from indexer.integrations.choosing import Expected, LoopChooser
from indexer.integrations.config import GhostConfig, Method
from indexer.integrations.left_out import LeftOut
from indexer.integrations.loop_run import LoopRun
from indexer.session.samples import Samples, places_of
from indexer.session.session import MicroBatch, ScoringSession

__all__ = ["GhostConfig", "GhostEngineManager"]


class GhostEngineManager:
    """Scores every sample of a training loop, and records the scores in a store. The reference loop::

        manager = GhostEngineManager(config, model, optimizer, val_data=(X_val, Y_val))
        for iteration in range(max_steps):
            X, Y, batch_idx = get_batch()  # batch_idx: the place of each sample in the training set
            manager.attach_train_batch(X, Y, iteration, batch_idx)
            X_forward, Y_forward = manager.prepare_forward_input(X, Y)
            loss = model(input_ids=X_forward, labels=Y_forward).loss
            loss.backward()
            manager.prepare_gradients()
            optimizer.step()
            manager.aggregate_and_log()
            manager.clear_gradients()
            optimizer.zero_grad(set_to_none=True)
            if manager.should_save_metrics(iteration):
                manager.save_metrics(iteration)
        manager.cleanup()

    Val data are never joined to the batch: ``prepare_forward_input`` gives back what it got, after the val pass.
    The loss that a causal language model of transformers returns (``.loss``, the mean over targets) is found by itself;
    any other loop says what its loss is of with :meth:`watch`. With accumulation, the calls up to ``prepare_gradients``
    come once a micro-batch, those from ``optimizer.step`` on once a step. With several ranks, every rank makes every
    call. With ``method="Regular"`` every call does nothing.

    A context manager, too: ``with GhostEngineManager(…) as manager`` takes everything off the model and lets go of the
    store, also after an exception.

    ``config`` is a :class:`GhostConfig`, or a mapping or object that has fields of its names. ``ddp_info`` is a mapping
    with ``rank`` and ``world_size`` (or ``ddp_rank`` and ``ddp_world_size``); by default what torch.distributed says.
    ``val_losses`` is as in :class:`GradDotProdEngine`. ``scaler`` is the loop's loss scaler, if it has one: float16
    needs its scale in the val pass.

    Raises what the engine raises; UsageError for calls out of order; MismatchError if the run is there with other
    settings, BusyError if something else is writing it.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        val_data: Any = None,
        ddp_info: Mapping[str, Any] | None = None,
        *,
        val_losses: ValLosses | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.config = GhostConfig.of(config)
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks_of(ddp_info)
        self.last_scores: list[Scores] = []
        """Of the micro-batches of the newest finished step; where samples are chosen, of all their candidates."""
        self.last_weights: list[Tensor] = []
        """(B,) each: how the candidates of these micro-batches counted, 0 for those that were not chosen; empty without
        ``choosing``."""
        self.engine: GradDotProdEngine | None = None
        """None for Regular."""
        self._scaler, self._left_out = scaler, LeftOut(optimizer, scaler)
        self._stack = ExitStack()
        self._hooks: list[RemovableHandle] = []
        self._samples: Samples | None = None
        self._session: ScoringSession
        self._closed = False
        self._next: int | None = None
        """The step that comes next; None: any, where nothing is stored."""
        self._step: int | None = None
        """The step that is open: it has a batch and is not finished."""
        self._attached: AttachedBatch | None = None
        """The micro-batch that is open: it is not scored yet."""
        self._skipping = False
        self._scores: list[Scores] = []
        self._weights: list[Tensor] = []
        self._chooser: LoopChooser | None = None
        self._learning_rate = float("nan")
        self._begun = 0.0
        if self.config.method == "Regular":
            return
        self._check_val(val_data, val_losses)
        sketched = self.config.method == "GradProjLora"
        self.engine = GradDotProdEngine(
            model,
            val_data,
            val_losses=val_losses,
            optimizer=optimizer,
            val_refresh_interval=self.config.val_refresh_interval,
            exclude_layers=() if sketched else self.config.exclude_layers,
            score_layers=self.config.scored_layers,
            score_metric=self.config.score_metric,
            pairs=self.config.pairs,
            projection=self.config.projection() if sketched else None,
            keep=self.config.projection() if self.config.keep_gradients is not None and not sketched else None,
        )
        if self.config.samples is not None:
            self._samples = Samples.of(self.config.samples, self.config.domains)
        with ExitStack() as stack:
            self._session = stack.enter_context(LoopRun.of(self.config, self._samples).session(self.engine, self.ranks))
            if self.config.choosing is not None:
                self._chooser = LoopChooser(self.config.choosing, self.engine, self._session, self.ranks)
            stack.callback(self._left_out.attach().remove)
            self._attach()
            self._stack = stack.pop_all()
        self._next = 0 if self.config.store is not None else None

    def _check_val(self, val_data: Any, val_losses: ValLosses | None) -> None:
        if val_data is not None:
            return
        if self.config.choosing is not None:
            raise UsageError("samples are chosen by their scores against a val set: give `val_data`")
        if self.config.method == "GradDotProd":
            raise UsageError("`method=GradDotProd` scores against a val set: give `val_data`")
        if val_losses is not None or self.config.val_refresh_interval != 1:
            raise UsageError("`val_losses` and `val_refresh_interval` are for val data: give `val_data`, too")

    def is_active(self) -> bool:
        """Whether there is an engine."""
        return self.engine is not None

    def get_method(self) -> Method:
        """The method of the configuration."""
        return self.config.method

    # Once a micro-batch.

    def attach_train_batch(
        self, X_train: Any, Y_train: Any, iteration: int, batch_idx: Any = None, *, segments: Tensor | None = None
    ) -> None:
        """The batch that comes next: ``iteration`` is its optimizer step (from 0), ``batch_idx`` (B,) the place of
        each sample in the training set (needed with a store), ``segments`` (rows, positions) of packed rows the number
        of the sample of each position, as in :meth:`GradDotProdEngine.prepare`.

        Steps come one after another; after an error in a step and :meth:`clear_gradients`, the same or the next one.
        """
        if self.engine is None:
            return
        self._refuse_closed()
        if self._attached is not None:
            raise UsageError("the last batch is still open; call prepare_gradients() after its backward pass")
        step = self._checked_step(iteration)
        attached = AttachedBatch.of(X_train, segments)
        size, config = attached.size, self.config
        if segments is not None and config.choosing is not None:
            raise UsageError("`choosing` cuts batches by their rows, and packed rows hold several samples: pad them")
        if config.batch_size is not None and size > config.batch_size:
            raise UsageError(f"a batch of {size} samples; the configuration says `batch_size={config.batch_size}`")
        if len(self._scores) >= config.gradient_accumulation_steps:
            raise UsageError(
                f"step {step} has {len(self._scores)} micro-batches already; the configuration says "
                f"`gradient_accumulation_steps={config.gradient_accumulation_steps}`. After optimizer.step() call "
                "aggregate_and_log()"
            )
        if batch_idx is not None and self._samples is not None:
            attached.places = places_of(batch_idx, size, self._samples)
        elif config.store is not None:
            raise UsageError("attach_train_batch needs `batch_idx`: the place of each sample in the training set")
        if self._skipping and self._next is not None and step > self._next:
            self._session.skip()
            self._next = step
        if self._step is None:
            self._begun = time.perf_counter()
            self._left_out.begin()
        self._skipping = False
        self._step = step
        self._attached = attached

    def _checked_step(self, iteration: int) -> int:
        try:
            step = operator.index(iteration)
        except TypeError:
            raise UsageError(f"`iteration` is the number of the optimizer step, from 0, not {iteration!r}") from None
        if self._step is not None and step != self._step:
            raise UsageError(
                f"a batch of step {step} comes while step {self._step} is open; call aggregate_and_log() after "
                "optimizer.step()"
            )
        allowed = [step] if self._next is None else [self._next, self._next + 1][: 1 + self._skipping]
        if step not in allowed or step < 0:
            raise UsageError(
                f"a batch of step {step} comes, but step {self._next or 0} is next: steps are counted from 0 and none "
                "is left out; a loop that resumes calls load_state_dict() first"
            )
        if self.config.max_steps is not None and step >= self.config.max_steps:
            raise UsageError(f"step {step} (from 0) comes; the configuration says `max_steps={self.config.max_steps}`")
        return step

    def prepare_forward_input(self, X_train: Any, Y_train: Any) -> tuple[Any, Any]:
        """Open the engine for the batch (the val gradient is refreshed if it is due); gives back what it got.

        Under the loop's autocast, if it has one, the val pass computes as the forward pass does.
        """
        if self.engine is not None:
            attached = self._opened("attach_train_batch() before prepare_forward_input()")
            if self._session.batch is not None or self._expected is not None:
                raise UsageError("prepare_forward_input() was called for this batch already")
            if not self.engine.attached:
                raise UsageError("the engine is off the model: call reattach_after_evaluation() before training on")
            size = size_of(X_train)
            if size != attached.rows:
                raise UsageError(f"the batch that was attached has {attached.rows} samples, this one {size}")
            scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
            if self._chooser is not None:
                assert self._step is not None
                self._chooser.expect(Expected(attached.places, self._step, scale))
            else:
                self._session.prepare(
                    attached.size,
                    rows=attached.places,
                    labels=Y_train,
                    tokens=attached.tokens,
                    loss_scale=scale,
                    segments=attached.segments,
                )
        return X_train, Y_train

    def watch(
        self, loss: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None, batch: Any = None
    ) -> None:
        """Say what the training loss is of, see :meth:`GradDotProdEngine.watch`: the mean over samples, over the
        targets in ``labels``, or Σ weights·ℓ. Before it is divided for accumulation or multiplied by a scaler.

        Not for a loss that the model itself returned: that is found without it.
        """
        if self.engine is None:
            return
        prepared = self._prepared("attach_train_batch() and prepare_forward_input() before watch()")
        if prepared.own_loss is not None:
            if loss is prepared.own_loss and weights is None and labels is None:
                return
            raise UsageError(
                f"the loss that {type(self.engine.model).__name__} returned is watched already; to train on "
                "another one, call the model without labels"
            )
        self._session.watch(loss, weights=weights, labels=labels, batch=batch)

    def prepare_gradients(self) -> None:
        """After the backward pass: take the batch's scores. The gradients are in ``.grad`` already."""
        if self.engine is None:
            return
        batch = self._prepared("attach_train_batch() before the forward pass, and prepare_gradients() once after it")
        if batch.loss is None:
            raise UsageError(
                f"{type(self.engine.model).__name__} returned no loss of next-token targets: call manager.watch(loss) "
                "between the forward and the backward pass"
            )
        scores = self._session.collect()
        assert scores is not None
        self._scores.append(scores)
        if self._chooser is not None:
            self._weights.append(self._chooser.weights)
        self._attached = None
        self._learning_rate = float(self.optimizer.param_groups[0]["lr"])

    # Once a step.

    def aggregate_and_log(self) -> None:
        """After ``optimizer.step()``: the step's scores are complete and go to the store's next commit."""
        if self.engine is None:
            return
        self._refuse_closed()
        if self._step is None or self._attached is not None or not self._scores:
            raise UsageError("no scored batch: call prepare_gradients() after the backward pass")
        rate = self._left_out.learning_rate(self._learning_rate)
        shared = {"learning_rate": rate, "seconds": time.perf_counter() - self._begun}
        self._session.record(self._session.complete_step(), shared)
        self.last_scores, self._scores = self._scores, []
        self.last_weights, self._weights = self._weights, []
        self._next, self._step = self._step + 1, None

    def clear_gradients(self) -> None:
        """Forget what is open: after a finished step nothing; after an error the step it was in, with all of its
        micro-batches. The step may be made again or left out. ``.grad`` is the optimizer's to clear.
        """
        if self.engine is None or self._closed:
            return
        self._skipping |= self._step is not None
        self._session.discard()
        self._step, self._attached, self._scores, self._weights = None, None, [], []
        if self._chooser is not None:
            self._chooser.expected = None

    def should_save_metrics(self, iteration: int) -> bool:
        """Whether a save interval ends with step ``iteration`` (from 0)."""
        return self.engine is not None and (iteration + 1) % self.config.dot_prod_save_interval == 0

    def save_metrics(self, iteration: int) -> None:
        """Hand what was logged up to step ``iteration`` to the store's writer. Nothing between two calls is dropped,
        and without any the store gets everything just as well.
        """
        if self.engine is None:
            return
        self._refuse_closed()
        if self._next is None or iteration >= self._next:
            raise UsageError(f"step {iteration} is not finished; call aggregate_and_log() after optimizer.step()")
        self._session.save()

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the loop needs of the manager, between two steps: ``step``, the step that comes next,
        and ``pending``, tensors of the steps that the store does not have yet (on the first rank; the others' are
        empty). Every rank calls it; the first one's may be loaded on all.

        The val gradient is computed anew after it, so that the loop goes on as one that was resumed.
        """
        if self.engine is None:
            return {}
        self._refuse_closed()
        if self._step is not None:
            raise UsageError(f"step {self._step} is open: state_dict() comes after aggregate_and_log()")
        if self.engine.val_batches:
            self.engine.set_validation(self.engine.val_batches)
        pending = {name: torch.from_numpy(values) for name, values in self._session.pending().items()}
        return {"step": self._next or 0, "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; before the first batch. The next iteration is ``state["step"]``.

        UsageError if the run in the store lacks steps that are not in the state.
        """
        if self.engine is None:
            return
        self._refuse_closed()
        if self._next or self._step is not None:
            raise UsageError("load_state_dict() comes before the first batch")
        if set(state) != {"step", "pending"}:
            raise UsageError(f"the state of a manager has step and pending; found {sorted(map(str, state))}")
        step = int(state["step"])
        if self.config.store is not None:
            pending = {name: values.cpu().numpy() for name, values in state["pending"].items()}
            self._session.restore(step, pending, "the state")
        self._next = step

    # Around evaluation, and at the end.

    def detach_for_evaluation(self) -> None:
        """Take the engine off the model, between two batches."""
        if self.engine is not None:
            if self._attached is not None:
                raise UsageError("a batch is open: call prepare_gradients() after its backward pass, then evaluate")
            self._detach()

    def reattach_after_evaluation(self) -> None:
        """Put it back; the val gradient is kept, unless the weights have changed."""
        if self.engine is not None and not self.engine.attached:
            self._refuse_closed()
            self._attach()

    def cleanup(self) -> None:
        """Commit every finished step, take everything off the model, let go of the store. The manager cannot be used
        after it.

        A loop that ends in the middle of a save interval ends the run there, unless it has just taken
        :meth:`state_dict`: then the steps of that interval are in the state alone, and a resumed loop goes on.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> GhostEngineManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._detach()
        self._stack.__exit__(kind, error, trace)

    # Inside.

    def _attach(self) -> None:
        assert self.engine is not None
        self.engine.attach()
        model = self.engine.model

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            batch = self._session.batch  # None in the val pass
            # Not a deep copy of the model, which has this hook, too; and not a second forward pass.
            if module is model and batch is not None and batch.loss is None:
                self._session.watch_own_loss(kwargs, output)

        self._hooks = [outside_graphs(model.register_forward_hook(hook, with_kwargs=True))]
        if self._chooser is not None:
            self._hooks.append(self._chooser.attach())

    def _detach(self) -> None:
        if self.engine is not None and self.engine.attached:
            self.engine.detach()
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _opened(self, wanted: str) -> AttachedBatch:
        self._refuse_closed()
        if self._attached is None:
            raise UsageError(f"no batch is open: call {wanted}")
        return self._attached

    @property
    def _expected(self) -> Expected | None:
        return None if self._chooser is None else self._chooser.expected

    def _prepared(self, wanted: str) -> MicroBatch:
        self._opened(wanted)
        if self._session.batch is None:
            raise UsageError(
                "call prepare_forward_input() before the forward pass"
                if self._expected is None
                else "no forward pass of the model with gradients came to choose samples in"
            )
        return self._session.batch

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError("this manager was closed; make a new one")
