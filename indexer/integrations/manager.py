"""GhostEngineManager: the engines in a training loop of one's own, behind one set of calls whatever the method.

Legend: B samples of a micro-batch.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from indexer.dotprod import GradDotProdEngine, Scores, target_counts
from indexer.dotprod.val_data import ValLosses
from indexer.integrations.config import GhostConfig, Method
from indexer.integrations.model_loss import loss_in, own_loss, tokens_in
from indexer.integrations.session import Recorder, RunShape, Samples, places_of, ranks_here
from indexer.training.ranks import Ranks

__all__ = ["GhostConfig", "GhostEngineManager"]


@dataclass(slots=True)
class _Batch:
    """The micro-batch that was attached last, and how far it has come."""

    rows: NDArray[np.int64] | None
    size: int
    labels: Any
    tokens: int
    prepared: bool = False
    own_loss: Tensor | None = None
    """The loss that the model returned, where that is the one which is watched."""
    watched: bool = False
    loss: float = 0.0
    """Its share of the step's loss, and of what that is divided by."""
    weight: float = 1.0


class GhostEngineManager:
    """The reference loop::

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
        self.ranks = ranks_here() if ddp_info is None else _ranks_of(ddp_info)
        self.last_scores: list[Scores] = []
        """Of the micro-batches of the newest finished step."""
        self.engine: GradDotProdEngine | None = None
        """None for Regular."""
        self._scaler = scaler
        self._stack = ExitStack()
        self._hook: RemovableHandle | None = None
        self._samples: Samples | None = None
        self._recorder: Recorder
        self._closed = False
        self._next: int | None = None
        """The step that comes next; None: any, where nothing is stored."""
        self._step: int | None = None
        """The step that is open: it has a batch and is not finished."""
        self._batch: _Batch | None = None
        """The micro-batch that is open: it is not scored yet."""
        self._skipping = False
        self._scores: list[Scores] = []
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
            projection=self.config.projection() if sketched else None,
        )
        if self.config.samples is not None:
            self._samples = Samples.of(self.config.samples, self.config.domains)
        with ExitStack() as stack:
            self._recorder = stack.enter_context(self._make_recorder(self.engine))
            self._attach()
            self._stack = stack.pop_all()
        self._next = 0 if self.config.store is not None else None

    def _check_val(self, val_data: Any, val_losses: ValLosses | None) -> None:
        if val_data is not None:
            return
        if self.config.method == "GradDotProd":
            raise UsageError("method GradDotProd scores against a val set: give val_data")
        if val_losses is not None or self.config.val_refresh_interval != 1:
            raise UsageError("val_losses and val_refresh_interval are for val data: give val_data, too")

    def _make_recorder(self, engine: GradDotProdEngine) -> Recorder:
        config = self.config
        shape = RunShape(
            steps=config.max_steps or 1,
            batch=(config.batch_size or 1) * config.gradient_accumulation_steps,
            save_interval=config.dot_prod_save_interval,
            per_layer=config.per_layer,
        )
        settings = {"val_refresh_interval": config.val_refresh_interval, "exclude_layers": list(config.exclude_layers)}
        return Recorder.open(
            config.store,
            config.name,
            shape,
            self._samples,
            engine,
            self.ranks,
            settings,
            on_store_error=config.on_store_error,
        )

    def is_active(self) -> bool:
        """Whether there is an engine."""
        return self.engine is not None

    def get_method(self) -> Method:
        """The method of the configuration."""
        return self.config.method

    # Once a micro-batch.

    def attach_train_batch(self, X_train: Any, Y_train: Any, iteration: int, batch_idx: Any = None) -> None:
        """The batch that comes next: ``iteration`` is its optimizer step (from 0), ``batch_idx`` (B,) the place of
        each sample in the training set (needed with a store).

        Steps come one after another; after an error in a step and :meth:`clear_gradients`, the same or the next one.
        """
        if self.engine is None:
            return
        self._refuse_closed()
        if self._batch is not None:
            raise UsageError("the last batch is still open; call prepare_gradients() after its backward pass")
        step = self._checked_step(iteration)
        size = _size_of(X_train)
        config = self.config
        if config.batch_size is not None and size > config.batch_size:
            raise UsageError(f"a batch of {size} samples; the configuration says batch_size={config.batch_size}")
        if len(self._scores) >= config.gradient_accumulation_steps:
            raise UsageError(
                f"step {step} has {len(self._scores)} micro-batches already; the configuration says "
                f"gradient_accumulation_steps={config.gradient_accumulation_steps}. After optimizer.step() call "
                "aggregate_and_log()"
            )
        rows = None
        if batch_idx is not None and self._samples is not None:
            rows = places_of(batch_idx, size, self._samples)
        elif config.store is not None:
            raise UsageError("attach_train_batch needs batch_idx: the place of each sample in the training set")
        if self._skipping and self._next is not None and step > self._next:
            self._recorder.skip()
            self._next = step
        if self._step is None:
            self._begun = time.perf_counter()
        self._skipping = False
        self._step = step
        self._batch = _Batch(rows, size, Y_train, tokens=_tokens_of(X_train))

    def _checked_step(self, iteration: int) -> int:
        try:
            step = operator.index(iteration)
        except TypeError:
            raise UsageError(f"iteration is the number of the optimizer step, from 0, not {iteration!r}") from None
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
            raise UsageError(f"step {step} (from 0) comes; the configuration says max_steps={self.config.max_steps}")
        return step

    def prepare_forward_input(self, X_train: Any, Y_train: Any) -> tuple[Any, Any]:
        """Open the engine for the batch (the val gradient is refreshed if it is due); gives back what it got.

        Under the loop's autocast, if it has one, the val pass computes as the forward pass does.
        """
        if self.engine is not None:
            batch = self._opened("attach_train_batch() before prepare_forward_input()")
            if batch.prepared:
                raise UsageError("prepare_forward_input() was called for this batch already")
            if not self.engine.attached:
                raise UsageError("the engine is off the model: call reattach_after_evaluation() before training on")
            size = _size_of(X_train)
            if size != batch.size:
                raise UsageError(f"the batch that was attached has {batch.size} samples, this one {size}")
            scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
            self.engine.prepare(size, tokens=batch.tokens, loss_scale=scale)
            batch.prepared, batch.labels = True, Y_train
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
        opened = self._opened("attach_train_batch() and prepare_forward_input() before watch()")
        if not opened.prepared:
            raise UsageError("call prepare_forward_input() before the forward pass")
        if opened.own_loss is not None:
            if loss is opened.own_loss and weights is None and labels is None:
                return
            raise UsageError(
                f"the loss that {type(self.engine.model).__name__} returned is watched already; to train on "
                "another one, call the model without labels"
            )
        self.engine.watch(loss, weights=weights, labels=labels, batch=batch)
        opened.watched, opened.loss = True, float(loss.detach())
        if weights is not None:
            opened.weight = float(weights.sum())
            return
        opened.weight = float(opened.size) if labels is None else float(target_counts(labels).sum())
        opened.loss *= opened.weight

    def prepare_gradients(self) -> None:
        """After the backward pass: take the batch's scores. The gradients are in ``.grad`` already."""
        if self.engine is None:
            return
        batch = self._opened("attach_train_batch() before the forward pass, and prepare_gradients() once after it")
        if not batch.prepared:
            raise UsageError("call prepare_forward_input() before the forward pass")
        if not batch.watched:
            raise UsageError(
                f"{type(self.engine.model).__name__} returned no loss of next-token targets: call manager.watch(loss) "
                "between the forward and the backward pass"
            )
        scores = self.engine.collect()
        if batch.rows is not None and self.config.store is not None:
            self._recorder.add(batch.rows, scores, loss=batch.loss, weight=batch.weight, tokens=batch.tokens)
        self._scores.append(scores)
        self._batch = None
        self._learning_rate = float(self.optimizer.param_groups[0]["lr"])

    # Once a step.

    def aggregate_and_log(self) -> None:
        """After ``optimizer.step()``: the step's scores are complete and go to the store's next commit."""
        if self.engine is None:
            return
        self._refuse_closed()
        if self._step is None or self._batch is not None or not self._scores:
            raise UsageError("no scored batch: call prepare_gradients() after the backward pass")
        if self.config.store is not None:
            self._recorder.finish(learning_rate=self._learning_rate, seconds=time.perf_counter() - self._begun)
        self.last_scores, self._scores = self._scores, []
        self._next, self._step = self._step + 1, None

    def clear_gradients(self) -> None:
        """Forget what is open: after a finished step nothing; after an error the step it was in, with all of its
        micro-batches. The step may be made again or left out. ``.grad`` is the optimizer's to clear.
        """
        if self.engine is None or self._closed:
            return
        self._skipping |= self._step is not None
        self.engine.discard()
        self._recorder.drop()
        self._step, self._batch, self._scores = None, None, []

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
        self._recorder.save()

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
        self._refuse_open("state_dict()")
        self._refresh_next()
        pending = {name: torch.from_numpy(values) for name, values in self._recorder.pending().items()}
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
            self._recorder.restore(step, pending, "the state")
        self._next = step

    # Around evaluation, and at the end.

    def detach_for_evaluation(self) -> None:
        """Take the engine off the model, between two batches."""
        if self.engine is not None:
            if self._batch is not None:
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
            if module is model:  # not a deep copy of it, which has this hook, too
                self._found_loss(kwargs, output)

        self._hook = model.register_forward_hook(hook, with_kwargs=True)

    def _detach(self) -> None:
        if self.engine is not None and self.engine.attached:
            self.engine.detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _found_loss(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """A causal language model of transformers returns the mean over targets: no call of watch() is needed."""
        batch, engine = self._batch, self.engine
        if engine is None or batch is None or not engine.training_batch_open or batch.watched:
            return
        batch.tokens = tokens_in(kwargs) or batch.tokens
        loss = loss_in(output)
        labels = kwargs.get("labels", batch.labels)
        if loss is None or not isinstance(labels, Tensor) or labels.dim() != 2:
            return
        own = own_loss(loss, labels, kwargs.get("num_items_in_batch"))
        engine.watch(loss, weights=own.weights, labels=labels)
        batch.own_loss, batch.watched = loss, True
        batch.loss = float(loss.detach()) * own.divisor
        batch.weight = float(own.weights.sum()) * own.divisor

    def _refresh_next(self) -> None:
        assert self.engine is not None
        if self.engine.val_batches:
            self.engine.set_validation(self.engine.val_batches)

    def _opened(self, wanted: str) -> _Batch:
        self._refuse_closed()
        if self._batch is None:
            raise UsageError(f"no batch is open: call {wanted}")
        return self._batch

    def _refuse_open(self, call: str) -> None:
        if self._step is not None:
            raise UsageError(f"step {self._step} is open: {call} comes after aggregate_and_log()")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UsageError("this manager was closed; make a new one")


def _first_tensor(batch: Any) -> Tensor:
    found = batch
    while not isinstance(found, Tensor):
        if isinstance(found, Mapping) and found:
            found = next(iter(found.values()))
        elif isinstance(found, (list, tuple)) and found:
            found = found[0]
        else:
            raise UsageError(f"a batch holds tensors whose first axis is the samples; found a {type(batch).__name__}")
    if not found.dim():
        raise UsageError("a batch holds tensors whose first axis is the samples; found one number")
    return found


def _size_of(batch: Any) -> int:
    return len(_first_tensor(batch))


def _tokens_of(batch: Any) -> int:
    """Positions of a batch of token ids; 0 for anything else."""
    first = _first_tensor(batch)
    return 0 if first.is_floating_point() or first.dim() != 2 else first.numel()


def _ranks_of(info: Mapping[str, Any]) -> Ranks:
    """This rank among those of ``info``; UsageError unless torch.distributed says the same."""
    if not info.get("ddp", True):
        found = Ranks()
    else:
        forms = (("rank", "world_size"), ("ddp_rank", "ddp_world_size"))
        names = next((form for form in forms if set(form) <= set(info)), None)
        if names is None:
            raise UsageError(f"ddp_info needs rank and world_size; it has {sorted(map(str, info))}")
        found = Ranks(int(info[names[0]]), int(info[names[1]]))
    here = ranks_here()
    if found != here:
        raise UsageError(
            f"ddp_info says rank {found.rank} of {found.count}; torch.distributed says rank {here.rank} of {here.count}"
            + ("" if here.count > 1 else " (init_process_group() comes first)")
        )
    return found
