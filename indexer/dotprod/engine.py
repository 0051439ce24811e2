"""GradDotProdEngine: ⟨∇ℓ_i, ∇L_val⟩ of every sample of a training batch, inside the ordinary training step.

Legend: B samples of a batch, V val samples, G val groups, K blocks, D numbers of a vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.autograd_check import AutogradBlocks, AutogradDots
from indexer.dotprod.axes import KnownAxes
from indexer.dotprod.exact import ExactMethod, Route, parameters_of
from indexer.dotprod.held_loss import HeldLoss
from indexer.dotprod.parameters import (
    Ledger,
    batch_norms_of,
    refuse_batch_statistics,
    refuse_unsupported_wrappers,
    survey,
    unwrapped,
    version_of,
)
from indexer.dotprod.scores import Scores, divide
from indexer.dotprod.sketched import SketchedMethod
from indexer.dotprod.val_data import (
    ValLosses,
    batches_of,
    computes_in_float16,
    default_losses,
    language_model_losses,
    size_of,
    target_counts,
)
from indexer.dotprod.val_targets import Groups, rows_with_targets
from indexer.layers import LayerType, layer_type_of
from indexer.layers.base import by_sample, input_of
from indexer.modes import evaluating
from indexer.projection import Projection, ProjectionConfig, ProjectionPlan
from indexer.selection import select_blocks
from indexer.tap import See, Tap


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
    ``exclude_layers`` are patterns of modules whose parameters are left out.

    Raises LayerError naming the module for a trainable parameter that cannot be scored, UsageError for a model whose
    samples have no gradients of their own (batch norm) or whose parameters are hidden (torch.compile, FSDP).
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
        route: Route = "auto",
        pairs: bool = False,
        projection: ProjectionConfig | Projection | None = None,
        check: bool = True,
    ) -> None:
        if val_refresh_interval < 1:
            raise UsageError(f"val_refresh_interval must be at least 1 step, not {val_refresh_interval}")
        if projection is not None and (pairs or exclude_layers or route != "auto"):
            raise UsageError(
                "pairs, route and exclude_layers belong to the exact score; the projection names the layers it sketches"
            )
        self.model = unwrapped(model)
        refuse_unsupported_wrappers(self.model)
        self.val_refresh_interval = val_refresh_interval
        self._val_losses = val_losses or (language_model_losses if val_data is None else default_losses(self.model))
        self._val_batches, self._groups = self._usable(val_data, groups)
        self._optimizer = optimizer
        self.method: ExactMethod | SketchedMethod
        self.ledger: Ledger | None = None
        if projection is None:
            self.ledger = survey(self.model, exclude_layers)
            self.method = ExactMethod(self.ledger, route=route, pairs=pairs)
        else:
            self.method = SketchedMethod(self.model, _drawn(self.model, projection))
        kinds = {name: layer_type_of(self.model.get_submodule(name)) for name in self.method.modules}
        self._kinds = {name: kind for name, kind in kinds.items() if kind is not None}
        self._axes = KnownAxes(self.model, self._kinds, trusted=not check)
        self._flags = [p.requires_grad for p in self.model.parameters()]
        self.group_names: list[str] = []
        """Names of the val groups, in the order of ``Scores.groups``; known after the first val pass."""
        self._group_share: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        self._version_at_refresh = self._version_at_detach = -1
        self._told = False
        self._batch_norms = batch_norms_of(self.model)
        self._opened = 0
        self._phase: Literal["train", "val"] | None = None
        self._batch = 0
        self._age: int | None = None
        self._first_val, self._tokens = 0, 0
        self._leaf: Tensor | None = None
        self._upstreams: list[Tensor] = []
        self._weights: Tensor | None = None
        self._checking: AutogradDots | None = None
        self._checking_blocks: AutogradBlocks | None = None
        self._unchecked = check
        self._held_loss = HeldLoss(self.model, self._val_losses, enabled=check)
        self._narrow = False
        self._seconds = 0.0

    # Attaching.

    def attach(self) -> GradDotProdEngine:
        """Put the taps in place; UsageError if they are, or if the model changed so that it cannot be scored."""
        if self._handles:
            raise UsageError("this engine is attached already; call detach() first")
        refuse_unsupported_wrappers(self.model)
        if isinstance(self.method, SketchedMethod):
            self.method.attach(next(self.model.parameters()).device)
        try:
            self._axes.attach()
            for name, kind in self._kinds.items():
                module = self.model.get_submodule(name)
                self._handles.append(
                    module.register_forward_hook(self._hook(name, kind), with_kwargs=True, prepend=True)
                )
            self._handles += self._held_loss.attach()
            if self._optimizer is not None:
                self._handles.append(self._optimizer.register_step_post_hook(lambda *_: self.stepped()))
        except BaseException:
            self.detach()
            raise
        if version_of(self.model) != self._version_at_detach:
            self._age = None
        return self

    def detach(self) -> None:
        """Take every tap away. :meth:`attach` goes on where this left: with the same val gradient, unless the weights
        have changed.
        """
        self._axes.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._version_at_detach = version_of(self.model)
        self.discard()

    def __enter__(self) -> GradDotProdEngine:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether the taps are in place."""
        return bool(self._handles)

    @property
    def training_batch_open(self) -> bool:
        """Whether a batch was prepared and neither collected nor discarded."""
        return self._phase == "train"

    # The val gradient.

    @property
    def val_batches(self) -> list[Any]:
        """The val set, as it was given but for rows without targets; empty without one."""
        return list(self._val_batches)

    @property
    def val_samples(self) -> int:
        """Samples in the val set."""
        return sum(size_of(batch) for batch in self._val_batches)

    def stepped(self) -> None:
        """The optimizer has made a step: the val gradient is one step older. Called by the engine itself where it
        was given the optimizer.
        """
        self._told = True
        if self._age is not None:
            self._age += 1

    def set_validation(self, val_data: Any, groups: Sequence[str] | Literal["each"] | None = None) -> None:
        """Other val samples; their gradient is computed at the next :meth:`prepare`."""
        (self._val_batches, self._groups), self._age = self._usable(val_data, groups), None

    def _usable(self, val_data: Any, groups: Groups) -> tuple[list[Any], Groups]:
        batches = batches_of(val_data)
        return rows_with_targets(batches, groups) if self._val_losses is language_model_losses else (batches, groups)

    def refresh(self, loss_scale: float = 1.0) -> None:
        """Compute the val gradient now. ``loss_scale`` multiplies the val losses before their gradient is taken, which
        float16 needs, and is divided out again.

        UsageError if a val sample's loss is not finite; CaptureError if the gradient is not, or is not what
        autograd says.
        """
        self._require_attached()
        if self._phase is not None:
            raise UsageError("a train batch is open; call collect() or discard() before refresh()")
        if self._val_losses is language_model_losses and not computes_in_float16(self.model):
            loss_scale = 1.0  # no other dtype needs it
        begun = time.perf_counter()
        self._age = None  # what an error below leaves behind is never used
        self.examine(loss_scale)
        checked = self._unchecked and isinstance(self.method, ExactMethod)
        expected: dict[str, Tensor] | None = {} if checked else None
        while not self._val_pass(loss_scale, expected):
            if loss_scale <= 1.0:
                raise CaptureError("the val gradient is not finite; are the weights, or a val sample, out of range?")
            loss_scale = max(1.0, loss_scale / 16)
        if expected is not None and isinstance(self.method, ExactMethod):
            self.method.check_val(expected, self._tolerance())
            self._checking = AutogradDots(expected)
        self._age, self._version_at_refresh = 0, version_of(self.model)
        self._seconds += time.perf_counter() - begun

    def examine(self, loss_scale: float = 1.0) -> None:
        """Find out which axis of each layer carries the samples, unless that is known; :meth:`refresh` does it, too.

        CaptureError that names every layer that mixes the samples of a batch.
        """
        if self._val_batches:
            first = self._val_batches[0]
            self._axes.probe(self._val_losses, first, size_of(first), loss_scale)

    def _val_pass(self, scale: float, expected: dict[str, Tensor] | None) -> bool:
        """One pass over the val batches, whether everything stayed finite; ``expected`` gets autograd's own gradient
        of their mean.
        """
        if expected is not None:
            expected.clear()
        device = next(self.model.parameters()).device
        if not self._val_batches:
            raise UsageError("there is no val set: give val_data, or call set_validation()")
        with evaluating(self.model), torch.enable_grad():
            sizes: list[int] = []
            begun = False
            for batch in self._val_batches:
                size = size_of(batch)
                if not begun:
                    # How many there are is known before the first pass, from the batches themselves.
                    counts = [size_of(each) for each in self._val_batches]
                    self._name_groups(sum(counts), device)
                    begun = True
                self._first_val, self._batch = sum(sizes), size
                self._leaf = torch.zeros((), device=device, requires_grad=True)
                self._phase = "val"
                try:
                    losses_V = self._val_losses(self.model, batch)
                    self._backward(losses_V, size, scale, expected)
                finally:
                    self._phase, self._leaf = None, None
                self.method.end_val_batch()
                sizes.append(size)
        if expected is not None:
            for gradient in expected.values():
                gradient.div_(sum(sizes) * scale)
        return self.method.end_val(scale)

    def _backward(self, losses_V: Tensor, size: int, scale: float, expected: dict[str, Tensor] | None) -> None:
        if losses_V.shape != (size,):
            raise UsageError(
                f"val_losses gave losses of shape {tuple(losses_V.shape)} for a val batch of {size} samples; "
                "one loss a sample is needed"
            )
        if not bool(torch.isfinite(losses_V).all()):
            places = (~torch.isfinite(losses_V)).nonzero().flatten() + self._first_val
            raise UsageError(
                f"the loss of val sample(s) {places.tolist()[:5]} is not finite; leave them out of the val set"
            )
        assert self._leaf is not None
        sources: list[Tensor] = [self._leaf]
        names: list[str] = []
        if expected is not None:
            assert self.ledger is not None
            sources += parameters_of(self.ledger)
            names = list(self.ledger.parameters)
        total = losses_V.sum() if scale == 1.0 else losses_V.sum() * scale
        if not total.requires_grad:
            raise CaptureError("the val losses carry no gradient: does val_losses run under torch.no_grad()?")
        found = torch.autograd.grad(total, sources, allow_unused=True)
        if found[0] is None:
            raise CaptureError("the val losses do not depend on any scored layer")
        for name, gradient in zip(names, found[1:], strict=True):
            assert expected is not None
            assert self.ledger is not None
            like = self.ledger.parameters[name].parameter
            into = expected.setdefault(
                name, torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
            )
            if gradient is not None:
                into += gradient.to_dense() if gradient.is_sparse else gradient

    def _name_groups(self, count: int, device: torch.device) -> None:
        if count < 1:
            raise UsageError("the val set has no samples")
        if self._groups is None:
            names = ["val"] * count
        elif self._groups == "each":
            names = [str(place) for place in range(count)]
        else:
            if isinstance(self._groups, str):
                raise UsageError(f"groups is 'each' or one name for each val sample, not {self._groups!r}")
            names = [str(name) for name in self._groups]
            if len(names) != count:
                raise UsageError(f"groups names {len(names)} val samples, but there are {count}")
        self.group_names = list(dict.fromkeys(names))
        place = {name: index for index, name in enumerate(self.group_names)}
        group_V = torch.tensor([place[name] for name in names], device=device)
        self._group_share = torch.bincount(group_V, minlength=len(place)).double() / count
        self.method.begin_val(group_V, len(place), device)

    # A train batch.

    def prepare(self, batch_size: int, *, tokens: int = 0, loss_scale: float = 1.0) -> None:
        """Open the taps for one forward and backward pass of ``batch_size`` samples (first axis of every layer).

        Refreshes the val gradient if it is due. ``tokens`` (positions in the batch) helps to choose routes;
        ``loss_scale`` is for :meth:`refresh`: with float16, the loss scaler's.

        UsageError if the model is no longer the one the engine was made for, or if its weights changed and nobody
        told of a step.
        """
        self._require_attached()
        if self._phase is not None:
            raise UsageError("the last batch was not collected; call collect() after its backward pass, or discard()")
        if batch_size < 1:
            raise UsageError(f"a batch has at least one sample, not {batch_size}")
        if [p.requires_grad for p in self.model.parameters()] != self._flags:
            raise UsageError("parameters were frozen or unfrozen since the engine was made; make a new engine")
        refuse_batch_statistics(self._batch_norms)
        if self._age == 0 and not self._told and version_of(self.model) != self._version_at_refresh:
            raise UsageError(
                "the weights changed after the val gradient was computed, but no optimizer step was reported: give the "
                "engine the optimizer, or call stepped() after each of its steps; after loading weights, refresh()"
            )
        self._tokens = tokens
        if isinstance(self.method, SketchedMethod) and not self._val_batches:
            pass  # vectors alone
        elif self._age is None or self._age >= self.val_refresh_interval:
            self.refresh(loss_scale)
        self._phase, self._batch = "train", batch_size
        self._upstreams, self._weights = [], None
        self._axes.begin_train()
        self.method.begin_train(batch_size)
        if self._checking is not None and self.ledger is not None:
            self._checking.attach(self.ledger)
        if self._unchecked and isinstance(self.method, SketchedMethod):
            self._checking_blocks = AutogradBlocks(self.model, self.method.projection)
            self._checking_blocks.attach()
        self._held_loss.begin()

    def watch(
        self, loss: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None, batch: Any = None
    ) -> None:
        """Say what the training loss is of: Σ_i weights[i]·ℓ_i.

        Without ``weights`` the mean over the batch's samples; with ``labels`` (B, T) of a language model, the mean
        over all targets of the batch, each shifted by one, as transformers' models give it; with both, ℓ_i is the mean
        over the targets of sample i. What ``loss`` is multiplied with afterwards (accumulation, a loss scaler) is read
        off the backward pass.

        The first loss is held against the model's logits where ``labels`` are given or the model itself returned it;
        for any other, give ``batch``, the train batch in the form that ``val_losses(model, batch)`` takes. UsageError
        if it is another loss than was said, or cannot be held; an engine with ``check=False`` trusts.
        """
        if self._phase != "train":
            raise UsageError("no train batch is open; call prepare() before the forward pass")
        if self._weights is not None:
            raise UsageError("this batch has a watched loss already; watch the one loss that goes through backward()")
        if loss.numel() != 1:
            raise UsageError(f"the training loss is one number, but has shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise CaptureError("the loss carries no gradient: was the forward pass under torch.no_grad()?")
        self._weights = self._weights_of(loss, weights, labels)
        try:
            self._held_loss.check(
                loss, self._weights, labels=labels, batch=batch, explicit=weights is not None, narrow=self._narrow
            )
        except BaseException:
            self._weights = None  # the loss is not watched
            raise
        loss.register_hook(partial(self._saw_upstream, self._opened))  # type: ignore[no-untyped-call]

    def _weights_of(self, loss: Tensor, weights: Tensor | None, labels: Tensor | None) -> Tensor:
        """(B,) float64."""
        if labels is not None:
            if labels.dim() != 2 or len(labels) != self._batch:
                raise UsageError(
                    f"labels are of tokens, one row a sample: there are labels of shape {tuple(labels.shape)} for a "
                    f"batch of {self._batch} samples"
                )
            if weights is None:
                counts_B = target_counts(labels).to(loss.device).double()
                weights = counts_B / counts_B.sum().clamp_min(1)
        elif weights is None:
            weights = torch.full((self._batch,), 1.0 / self._batch, dtype=torch.float64, device=loss.device)
        if weights.shape != (self._batch,):
            raise UsageError(f"there are weights for {tuple(weights.shape)} samples, but the batch has {self._batch}")
        return weights.to(loss.device).double()

    def _saw_upstream(self, opened: int, gradient: Tensor) -> None:
        if opened == self._opened:
            self._upstreams.append(gradient.detach().double().reshape(()))

    def collect(self) -> Scores:
        """The scores of the batch that was prepared, after its backward pass.

        CaptureError if the watched loss had no part in a backward pass, or if what the taps saw is not what autograd
        says (first batch only): nothing of the batch may be used then.
        """
        if self._phase != "train":
            raise UsageError("no train batch is open; call prepare() before the forward pass")
        if self._weights is None:
            raise UsageError("the loss is not known; call watch(loss) between the forward and the backward pass")
        if not self._upstreams:
            raise CaptureError("no gradient came to the watched loss: call backward() on it before collect()")
        if len(self._upstreams) > 1:
            raise CaptureError("the watched loss went through backward() more than once; prepare() each pass")
        self._held_loss.check_backward()
        begun = time.perf_counter()
        scale_B = self._upstreams[0] * self._weights
        try:
            self._axes.check_train(self._batch)
            scores = self._exact(scale_B) if isinstance(self.method, ExactMethod) else self._sketched(scale_B)
        finally:
            self.discard()
        seconds = self._seconds + time.perf_counter() - begun
        self._seconds = 0.0
        return replace(scores, seconds=seconds)

    def discard(self) -> None:
        """Forget the open batch, if there is one (after an error in its step). A backward pass of it that still
        comes is not scored.
        """
        self._phase = None
        self._opened += 1
        self._upstreams, self._weights = [], None
        self.method.begin_train(0)
        self._held_loss.forget()
        if self._checking is not None:
            self._checking.detach()
        if self._checking_blocks is not None:
            self._checking_blocks.detach()
            self._checking_blocks = None

    def _exact(self, scale_B: Tensor) -> Scores:
        assert isinstance(self.method, ExactMethod)
        assert self._group_share is not None
        raw, raw_pairs = self.method.end_train()
        if self._checking is not None and self._checking.says_something():
            self.method.check_train(raw, self._checking.found(), self._tolerance())
            self._checking.detach()
            self._checking, self._unchecked = None, False
        divided = {name: divide(value_BG, scale_B) for name, value_BG in raw.items()}
        assert self.ledger is not None
        groups = torch.zeros(self._batch, len(self.group_names), dtype=torch.float64, device=scale_B.device)
        blocks: dict[str, Tensor] = {name: groups.new_zeros(self._batch) for name in self.ledger.blocks}
        parameters: dict[str, Tensor] = {}
        nothing_BG = divide(torch.zeros_like(groups), scale_B)
        for name, scored in self.ledger.parameters.items():
            found_BG = divided.get(name, nothing_BG)
            groups = groups + found_BG
            parameters[name] = found_BG @ self._group_share
            blocks[scored.block] = blocks[scored.block] + parameters[name]
        return Scores(
            total=groups @ self._group_share, groups=groups, parameters=parameters, blocks=blocks,
            pairs=None if raw_pairs is None else divide(divide(raw_pairs, scale_B).t(), scale_B).t(), vectors=None,
            val_age=self._age or 0,
        )  # fmt: skip

    def _sketched(self, scale_B: Tensor) -> Scores:
        assert isinstance(self.method, SketchedMethod)
        raw_BD, agreed = self.method.end_train_vectors(self._checking_blocks, self._tolerance())
        if agreed:
            self._unchecked = False
        vectors_BD = divide(raw_BD.double(), scale_B)
        if self.method.val_GD is None or self._group_share is None:
            nothing = vectors_BD.new_full((self._batch,), torch.nan)
            return Scores(
                total=nothing, groups=vectors_BD.new_zeros(self._batch, 0), parameters={}, blocks={}, pairs=None,
                vectors=vectors_BD.float(), val_age=0,
            )  # fmt: skip
        val_GD = self.method.val_GD.double()
        mean_D = self._group_share @ val_GD
        groups = vectors_BD @ val_GD.t()
        spans = self.method.projection.plan.groups if self.method.blocks else []
        blocks = {name: vectors_BD[:, first:last] @ mean_D[first:last] for name, first, last in spans}
        return Scores(
            total=groups @ self._group_share, groups=groups, parameters={}, blocks=blocks, pairs=None,
            vectors=vectors_BD.float(), val_age=self._age or 0,
        )  # fmt: skip

    # Hooks.

    def _hook(self, name: str, kind: LayerType) -> Callable[..., Any]:
        """The forward hook of one module; without an open batch it leaves the output alone."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor) -> Tensor | None:
            if self._phase is None:
                return None
            if self._phase == "train" and self._weights is None:
                self.method.called(name)  # not again when checkpointing runs the forward pass a second time
            if not torch.is_grad_enabled() or not y.requires_grad:
                return None
            x = input_of(args, kwargs)
            x, y = by_sample(x, y, self._batch, kind, name)
            if self._phase == "train":
                self._axes.ran(name)
            self._narrow |= y.dtype in (torch.float16, torch.bfloat16)
            begun = time.perf_counter()
            with torch.autocast(device_type=y.device.type, enabled=False):
                kept = self.method.to_keep(name, x, y.dtype)
            if self._phase == "train":  # the val pass is timed as a whole
                self._seconds += time.perf_counter() - begun
            see, leaf = self._see(name), self._leaf if self._phase == "val" else None
            output: Tensor = Tap.apply(y, kept, see, leaf)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _see(self, name: str) -> See:
        if self._phase == "val":
            return self.method.see_val(
                name, self._first_val, self._tokens, self.val_refresh_interval, len(self._val_batches)
            )
        see, opened = self.method.see_train(name), self._opened

        def see_in_time(kept: Tensor, dy: Tensor) -> None:
            if opened != self._opened:
                return  # the batch was discarded, or collected already
            begun = time.perf_counter()
            see(kept, dy)
            self._seconds += time.perf_counter() - begun

        return see_in_time

    def _require_attached(self) -> None:
        if not self._handles:
            raise UsageError("the engine is not attached; call attach(), or use it as a context manager")

    def _tolerance(self) -> float:
        return 0.1 if self._narrow else 2e-3


def _drawn(model: nn.Module, projection: ProjectionConfig | Projection) -> Projection:
    if isinstance(projection, Projection):
        return projection
    selection = select_blocks(
        model, projection.layers, projection.exclude_layers, include_embeddings=projection.include_embeddings
    )
    return Projection(ProjectionPlan.of(selection, projection))
