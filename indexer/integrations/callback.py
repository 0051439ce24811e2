"""GhostStoreCallback: training-time scores for transformers' Trainer, without changing its loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ghoststore.errors import CaptureError, CheckpointError, UsageError
from ghoststore.settings.choosing import refuse_contrast_in
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import KEPT_DTYPE, OnStoreError, ScoreLayers, ScoreMetric, check_kept
from ghoststore.store.base.disk import new_file, storage_errors
from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.exact import Route
from indexer.dotprod.segments import Segments, packed_samples
from indexer.dotprod.val_data import ValLosses
from indexer.encode.modes import outside_graphs
from indexer.integrations.choosing import Expected, LoopChooser
from indexer.integrations.loop_run import LoopRun
from indexer.integrations.numbering import Numbering, read_by, trainer_of_event
from indexer.integrations.refused import refuse_arguments, refuse_trainer
from indexer.session.choosing import Choosing
from indexer.session.ranks import Ranks
from indexer.session.samples import Samples, places_of
from indexer.session.session import ScoringSession

PENDING = "ghoststore_pending.safetensors"
"""File in a Trainer's checkpoint with the steps that the store did not have yet."""


def _refuse_settings(val_data: Any, save_interval: int, samples: object, domains: object) -> None:
    """UsageError for settings that cannot be used as given."""
    if val_data is None:
        raise UsageError("scores are against a val set: give `val_data`")
    if save_interval < 1:
        raise UsageError(f"`dot_prod_save_interval` must be at least 1 step, not {save_interval}")
    if samples is None and domains is not None:
        raise UsageError("`domains` are those of `samples`: give these, too")


def _refuse_to_keep(keep_gradients: int | None, keep: ProjectionConfig | None, proj_dtype: str) -> None:
    """UsageError for settings of kept gradients that do not go together."""
    check_kept(keep_gradients, proj_dtype)
    if keep is not None and keep_gradients is None:
        raise UsageError("`keep` says how the gradients of `keep_gradients` are projected: give that, too")


class GhostStoreCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Scores every sample of transformers' Trainer, also of TRL's ``SFTTrainer``, and records the scores in a store.

    ``Trainer(…, callbacks=[GhostStoreCallback(store="./store", val_data=batches)])`` is all that a script needs.

    A sample's place is that of its row in the Trainer's ``train_dataset``, or what the integer column ``sample`` of
    that dataset says; the callback puts the places into the batches, and takes them out before the model sees them, in
    evaluation, too. Of packed rows each sample has a score: its place is counted over all rows, unless the column
    has its number once for each token. The batches of a stream must bring the column themselves.

    ``val_data`` is a batch or a list of batches (mappings with input_ids, labels, maybe attention_mask);
    ``samples`` the ids of the training samples, or how many there are (default: those of the dataset, called by their
    places, ``row:place`` in packed rows), ``domains`` the domain of each;
    ``sample_field`` the name of the column, ``dot_prod_save_interval`` the steps that are committed together. The other
    parameters are those of :class:`GradDotProdEngine` and of ``ghoststore train``; ``projection`` makes the scores
    sketched and keeps each sample's projected gradient. ``keep_gradients`` keeps those of every so many steps alone, as
    ``proj_dtype``; with exact scores, too, projected as ``keep`` says. ``choosing`` trains on those samples of each
    micro-batch alone that a policy chooses by their scores, which are then over ``score_layers="blocks"`` by default.
    ``note`` is called with messages that are no errors (default: a warning).

    The run is called ``name``. Training that resumes from a checkpoint goes on with it; for a checkpoint outside
    ``args.output_dir``, give ``resume_from_checkpoint`` here as well. The training step stays what it is, bit for bit.

    The loss must be the one that the model itself returns, the mean over next-token targets, or TRL's, which is made of
    the log-probabilities that its models return. UsageError for rows whose samples are not known, another loss, and
    settings of the Trainer that hide the model's layers; what the engine raises.
    After an error in training the Trainer calls no event: call :meth:`close`.
    """

    def __init__(
        self,
        *,
        store: str | Path,
        val_data: Any,
        val_losses: ValLosses | None = None,
        samples: int | Sequence[str] | None = None,
        domains: Sequence[str | None] | None = None,
        name: str = "trainer",
        sample_field: str = "sample",
        dot_prod_save_interval: int = 10,
        val_refresh_interval: int = 1,
        per_layer: bool = False,
        exclude_layers: Sequence[str] = (),
        score_layers: ScoreLayers | None = None,
        score_metric: ScoreMetric = "sgd",
        choosing: Choosing | None = None,
        route: Route = "auto",
        projection: ProjectionConfig | None = None,
        keep_gradients: int | None = None,
        keep: ProjectionConfig | None = None,
        proj_dtype: str = KEPT_DTYPE,
        on_store_error: OnStoreError = "stop",
        resume_from_checkpoint: str | Path | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        _refuse_settings(val_data, dot_prod_save_interval, samples, domains)
        _refuse_to_keep(keep_gradients, keep, proj_dtype)
        if choosing is not None and score_layers is None and projection is None:
            score_layers = "blocks"
        if choosing is not None and choosing.contrast:
            refuse_contrast_in(score_metric)
        self._name, self._field, self._choosing = name, sample_field, choosing
        self._samples = None if samples is None else Samples.of(samples, domains)
        self._named = self._samples is not None
        self._engine_of = partial(
            GradDotProdEngine,
            val_data=val_data,
            val_losses=val_losses,
            val_refresh_interval=val_refresh_interval,
            exclude_layers=tuple(exclude_layers),
            score_layers=score_layers,
            score_metric=score_metric,
            route=route,
            pairs=choosing is not None and choosing.contrast and projection is None,
            projection=projection,
            keep=(keep or ProjectionConfig()) if keep_gradients is not None and projection is None else keep,
        )
        self._run_of = partial(
            LoopRun,
            store=store,
            name=name,
            save_interval=dot_prod_save_interval,
            val_refresh_interval=val_refresh_interval,
            exclude_layers=tuple(exclude_layers),
            per_layer=per_layer,
            on_store_error=on_store_error,
            score_layers=score_layers,
            score_metric=score_metric,
            choosing=choosing,
            keep_gradients=keep_gradients,
            proj_dtype=proj_dtype,
        )
        self._from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self._note = note
        self.engine: GradDotProdEngine | None = None
        """The engine, while training."""
        self._unnumbered = ""
        """Why the samples of the Trainer's rows are not known."""
        self._session: ScoringSession | None = None
        self._chooser: LoopChooser | None = None
        self._optimizer: Any = None
        self._fp16 = False
        self._stack = ExitStack()
        self._own_passes = self._trained = False
        self._learning_rate = float("nan")
        self._begun = 0.0

    # Events of the Trainer.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and open the run."""
        self.close()
        if self._trained and not state.global_step:
            raise UsageError(
                f"this callback has scored a training already, and its run {self._name!r} is that one; make another "
                "callback with another `name`"
            )
        refuse_arguments(args, state)
        trainer = trainer_of_event()
        refuse_trainer(trainer, args, choosing=self._choosing is not None)
        numbering = self._number(trainer, args, kwargs["train_dataloader"])
        model = kwargs["model"]
        self._optimizer, self._fp16 = kwargs["optimizer"], bool(args.fp16)
        inner = getattr(self._optimizer, "optimizer", self._optimizer)  # accelerate wraps it; its own hooks fire
        # accelerate has wrapped it, to be compiled, and no event shows the wrapper; this one compiles nothing.
        wrapped: Any = torch.compile(model) if args.torch_compile else model
        engine = self._engine_of(wrapped, optimizer=inner)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        batch = rows if numbering is None else numbering.most_of(rows)
        run = self._run_of(steps=state.max_steps, batch=batch, samples=self._samples)
        with ExitStack() as stack:
            session = stack.enter_context(run.session(engine, Ranks.here(), self._note))
            if state.global_step:
                folder = self._from or _checkpoint(args, state)
                session.restore(state.global_step, _pending_in(folder), str(folder))
            stack.enter_context(engine)
            if numbering is not None:
                stack.callback(numbering.put_into(kwargs["train_dataloader"], self._field))
            if self._choosing is not None:
                self._chooser = LoopChooser(self._choosing, engine, session, session.ranks)
            for handle in self._hooks(model, engine.model):
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        self.engine, self._session = engine, session

    def _number(self, trainer: Any, args: TrainingArguments, loader: Any) -> Numbering | None:
        """The numbers of the rows of the Trainer's dataset; None where it has no length (the batches must tell)."""
        dataset, moved = (None, "") if trainer is None else read_by(trainer, loader)
        if dataset is None:
            if self._samples is None:
                raise UsageError("`samples` says how many training samples there are: the Trainer's dataset does not")
            return None
        if getattr(args, "shuffle_dataset", False):
            moved = "SFTConfig.shuffle_dataset=True puts the rows into another order"
        elif getattr(args, "packing", False):
            moved = "packing cuts and joins samples to rows of one length"
        numbering = Numbering.of(dataset, self._field, self._samples if self._named else None, moved=moved)
        self._unnumbered = numbering.unknown
        if not self._named:
            self._samples = Samples.of(numbering.ids)
        return numbering

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The backward pass of a micro-batch that is not the last of its step is done."""
        self._collect()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The backward pass of a step's last micro-batch is done; the learning rate is still that of this step."""
        self._collect()
        self._learning_rate = float(self._optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is complete."""
        assert self._session is not None
        self._trained = True
        left_out = getattr(self._optimizer, "step_was_skipped", False)  # accelerate's, of its loss scaler
        rate = 0.0 if left_out else self._learning_rate
        shared = {"learning_rate": rate, "seconds": time.perf_counter() - self._begun}
        self._session.record(self._session.complete_step(), shared)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The Trainer wrote a checkpoint: the steps that the store does not have yet go beside it. The val gradient is
        computed anew after it, so that training goes on as one that resumes.
        """
        assert self._session is not None
        assert self.engine is not None
        pending, folder = self._session.pending(), _checkpoint(args, state)
        if pending:
            with storage_errors(str(folder)), new_file(folder / PENDING):
                save_file({key: np.ascontiguousarray(value) for key, value in pending.items()}, folder / PENDING)
        self.engine.set_validation(self.engine.val_batches)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Commit the rest and take everything off the model.

        Training that stops in the middle of a save interval ends the run there, unless its last step was saved.
        """
        self._leave()

    def close(self) -> None:
        """Take everything off the model and let go of the store, after an error in training. Steps of a save interval
        that is not full are left to the training that resumes.
        """
        if self._session is not None:
            self._session.keep_open()
        self._leave()

    def _leave(self) -> None:
        stack, self._stack = self._stack, ExitStack()
        self._session, self.engine, self._chooser = None, None, None
        stack.close()

    # Hooks on the model.

    def _hooks(self, model: nn.Module, inner: nn.Module) -> list[RemovableHandle]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            self._take_sample(kwargs, scored=module is model)  # a deep copy of the model has this hook, too
            return args, kwargs

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if module is inner:
                self._watch_loss(kwargs, output)

        return [
            outside_graphs(model.register_forward_pre_hook(before, with_kwargs=True, prepend=True)),
            *([] if self._chooser is None else [self._chooser.attach()]),
            outside_graphs(inner.register_forward_hook(after, with_kwargs=True)),
        ]

    def _take_sample(self, kwargs: dict[str, Any], *, scored: bool) -> None:
        """Before a forward pass: take ``sample`` out; of a training batch, open the engine, or expect it to be chosen
        from.
        """
        if self._own_passes or (self._chooser is not None and self._chooser.scoring):
            return
        places = kwargs.pop(self._field, None)
        session = self._session
        if not scored or session is None or self.engine is None:
            return
        if not self.engine.model.training or not torch.is_grad_enabled():
            return
        if places is None:
            raise UsageError(
                f"the Trainer's batch has no {self._field!r}: "
                + (
                    self._unnumbered
                    or "add that column to the dataset (the place of each sample), set remove_unused_columns=False, "
                    "and use a collator that keeps it"
                )
            )
        labels = kwargs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise UsageError(
                "the model's forward pass gets no 'labels' of tokens: scores are those of the loss that a causal "
                "language model itself returns. Is there no such column, or does the Trainer take it for a "
                "compute_loss_func or a compute_loss of its own?"
            )
        assert self._samples is not None
        segments = self._segments(kwargs, labels, places)
        rows = places_of(places, len(labels) if segments is None else segments.count, self._samples)
        scale, arithmetic = self._loss_scale(), self._arithmetic(labels.device)
        if self._chooser is not None:
            self._chooser.expect(Expected(rows, session.next_step, scale, arithmetic))
            return
        with self._passes_of_its_own(), arithmetic:
            session.prepare(
                len(rows), rows=rows, labels=labels, tokens=labels.numel(), loss_scale=scale, segments=segments
            )

    @contextmanager
    def _passes_of_its_own(self) -> Iterator[None]:
        """The forward passes inside are the engine's, not the Trainer's."""
        self._own_passes = True
        try:
            yield
        finally:
            self._own_passes = False

    def _segments(self, kwargs: Mapping[str, Any], labels: Tensor, places: Any) -> Segments | None:
        """Of packed rows, which sample each position belongs to."""
        count = len(places)
        sample_RT = packed_samples(kwargs, count)
        if sample_RT is None:
            if count != len(labels):
                raise UsageError(
                    f"{len(labels)} rows of the batch hold {count} samples, and no `position_ids` say where each "
                    "begins. Use a collator that gives them (SFTConfig(padding_free=True), DataCollatorWithFlattening)"
                )
            return None
        if self._chooser is not None:
            raise UsageError(
                "`choosing` cuts batches by their rows, and packed rows hold several samples: train without packing "
                "(SFTConfig: packing=False, padding_free=False; or a collator that pads)"
            )
        return Segments.of(sample_RT, count)

    def _arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """accelerate's autocast is inside the forward pass; the val losses must know of float16 outside, too."""
        return torch.autocast(device.type, dtype=torch.float16) if self._fp16 else nullcontext()

    def _loss_scale(self) -> float:
        scaler = getattr(self._optimizer, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _watch_loss(self, kwargs: Mapping[str, Any], output: Any) -> None:
        """After a forward pass: of a training batch, watch the loss that the model returned."""
        session = self._session
        if self._own_passes or session is None or session.batch is None:
            return
        try:
            watched = session.watch_own_loss(kwargs, output)
        except UsageError as error:
            raise UsageError(
                f"{error}. (This callback scores the loss that the model itself returns; watch() is for a loop of your "
                "own, with GradDotProdEngine or GhostEngineManager)"
            ) from error
        if not watched:
            assert self.engine is not None
            raise UsageError(f"{type(self.engine.model).__name__} returned no loss, though it was given labels")

    def _collect(self) -> None:
        batch = None if self._session is None else self._session.batch
        if self._session is None or batch is None or batch.loss is None:
            raise CaptureError("the Trainer finished a batch that never went through the model's forward pass")
        if not batch.reached:
            raise UsageError(
                "the Trainer's backward pass did not go through the loss that the model returned: it trains on another "
                "one (compute_loss), whose samples cannot be scored by this callback; use GradDotProdEngine.watch()"
            )
        with self._passes_of_its_own():  # a new compiled graph is looked at in one
            self._session.collect()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _pending_in(folder: Path) -> Mapping[str, NDArray[Any]]:
    """What :meth:`GhostStoreCallback.on_save` left in a checkpoint; nothing if it left nothing."""
    path = folder / PENDING
    if not path.is_file():
        return {}
    try:
        pending: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch's, of a file it cannot open
        raise CheckpointError(f"{path} is damaged: {error}; resume from an earlier checkpoint") from error
    return pending
