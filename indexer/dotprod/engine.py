"""GradDotProdEngine: ⟨∇ℓ_i, ∇L_val⟩ of every sample of a training batch, inside the ordinary training step.

Legend: B samples of a batch, V val samples, G val groups, K blocks, D numbers of a vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import Route, ScoreLayers, ScoreMetric
from indexer.dotprod.axes import KnownAxes
from indexer.dotprod.held_factors import FactorHolder
from indexer.dotprod.held_loss import HeldLoss
from indexer.dotprod.in_graph import InGraph, is_compiled
from indexer.dotprod.ledger import (
    batch_norms_of,
    refuse_batch_statistics,
    refuse_unsupported_wrappers,
    unwrapped,
)
from indexer.dotprod.making import method_for, metric_for
from indexer.dotprod.open_batch import OpenBatch
from indexer.dotprod.scores import Scores
from indexer.dotprod.scoring_batch import ScoringBatch
from indexer.dotprod.val_age import ValAge
from indexer.dotprod.val_data import ValLosses, default_losses, language_model_losses
from indexer.dotprod.val_gradient import ValGradient
from indexer.encode.modes import uncompiled, without_autocast
from indexer.encode.tap import Tap
from indexer.layers import LayerType, layer_type_of
from indexer.layers.base import by_sample, input_of
from indexer.projection.matrices import Projection


class GradDotProdEngine:
    """Scores every training sample against a validation set. The training step stays what it is, bit for bit.

    ::

        engine = GradDotProdEngine(model, val_data, optimizer=optimizer).attach()
        for x, y in batches:
            engine.prepare(len(x))
            loss = loss_of(model(x), y)  # the mean over samples; of a language model: over tokens
            engine.watch(loss)  # of a language model: engine.watch(loss, labels=y)
            loss.backward()
            scores = engine.collect()
            optimizer.step()

    ``val_data`` is a batch, or a list of batches (a large val set need not fit one pass), of anything that
    ``val_losses(model, batch)`` turns into one loss a sample; without ``val_losses``, of language-model batches
    (see :func:`language_model_losses`), whose rows without a target are left out with a warning: they have no loss.
    A ``val_losses`` of one's own must be given none: its every row counts. None: :meth:`set_validation` gives them
    later. The val gradient is computed in eval mode before the first batch and again after every
    ``val_refresh_interval`` optimizer steps (which ``optimizer`` tells, or :meth:`stepped`).

    ``groups`` names the group of each val sample (domains), or is ``"each"``: every val sample is one. ``pairs``
    adds all products within a batch. ``projection`` makes the score sketched: approximate, over the projected layers.
    ``keep`` is a projection, too: scores stay exact, and ``Scores.vectors`` are the projected gradients beside.
    ``exclude_layers`` are patterns of modules whose parameters are left out; ``score_layers="blocks"`` takes only the
    linears inside the transformer blocks, not embeddings, head and norms (default: ``"all"``). With
    ``score_metric="adam"`` a score is ⟨∇ℓ_i, P ∇L_val⟩, P = 1/(√v̂+ε) of ``optimizer``, torch's Adam or AdamW, when the
    val gradient is computed: to first order what its step along ∇ℓ_i takes off L_val; NaN before its first step.
    ``check=False`` trusts the taps, the axes of the layers and the losses; ``hold_losses=False`` the losses alone, for
    a loop that makes them of the logits.

    Raises LayerError naming the module for a trainable parameter that cannot be scored, UsageError for a model whose
    samples have no gradients of their own (batch norm) or whose parameters are split (FSDP).
    """

    def __init__(
        self,
        model: nn.Module,
        val_data: Any,
        *,
        val_losses: ValLosses | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        groups: Sequence[str] | Literal["each"] | None = None,
        val_refresh_interval: int = 1,
        exclude_layers: Sequence[str] = (),
        score_layers: ScoreLayers | None = None,
        score_metric: ScoreMetric = "sgd",
        route: Route = "auto",
        pairs: bool = False,
        projection: ProjectionConfig | Projection | None = None,
        keep: ProjectionConfig | Projection | None = None,
        check: bool = True,
        hold_losses: bool = True,
    ) -> None:
        if val_refresh_interval < 1:
            raise UsageError(f"val_refresh_interval must be at least 1 step, not {val_refresh_interval}")
        self.model = unwrapped(model)
        refuse_unsupported_wrappers(self.model)
        self.val_refresh_interval = val_refresh_interval
        losses = val_losses or (language_model_losses if val_data is None else default_losses(self.model))
        self._optimizer = optimizer
        self.method = method_for(
            self.model,
            projection,
            keep,
            exclude_layers=exclude_layers,
            score_layers=score_layers,
            metric=metric_for(score_metric, optimizer),
            route=route,
            pairs=pairs,
            check=check,
        )
        self._val = ValGradient(self.model, self.method, losses)
        self._val.set(val_data, groups)
        kinds = {name: layer_type_of(self.model.get_submodule(name)) for name in self.method.modules}
        self._kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        self._axes = KnownAxes(self.model, self._kinds, trusted=not check)
        self._held_loss = HeldLoss(self.model, losses, enabled=check and hold_losses)
        self._flags = [p.requires_grad for p in self.model.parameters()]
        self._batch_norms = batch_norms_of(self.model)
        self._check = check
        self._holder: FactorHolder | None = None
        self._in_graph = InGraph(self.method, copies=pairs, compiled=is_compiled(model))
        self._hooks = {name: self._hook(name, kind) for name, kind in self._kinds.items()}
        """The same for each :meth:`attach`: a compiled graph is made for them."""
        self._handles: list[RemovableHandle] = []
        self._age = ValAge(self.model)
        self._train: OpenBatch | None = None
        self._size = self._tokens = 0
        """Samples of the train or val batch that is open, and positions of the train batch."""
        self._narrow = False
        self._seconds = 0.0

    # Attaching.

    def attach(self) -> GradDotProdEngine:
        """Put the taps in place; UsageError if they are, or if the model changed so that it cannot be scored."""
        if self._handles:
            raise UsageError("this engine is attached already; call detach() first")
        refuse_unsupported_wrappers(self.model)
        self.method.attach(self._device)
        try:
            self._axes.attach()
            for name, hook in self._hooks.items():
                module = self.model.get_submodule(name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            self._handles += self._held_loss.attach()
            if self._optimizer is not None:
                self._handles.append(self._optimizer.register_step_post_hook(lambda *_: self.stepped()))
        except BaseException:
            self.detach()
            raise
        self._age.attached()
        return self

    def detach(self) -> None:
        """Take every tap away. :meth:`attach` goes on where this left: with the same val gradient, unless the weights
        have changed.
        """
        self._axes.detach()
        if self._holder is not None:
            self._holder.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._age.detached()
        self.discard()

    def __enter__(self) -> GradDotProdEngine:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def attached(self) -> bool:
        """Whether the taps are in place."""
        return bool(self._handles)

    @property
    def training_batch_open(self) -> bool:
        """Whether a batch was prepared and neither collected nor discarded."""
        return self._train is not None

    # The val gradient.

    @property
    def val_batches(self) -> list[Any]:
        """The val set, as it was given but for rows without targets; empty without one."""
        return list(self._val.batches)

    @property
    def val_samples(self) -> int:
        """Samples in the val set."""
        return self._val.samples

    @property
    def group_names(self) -> list[str]:
        """Names of the val groups, in the order of ``Scores.groups``; known after the first val pass."""
        return self._val.group_names

    def stepped(self) -> None:
        """The optimizer has made a step: the val gradient is one step older. Called by the engine itself where it
        was given the optimizer.
        """
        self._age.stepped()

    def set_validation(self, val_data: Any, groups: Sequence[str] | Literal["each"] | None = None) -> None:
        """Other val samples; their gradient is computed at the next :meth:`prepare`."""
        self._val.set(val_data, groups)
        self._age.forget()

    def refresh(self, loss_scale: float = 1.0) -> None:
        """Compute the val gradient now. ``loss_scale`` multiplies the val losses before their gradient is taken, which
        float16 needs, and is divided out again.

        UsageError if a val sample's loss is not finite; CaptureError if the gradient is not, or is not what
        autograd says.
        """
        self._require_attached()
        if self._train is not None:
            raise UsageError("a train batch is open; call collect() or discard() before refresh()")
        begun = time.perf_counter()
        self._age.forget()  # what an error below leaves behind is never used
        self.examine()
        self._age.computed(complete=self._val.compute(loss_scale, self._tolerance, self._opened_val))
        self._seconds += time.perf_counter() - begun

    def examine(self) -> None:
        """Find out which axis of each layer carries the samples, unless that is known; :meth:`refresh` does it, too.

        CaptureError that names every layer that mixes the samples of a batch.
        """
        self._val.examine(self._axes)

    def _opened_val(self, size: int) -> None:
        self._size = size

    # A train batch.

    def prepare(self, batch_size: int, *, tokens: int = 0, loss_scale: float = 1.0) -> None:
        """Open the taps for one forward and backward pass of ``batch_size`` samples (first axis of every layer).

        Refreshes the val gradient if it is due. ``tokens`` (positions in the batch) helps to choose routes;
        ``loss_scale`` is for :meth:`refresh`: with float16, the loss scaler's.

        UsageError if the model is no longer the one the engine was made for, or if its weights changed and nobody
        told of a step.
        """
        self._open(OpenBatch(batch_size), tokens, loss_scale)

    @contextmanager
    def scoring(
        self, batch_size: int, *, tokens: int = 0, loss_scale: float = 1.0, hold: bool = False
    ) -> Iterator[ScoringBatch]:
        """Score ``batch_size`` samples without training on them.

        ::

            with engine.scoring(len(x)) as batch:
                losses_B = losses_of(model(x), y)  # each sample's own
                scores = batch.scores(losses_B)

        No weight gradient is formed, no ``.grad`` changes and no hook of a parameter runs, but for those of the first
        pass, which is held against autograd as a train batch is. Inside DistributedDataParallel call :attr:`model`,
        the module within. ``tokens``, ``loss_scale`` and the errors are those of :meth:`prepare`.

        With ``hold`` the batch keeps the input of each layer with a trainable parameter, scored or not, and the
        gradient at its output, until ``batch.add_gradients(weights_B)`` forms the weighted sum of the samples'
        gradients from them. That is memory for all inputs and outputs of the linears, with or without checkpointing:
        of GPT-2 about 16 times its width for each token and block, and as many as there are logits. Several batches may
        be held. LayerError for a trainable parameter that no layer type handles.
        """
        opened = OpenBatch(batch_size, leaf=torch.zeros((), device=self._device, requires_grad=True))
        self._refuse_to_open()
        holder = self._attached_holder() if hold else None
        self._open(opened, tokens, loss_scale)
        if holder is not None:
            holder.begin(opened)
        try:
            with uncompiled():
                yield ScoringBatch(opened, loss_scale, self.method, holder, self._scored, self._tolerance)
        finally:
            if self._train is opened:
                self.discard()

    def _attached_holder(self) -> FactorHolder:
        if self._holder is None:
            self._holder = FactorHolder(self.model, check=self._check)
        self._holder.attach(self._val)
        return self._holder

    def _refuse_to_open(self) -> None:
        """UsageError where no batch can be opened."""
        self._require_attached()
        if self._train is not None:
            raise UsageError("the last batch was not collected; call collect() after its backward pass, or discard()")

    def _open(self, opened: OpenBatch, tokens: int, loss_scale: float) -> None:
        """See :meth:`prepare`."""
        self._refuse_to_open()
        if opened.size < 1:
            raise UsageError(f"a batch has at least one sample, not {opened.size}")
        if [p.requires_grad for p in self.model.parameters()] != self._flags:
            raise UsageError("parameters were frozen or unfrozen since the engine was made; make a new engine")
        refuse_batch_statistics(self._batch_norms)
        self._age.refuse_unreported()
        self._tokens = tokens
        if self._age.due(self.val_refresh_interval) and (self.method.needs_val or self._val.batches):
            self.refresh(loss_scale)
        self._train, self._size = opened, opened.size
        self._axes.begin_train()
        self.method.begin_train(opened.size)
        if opened.leaf is None:
            self._in_graph.begin(opened)
            self._held_loss.begin()

    def watch(
        self, loss: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None, batch: Any = None
    ) -> None:
        """Say what the training loss is of: Σ_i weights[i]·ℓ_i.

        Without ``weights`` the mean over the batch's samples; with ``labels`` (B, T) of a language model, the mean
        over all targets of the batch, each shifted by one, as transformers' models give it; with both, ℓ_i is the mean
        over the targets of sample i. What ``loss`` is multiplied with afterwards (accumulation, a loss scaler) is read
        off the backward pass.

        The first loss is held against the model's logits where ``labels`` are given, or where a language model itself
        returned it. For any other, give ``batch``, the train batch in the form that ``val_losses(model, batch)`` takes:
        without it nothing is held, and a RuntimeWarning says so. UsageError if it is another loss than was said, or
        cannot be held; an engine with ``check=False`` trusts, without a word.
        """
        opened = self._open_train()
        opened.refuse_to_watch(loss)
        opened.weights_B = opened.weights_of(loss, weights, labels)
        self._narrow |= self._in_graph.narrow
        try:
            self._held_loss.check(
                loss, opened.weights_B, labels=labels, batch=batch, explicit=weights is not None, narrow=self._narrow
            )
        except BaseException:
            opened.weights_B = None  # the loss is not watched
            raise
        opened.forwarded = True

        def saw_upstream(gradient: Tensor) -> None:
            if self._train is opened:
                opened.saw_upstream(gradient)

        loss.register_hook(saw_upstream)  # type: ignore[no-untyped-call]

    def collect(self) -> Scores:
        """The scores of the batch that was prepared, after its backward pass.

        CaptureError if the watched loss had no part in a backward pass, or if what the taps saw is not what autograd
        says (first batch only): nothing of the batch may be used then.
        """
        opened = self._open_train()
        scale_B = opened.scale()
        self._in_graph.refuse_left_out(opened)
        self._held_loss.check_backward(opened.upstream)
        return self._scored(opened, scale_B)

    def _scored(self, opened: OpenBatch, scale_B: Tensor) -> Scores:
        """The scores of the batch that is open, after its backward pass; closes it."""
        begun = time.perf_counter()
        try:
            self._axes.check_train(opened.size)
            scores = self.method.scores(scale_B, self._val.group_share, self._tolerance())
        finally:
            self.discard()
        seconds = self._seconds + opened.seconds + time.perf_counter() - begun
        self._seconds = 0.0
        return replace(scores, seconds=seconds, val_age=self._age.steps or 0)

    def discard(self) -> None:
        """Forget the open batch, if there is one (after an error in its step). A backward pass of it that still
        comes is not scored.
        """
        if self._train is not None:
            self._train.closed = True
        self._train = None
        self._in_graph.end()
        self.method.begin_train(0)
        if self._holder is not None:
            self._holder.end()
        self._axes.end_train()
        self._held_loss.forget()

    def _open_train(self) -> OpenBatch:
        if self._train is None:
            raise UsageError("no train batch is open; call prepare() before the forward pass")
        if self._train.leaf is not None:
            raise UsageError("a scoring pass is open: its losses go to scores() of the batch that scoring() gives")
        return self._train

    # Hooks.

    def _hook(self, name: str, kind: LayerType) -> Callable[..., Any]:
        """The forward hook of one module; without an open batch it leaves the output alone."""
        graph, key = self._in_graph, self._in_graph.add(name, kind, self._axes.ran)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            if torch.compiler.is_dynamo_compiling():
                return graph.apply(key, kind, input_of(args, kwargs), y)
            train = self._train
            leaf = self._val.leaf if train is None else train.leaf
            if train is None and leaf is None:
                return None
            if train is not None and not train.forwarded:
                self.method.called(name)  # not again when checkpointing runs the forward pass a second time
                if not torch.is_grad_enabled():
                    train.without_graph.append(name)
            if not torch.is_grad_enabled() or not y.requires_grad:
                return None
            x, y = by_sample(input_of(args, kwargs), y, self._size, kind, name)
            self._narrow |= y.dtype in (torch.float16, torch.bfloat16)
            begun = time.perf_counter()
            with without_autocast(y.device.type):
                saved = self.method.to_keep(name, x, y.dtype)
            if train is None:
                see = self._val.see(name, self._tokens, self.val_refresh_interval)
            else:
                self._axes.ran(name)
                train.ran.add(name)
                self._seconds += time.perf_counter() - begun  # the val pass is timed as a whole
                see = train.in_time(self.method.see_train(name))
            output: Tensor = Tap.apply(y, saved, see, leaf)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _require_attached(self) -> None:
        if not self._handles:
            raise UsageError("the engine is not attached; call attach(), or use it as a context manager")

    def _tolerance(self) -> float:
        return 0.1 if self._narrow else 2e-3
