"""Choosing in a loop of the user's own: before the model's forward pass, the batch is cut down to the chosen samples.

Legend: B candidates of a micro-batch, T tokens of the longest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod import GradDotProdEngine, Scores, target_counts
from indexer.encode.losses import IGNORED, own_losses
from indexer.encode.modes import devices_of, outside_graphs, settle_hooks
from indexer.session.chooser import Chooser, Scored
from indexer.session.choosing import Choosing
from indexer.session.own_loss import tokens_in
from indexer.session.ranks import Ranks
from indexer.session.session import ScoringSession


@dataclass(frozen=True, slots=True)
class Expected:
    """The micro-batch that comes with the next forward pass."""

    rows: NDArray[np.int64] | None
    step: int
    loss_scale: float
    arithmetic: AbstractContextManager[Any] | None = None
    """Of the val pass."""


ITEMS = "num_items_in_batch"
"""What a causal language model of transformers divides its summed loss by: the targets of the whole step."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class LoopChooser:
    """Scores a micro-batch and hands on what is chosen of it. Its losses are those of next tokens."""

    def __init__(self, choosing: Choosing, engine: GradDotProdEngine, session: ScoringSession, ranks: Ranks) -> None:
        self._chooser = Chooser.of_loop(choosing, ranks)
        self._engine, self._session = engine, session
        self._loss_checked = False
        """Whether the model's own loss was compared with the one that is scored."""
        self.expected: Expected | None = None
        """What is chosen from in the next forward pass; None: nothing."""
        self.scoring = False
        """Whether a forward pass of the model is one that scores."""
        self.weights = torch.zeros(0)
        """(B,): of the candidates of the newest micro-batch."""

    def expect(self, expected: Expected) -> None:
        """Choose in the next forward pass."""
        settle_hooks()  # the engine is opened within that pass
        self.expected = expected

    def attach(self) -> RemovableHandle:
        """If a micro-batch is :attr:`expected`, cut the arguments of the next forward pass with gradients down to the
        chosen samples.
        """
        model = self._engine.model

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            expected = self.expected
            # Not a deep copy of the model, which has this hook, too.
            if module is not model or expected is None or not torch.is_grad_enabled():
                return None
            self.expected = None
            # What fails on one rank alone must not leave the others waiting for its gradient.
            return self._session.ranks.each(lambda: self._choose(args, kwargs, expected))

        return outside_graphs(model.register_forward_pre_hook(before, with_kwargs=True))

    def _choose(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], expected: Expected) -> Arguments:
        """The arguments of the model's forward pass, of the chosen samples alone. The random state is that of a pass
        without scores.

        UsageError for arguments without labels, for one that cannot be cut by samples, and for a loss of the model's
        that is another one than of next tokens.
        """
        labels_BT = _labels(kwargs)
        _cut(args, kwargs, labels_BT, torch.arange(len(labels_BT)))  # refuses before anything is scored
        begun = time.perf_counter()
        self.scoring = True
        try:
            losses_B, scores = self._scored(args, kwargs, labels_BT, expected)
        finally:
            self.scoring = False
        numbers = scores.total.float().cpu().numpy()
        rows = np.arange(len(losses_B)) if expected.rows is None else expected.rows
        scored = Scored(rows, numbers, losses_B, _tokens(kwargs, labels_BT), self._chooser.common([scores]))
        if not target_counts(labels_BT).any():
            raise UsageError(f"no sample of this micro-batch of step {expected.step} has a target: leave it out")
        weights_B = self._chooser.of_micro_batch(expected.step, self._session.micro_batches, scored)
        _refuse_unequal(weights_B)
        places = torch.from_numpy(np.flatnonzero(weights_B)).to(labels_BT.device)
        cut = _cut(args, kwargs, labels_BT, places)
        scores = replace(scores, seconds=time.perf_counter() - begun)
        self.weights = torch.from_numpy(weights_B)
        self._session.take(scored.rows, losses_B, scores, weights_B)
        self._session.open_chosen(len(places), labels=cut[1]["labels"], tokens=tokens_in(cut[1]), scores=scores)
        return cut

    def _scored(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        labels_BT: Tensor,
        expected: Expected,
    ) -> tuple[NDArray[np.float32], Scores]:
        """(losses, scores) of the candidates."""
        model, size = self._engine.model, len(labels_BT)
        # With labels the model computes its own loss, which is compared once with the one that is scored.
        left_out = ("labels", ITEMS) if self._loss_checked else ()
        given = {name: value for name, value in kwargs.items() if name not in left_out}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices_of(model)))
            with expected.arithmetic or nullcontext():
                opening = self._session.scoring(size, tokens=labels_BT.numel(), loss_scale=expected.loss_scale)
                opened = stack.enter_context(opening)
            output = model.forward(*args, **given)  # not its hooks, of which this is one
            logits = getattr(output, "logits", None)
            if not isinstance(logits, Tensor):
                raise UsageError(f"{type(model).__name__} returned no logits: its samples have no losses to score")
            self._check_own_loss(model, output, logits, kwargs, labels_BT)
            losses_B = own_losses(logits, labels_BT.to(logits.device))
            lacking_B = target_counts(labels_BT).to(logits.device) == 0  # no loss, which is not one of 0
            losses_B = losses_B.masked_fill(lacking_B, torch.nan)
            scores = opened.scores(losses_B)
        return losses_B.detach().float().cpu().numpy(), scores

    def _check_own_loss(
        self, model: nn.Module, output: Any, logits: Tensor, kwargs: Mapping[str, Any], labels_BT: Tensor
    ) -> None:
        """The first time: UsageError unless the model's own loss is the mean over next-token targets."""
        if self._loss_checked:
            return
        if not isinstance(own := getattr(output, "loss", None), Tensor):
            raise UsageError(f"{type(model).__name__} returned no loss, though it was given labels")
        counts_B = target_counts(labels_BT).to(logits.device)
        with torch.no_grad():
            summed = float((own_losses(logits.detach(), labels_BT.to(logits.device)) * counts_B).sum())
        items = kwargs.get(ITEMS)
        expected = summed / float(counts_B.sum().clamp_min(1) if items is None else items)
        tolerance = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-3
        returned = float(own.detach())
        if not abs(returned - expected) <= tolerance * abs(expected):
            raise UsageError(
                f"the loss that {type(model).__name__} returned is {returned:.6g}; the mean over its next-token "
                f"targets is {expected:.6g}: samples are chosen by that, so train on that (without label "
                "smoothing, without a router's loss)"
            )
        self._loss_checked = True


