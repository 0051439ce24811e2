"""GradDotProdEngine: ⟨∇ℓ_i, ∇L_val⟩ of every sample of a training batch, inside the ordinary training step.

Legend: B samples of a batch, V val samples, G val groups, K blocks, D numbers of a vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import Route, ScoreLayers, ScoreMetric
from indexer.dotprod.axes import KnownAxes
from indexer.dotprod.fused_head import FusedHead, common_factor
from indexer.dotprod.held_factors import FactorHolder
from indexer.dotprod.in_graph import InGraph
from indexer.dotprod.ledger import (
    batch_norms_of,
    refuse_batch_statistics,
    refuse_unsupported_wrappers,
    unwrapped,
    unwrapped_optimizer,
)
from indexer.dotprod.loss_check import LossCheck
from indexer.dotprod.making import method_for, metric_for
from indexer.dotprod.open_batch import OpenBatch
from indexer.dotprod.scores import Scores
from indexer.dotprod.scoring_batch import ScoringBatch
from indexer.dotprod.segments import Segments
from indexer.dotprod.val_age import ValAge
from indexer.dotprod.val_data import ValLosses, default_losses, language_model_losses
from indexer.dotprod.val_gradient import ValGradient
from indexer.dotprod.val_side import ValSide
from indexer.encode.flat_rows import FlatRows
from indexer.encode.modes import is_compiled, settle_hooks, uncompiled, without_autocast
from indexer.encode.tap import tapped
from indexer.encode.uses import CallWindows, refuse_hidden
from indexer.layers import LayerType
from indexer.layers.base import input_of, refuse_counted
from indexer.projection.matrices import Projection


class GradDotProdEngine(ValSide):
    """Scores every training sample against a validation set. The training step stays the same, bit for bit.

    ::

        engine = GradDotProdEngine(model, val_data, optimizer=optimizer).attach()
        for x, y in batches:
            engine.prepare(len(x))
            loss = loss_of(model(x), y)  # the mean over samples; of a language model: over tokens
            engine.watch(loss)  # of a language model: engine.watch(loss, labels=y)
            loss.backward()
            scores = engine.collect()
            optimizer.step()

    ``val_data`` is a val batch, or a list of them if the val set does not fit one pass. ``val_losses(model, batch)``
    gives one loss a sample; every row counts then. Without it the batches are those of a language model (see
    :func:`language_model_losses`); rows without a target have no loss and are left out with a warning. With
    ``val_data=None`` call :meth:`set_validation` later. The val gradient is computed in eval mode before the first
    batch, and again after ``val_refresh_interval`` steps each: those of ``optimizer``, or calls of :meth:`stepped`.

    ``groups`` names the group of each val sample (its domain), or is ``"each"``: every val sample is a group.
    ``pairs`` adds the products of all pairs within a batch. ``projection`` makes the score sketched: approximate, over
    the projected layers. ``keep`` is a projection, too: scores stay exact, and ``Scores.vectors`` holds its vectors.
    ``exclude_layers`` are patterns of modules whose parameters are left out. ``score_layers="blocks"`` scores only the
    linears inside the transformer blocks, not embeddings, head and norms (default: ``"all"``). With
    ``score_metric="adam"`` a score is ⟨∇ℓ_i, P ∇L_val⟩, P = 1/(√v̂+ε) of ``optimizer`` (torch's Adam or AdamW) at the
    time of the val gradient: to first order, the decrease of L_val by its step along ∇ℓ_i. It is NaN before the first
    step. ``route``: ``"direct"`` and ``"gram"`` are exact to the last digits, ``"low-rank"`` takes the 64 leading
    directions of a wide matrix's val gradient where they hold 99 % of it, ``"auto"`` the cheapest. ``check=False``
    checks neither taps, axes of layers nor losses; ``hold_losses=False`` leaves out that of losses, for a loop that
    computes them from the logits itself. LayerError names the module of a trainable parameter that cannot be scored,
    UsageError a model whose samples have no gradients of their own (batch norm) or whose parameters are split (FSDP).
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
            raise UsageError(f"`val_refresh_interval` must be at least 1 step, not {val_refresh_interval}")
        self.model = unwrapped(model)
        refuse_unsupported_wrappers(self.model)
        self.val_refresh_interval = val_refresh_interval
        losses = val_losses or (language_model_losses if val_data is None else default_losses(self.model))
        self._optimizer = unwrapped_optimizer(optimizer)
        self.method = method_for(
            self.model,
            projection,
            keep,
            exclude_layers=exclude_layers,
            score_layers=score_layers,
            metric=metric_for(score_metric, self._optimizer),
            route=route,
            pairs=pairs,
            check=check,
        )
        self._windows = CallWindows(self.model, self.method.by_module) if check else None
        self._val = ValGradient(self.model, self.method, losses, self._windows)
        self._val.set(val_data, groups)
        self._kinds = self.method.kinds
        self._axes = KnownAxes(self.model, self._kinds, trusted=not check)
        self._loss_check = LossCheck(self.model, losses, enabled=check and hold_losses)
        self._flags = [p.requires_grad for p in self.model.parameters()]
        self._batch_norms = batch_norms_of(self.model)
        self._check = check
        self._flat_rows = FlatRows()
        self._holder: FactorHolder | None = None
        self._fused_head = FusedHead(self.model, self.method)
        self._in_graph = InGraph(self.method, copies=pairs, compiled=is_compiled(model))
        self._hooks = {name: self._hook(name, kind) for name, kind in self._kinds.items()}
        """The same ones for each :meth:`attach`: compiled graphs are made for them."""
        self._handles: list[RemovableHandle] = []
        self._age = ValAge(self.model)
        self._train: OpenBatch | None = None
        self.on_val_batch = lambda size: None
        self._size = self._tokens = 0
        """Samples of the open train or val batch, and positions of the train batch."""
        self._narrow = False
        self._seconds = 0.0

    # Attaching.

    def attach(self) -> GradDotProdEngine:
        """Put the taps in place. UsageError if they are there, or if the model now has what cannot be scored."""
        if self._handles:
            raise UsageError("this engine is attached already; call detach() first")
        refuse_unsupported_wrappers(self.model)
        self.method.attach(self._device)
        try:
            self._axes.attach()
            if self._windows is not None:
                self._handles += self._windows.attach()
            for name, hook in self._hooks.items():
                module = self.model.get_submodule(name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
            self._handles += self._loss_check.attach() + self._fused_head.attach()
            if self._optimizer is not None:
                self._handles.append(self._optimizer.register_step_post_hook(lambda *_: self.stepped()))
        except BaseException:
            self.detach()
            raise
        self._age.attached()
        return self

    def detach(self) -> None:
        """Remove every tap. After another :meth:`attach` the val gradient still serves, unless the weights changed."""
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

    def __exit__(self, *_: object) -> None:
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
        """Whether a batch has been prepared and neither collected nor discarded."""
        return self._train is not None

    # A train batch.

    def prepare(
        self,
        batch_size: int,
        *,
        tokens: int = 0,
        loss_scale: float = 1.0,
        segments: Tensor | Segments | None = None,
    ) -> None:
        """Open the taps for one forward and backward pass of ``batch_size`` samples (first axis of every layer).

        Refreshes the val gradient if it is due. ``tokens``, the positions in the batch, helps to choose routes.
        ``loss_scale`` is for :meth:`refresh`: with float16, the scale of the loss scaler. ``segments`` (rows,
        positions), of packed rows, is the number of the sample of each position, from 0, and -1 for padding.
        UsageError if the model is no longer the one the engine was made for, or if its weights changed without a
        reported step.
        """
        if isinstance(segments, Tensor):
            segments = Segments.of(segments, batch_size)
        self._open(OpenBatch(batch_size, segments), tokens, loss_scale)

    @contextmanager
    def scoring(
        self, batch_size: int, *, tokens: int = 0, loss_scale: float = 1.0, hold: bool = False
    ) -> Iterator[ScoringBatch]:
        """Score ``batch_size`` samples without training on them.

        ::

            with engine.scoring(len(x)) as batch:
                losses_B = losses_of(model(x), y)  # one loss a sample
                scores = batch.scores(losses_B)

        It forms no weight gradient, changes no ``.grad`` and runs no hook of a parameter. The first pass is the
        exception: it is compared with autograd, as a train batch is. Inside DistributedDataParallel call
        :attr:`model`, the module within. ``tokens``, ``loss_scale`` and the errors are those of :meth:`prepare`.
        With ``hold`` the batch keeps the input of each layer with a trainable parameter, scored or not, and the
        gradient at its output, until ``batch.add_gradients(weights_B)`` forms the weighted sum of the samples'
        gradients from them. This takes memory for all inputs and outputs of the linears, with or without
        checkpointing: for GPT-2 about 16 × width numbers a token and block, and as many as there are logits. Several
        batches may be held. LayerError for a trainable parameter that no layer type handles.
        """
        open_batch = OpenBatch(batch_size, leaf=torch.zeros((), device=self._device, requires_grad=True))
        self._refuse_to_open()
        holder = self._attached_holder() if hold else None
        self._open(open_batch, tokens, loss_scale)
        if holder is not None:
            holder.begin(open_batch)
        try:
            with uncompiled():
                yield ScoringBatch(
                    open_batch, loss_scale, self.method, holder, self._finish, self._tolerance, self._look_for_hidden
                )
        finally:
            if self._train is open_batch:
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

    def _open(self, open_batch: OpenBatch, tokens: int, loss_scale: float) -> None:
        """See :meth:`prepare`."""
        self._refuse_to_open()
        if open_batch.size < 1:
            raise UsageError(f"a batch has at least one sample, not {open_batch.size}")
        if [p.requires_grad for p in self.model.parameters()] != self._flags:
            raise UsageError("parameters were frozen or unfrozen since the engine was made; make a new engine")
        refuse_batch_statistics(self._batch_norms)
        self._age.refuse_unreported()
        settle_hooks()
        self._tokens = tokens
        if self.val_due:
            self.refresh(loss_scale)
        self._train, self._size = open_batch, open_batch.rows
        self._flat_rows.begin()
        self._axes.begin_train()
        if self._windows is not None:
            self._windows.begin()
        self.method.begin_train(open_batch.size)
        if open_batch.leaf is None:
            self._in_graph.begin(open_batch)
            self._fused_head.begin(open_batch)
            self._loss_check.begin()

    def watch(
        self,
        loss: Tensor,
        *,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        batch: Any = None,
        log_probs: Tensor | None = None,
    ) -> None:
        """Name the training loss: Σ_i weights[i]·ℓ_i. Call it between the forward and the backward pass.

        Without ``weights`` it is the mean over the samples. With ``labels`` (B, T) of a language model it is the mean
        over all next-token targets of the batch, as transformers' models compute it. With both, ℓ_i is the mean over
        the targets of sample i. A later factor of ``loss`` (accumulation, a loss scaler) is read from the backward
        pass. With ``log_probs`` (B, T - 1), those of the targets from a fused head, ``loss`` is their mean, and what
        goes backward may be any multiple of it, computed from them: the multiple is read there.

        The first loss is compared with the model's logits if ``labels`` are given, or if a language model itself
        returned it. For any other loss give ``batch``, the train batch in the form that ``val_losses(model, batch)``
        takes; without it a RuntimeWarning says that the loss was not checked. UsageError if the loss is another one,
        or cannot be compared. An engine with ``check=False`` checks nothing.
        """
        open_batch = self._require_open()
        open_batch.refuse_to_watch(loss)
        open_batch.weights_B = open_batch.weights_of(loss, weights, labels)
        self._narrow |= self._in_graph.narrow
        try:
            self._loss_check.check(
                loss,
                open_batch.weights_by_row(labels),
                labels=labels,
                batch=batch,
                explicit=weights is not None,
                narrow=self._narrow,
            )
        except BaseException:
            open_batch.weights_B = None  # the loss is not watched
            raise
        open_batch.forwarded = True
        self._look_for_hidden(loss)

        def add_upstream(gradient: Tensor) -> None:
            if self._train is open_batch:
                factor = gradient if log_probs is None or labels is None else common_factor(gradient, labels)
                open_batch.add_upstream(factor)

        source = loss if log_probs is None else log_probs
        source.register_hook(add_upstream)  # type: ignore[no-untyped-call]

    def _look_for_hidden(self, loss: Tensor) -> None:
        """Note the parameters that the ``loss`` of the open batch uses where no tap sees it."""
        if self._windows is not None and self._train is not None:
            elsewhere = self._in_graph.layers | self._fused_head.ran
            self._train.hidden = self._windows.hidden(loss, elsewhere)

    def collect(self) -> Scores:
        """Return the scores of the prepared batch, after its backward pass.

        CaptureError if the watched loss did not go backward, if it uses a weight where no tap sees it, or if taps and
        autograd differ (first batch only).
        """
        open_batch = self._require_open()
        scale_B = open_batch.scale()
        self._in_graph.refuse_left_out(open_batch)
        self._loss_check.check_backward(open_batch.upstream)
        open_batch.refuse_unsized()
        return self._finish(open_batch, scale_B)

    def _finish(self, open_batch: OpenBatch, scale_B: Tensor) -> Scores:
        """Return the scores of the open batch, after its backward pass, and close it."""
        started = time.perf_counter()
        try:
            self._axes.check_train(open_batch, new_forms=self._flat_rows.new_forms)
            self._flat_rows.check()
            self._flat_rows.remember()
            scores = self.method.scores(scale_B, self._val.group_share, self._tolerance())
            self._train = None  # the taps see nothing of what runs again
            in_graphs = self._axes.hidden_in_graphs(self.method.by_module, self._in_graph.layers)
            if not bool(scores.total.isnan().all()):
                refuse_hidden([*open_batch.hidden, *self._val.hidden, *in_graphs])
        finally:
            self._train = open_batch
            self.discard()
        seconds = self._seconds + open_batch.seconds + time.perf_counter() - started
        self._seconds = 0.0
        return replace(scores, seconds=seconds, val_age=self._age.steps or 0)

    def discard(self) -> None:
        """Close the open batch, if there is one, after an error in its step. A later backward pass of it is ignored."""
        if self._train is not None:
            self._train.closed = True
        self._train = None
        self._in_graph.end()
        self._fused_head.end()
        self.method.begin_train(0)
        if self._holder is not None:
            self._holder.end()
        self._axes.end_train()
        self._loss_check.forget()

    def _require_open(self) -> OpenBatch:
        if self._train is None:
            raise UsageError("no train batch is open; call prepare() before the forward pass")
        if self._train.leaf is not None:
            raise UsageError("a scoring pass is open: its losses go to scores() of the batch that scoring() gives")
        return self._train

    def _hook(self, name: str, kind: LayerType) -> Callable[..., Any]:
        """The forward hook of one module. Without an open batch it leaves the output alone."""
        graph, key = self._in_graph, self._in_graph.add(name, kind, self._axes.ran)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return graph.apply(key, kind, input_of(args, kwargs), y)
            train = self._train
            leaf = self._val.leaf if train is None else train.leaf
            if train is None and leaf is None:
                return None
            if train is not None and not train.forwarded:
                self.method.called(name)  # once: checkpointing runs the forward pass again
                if not torch.is_grad_enabled():
                    train.without_graph.append(name)
            if not torch.is_grad_enabled():
                return None
            seen = kind.seen(module, args, kwargs, y, self._size, name)
            if not self._check:
                refuse_counted(seen, name)
            if not seen.requires_grad:
                return None
            self._narrow |= seen.dtype in (torch.float16, torch.bfloat16)
            started = time.perf_counter()
            with without_autocast(seen.device.type):
                saved = self.method.to_keep(name, seen.x, seen.dtype)
            if train is None:
                see = self._val.see(name, self._tokens, self.val_refresh_interval)
            else:
                self._axes.ran(name)
                train.saw(name, flat=seen.flat)
                self._flat_rows.saw(name, seen, self._size)
                self._seconds += time.perf_counter() - started  # the val pass is timed as a whole
                see = train.in_time(self.method.see_train(name))
            output = seen.back(tapped(seen, saved, see, leaf).outputs)
            if self._windows is not None:
                self._windows.ended(name)
            return output

        return hook

    def _require_attached(self) -> None:
        if not self._handles:
            raise UsageError("the engine is not attached; call attach(), or use it as a context manager")

    def _tolerance(self) -> float:
        return 0.1 if self._narrow else 2e-3