def _labels(kwargs: Mapping[str, Any]) -> Tensor:
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise UsageError(
            "the model's forward pass gets no `labels` of tokens by name: samples are chosen by the loss that a causal "
            "language model itself returns; call it as model(input_ids=…, labels=…)"
        )
    return labels


def _tokens(kwargs: Mapping[str, Any], labels_BT: Tensor) -> NDArray[np.int64]:
    """(B,): tokens of each sample, padding aside where there is a mask."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(labels_BT):
        return np.asarray((mask != 0).sum(1).cpu().numpy(), dtype=np.int64)
    return np.full(len(labels_BT), labels_BT.shape[1], dtype=np.int64)


def _refuse_unequal(weights_B: NDArray[np.float32]) -> None:
    """UsageError for weights that the loss of the model cannot have."""
    chosen = weights_B[weights_B > 0]
    if (chosen != chosen[0]).any():
        raise UsageError(
            f"`policy` gave weights of {chosen.min():.4g} to {chosen.max():.4g}: the loss that the model returns "
            "weighs its samples alike; give 0 and 1 (`ghoststore train` can weigh them)"
        )


def _cut(args: tuple[Any, ...], kwargs: Mapping[str, Any], labels_BT: Tensor, places: Tensor) -> Arguments:
    """The arguments of the samples at ``places``; UsageError naming one that cannot be cut."""
    size = len(labels_BT)

    def cut(name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor) and (not value.dim() or value.shape[0] == 1 != size):
            return value  # one for all samples
        if (
            isinstance(value, Tensor)
            and value.shape[0] == size
            and (value.dim() > 1 or value.shape != labels_BT[0].shape)
        ):
            return value.index_select(0, places.to(value.device))
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"{name} of the model's forward pass ({shape}) cannot be cut by the {size} samples of the batch: leave "
            "it out where samples are chosen"
        )

    chosen = {name: cut(f"argument {name!r}", value) for name, value in kwargs.items() if name != ITEMS}
    if kwargs.get(ITEMS) is not None:
        chosen[ITEMS] = _items(kwargs[ITEMS], labels_BT, chosen["labels"])
    return tuple(cut(f"argument {place}", value) for place, value in enumerate(args)), chosen


def _items(items: Any, labels_BT: Tensor, chosen_KT: Tensor) -> Any:
    """``items`` times the share of this micro-batch's targets that was chosen: it counts in the step as all of it would
    have. Where it is the whole step, that is what the Trainer had counted of the chosen alone.
    """
    before, after = int(target_counts(labels_BT).sum()), int(target_counts(chosen_KT).sum())
    if not before:
        raise CaptureError("the micro-batch has no target: nothing can be chosen in it")
    if float(items) == float((labels_BT != IGNORED).sum()):  # some releases count the label that nothing predicts
        before, after = int((labels_BT != IGNORED).sum()), int((chosen_KT != IGNORED).sum())
    number = float(items) * after / before
    if isinstance(items, Tensor):
        whole = number.is_integer() or items.is_floating_point()
        return items.new_tensor(number) if whole else torch.tensor(number, device=items.device)
    return int(number) if number.is_integer() else number
