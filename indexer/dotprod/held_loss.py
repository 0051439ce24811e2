"""The loss that is scored is the loss that trains: the first watched loss, held against the model's own logits.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghoststore.errors import UsageError
from indexer.dotprod.beside_loss import BesideLoss
from indexer.dotprod.forward_seen import (
    Seen,
    Start,
    items_in,
    labels_by_name,
    logits_in,
    output_without_labels,
    replayed,
    tensors_in,
    words_in,
)
from indexer.dotprod.loss_forms import Held, Range, Watched, explain, hold, names_it, next_tokens
from indexer.dotprod.loss_graph import coefficient_of, depends_on, gradient_at, hidden_auxiliary_loss, way_to
from indexer.dotprod.val_data import ValLosses
from indexer.encode.losses import IGNORED
from indexer.encode.modes import outside_graphs

WIDE, NARROW = (1e-4, 1e-3), (1e-3, 2e-2)
"""Relative tolerances of the loss and of its gradient at the logits: in float32, and where 16-bit numbers take part.

The gradient says more: with the weights that a model starts from, every cross-entropy is about log V.
"""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What ``watch`` was told: ``loss`` = Σ_i weights[i]·ℓ_i, weights (B,) float64."""

    loss: Tensor
    weights: Tensor
    explicit: bool
    """Whether the weights are the user's."""
    narrow: bool
    """Whether 16-bit numbers take part."""

    @property
    def value(self) -> float:
        """The loss."""
        return float(self.loss.detach())

    @property
    def tolerances(self) -> tuple[float, float]:
        """Relative, of the loss and of its gradient at the logits."""
        value, gradient = NARROW if self.narrow else WIDE
        return value + (torch.finfo(self.loss.dtype).eps if _is_narrow(self.loss) else 0.0), gradient


_AUXILIARY = re.compile(r"aux|router|balanc|z_loss|penalt", re.IGNORECASE)


class HeldLoss:
    """Keeps the forward pass of the first training batch until its loss is watched, and holds that against its logits.

    Once for each engine: after the first loss that is finite, and can be told from others, nothing is kept any more.
    """

    def __init__(self, model: nn.Module, val_losses: ValLosses, *, enabled: bool) -> None:
        self._model = model
        self._val_losses = val_losses
        self._done = not enabled
        self._open = False
        self._range = Range()
        """Of the losses of all samples that a loss was held against by val_losses."""
        self._start: Start | None = None
        self._passes: list[Seen] = []
        """Forward passes of the batch that is open, the last one last."""
        self._beside: BesideLoss | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldLoss:
        """Itself: a deep copy of the model has these hooks, too, and they are not meant for it."""
        return self

    def attach(self) -> list[RemovableHandle]:
        """Hooks on the model itself; none where there is nothing to hold any more."""
        if self._done:
            return []
        return [
            self._model.register_forward_pre_hook(outside_graphs(self._before), with_kwargs=True),
            self._model.register_forward_hook(outside_graphs(self._after), with_kwargs=True),
        ]

    def begin(self) -> None:
        """A train batch is open."""
        if not self._done:
            self._open, self._start = True, Start.now(self._model)

    def forget(self) -> None:
        """It is closed: nothing of it is kept."""
        self._let_go()
        if self._beside is not None:
            self._beside.close()
            self._beside = None

    def _let_go(self) -> None:
        self._open, self._start, self._passes = False, None, []

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._open and module is self._model and torch.is_grad_enabled():  # a deep copy of it has this hook, too
            self._start = Start.now(self._model)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self._open and module is self._model and torch.is_grad_enabled():
            assert self._start is not None
            self._passes.append(Seen.of(args, kwargs, output, self._start))

    def check(
        self, loss: Tensor, weights: Tensor, *, labels: Tensor | None, batch: Any, explicit: bool, narrow: bool
    ) -> None:
        """Hold ``loss`` = Σ_i weights[i]·ℓ_i, weights (B,) float64, against the logits for ``labels`` (B, T), or
        against ``val_losses`` of ``batch``, where they are given; else against the labels that the model was given,
        if the loss is the model's own.

        ``explicit``: the weights are the user's. A loss that is not finite, or of no target, waits for the next; so
        does one that fits, if every other loss of these logits would fit as well. RuntimeWarning where there is nothing
        to hold it against. UsageError if it is another loss, or cannot be held.
        """
        if self._done:
            return
        seen = _pass_of(loss, self._passes)
        start = self._start if seen is None else seen.start
        assert start is not None
        if not bool(torch.isfinite(loss.detach()).all()) or not bool(weights.any()):
            self._let_go()
            return
        narrow |= start.autocast is not None or _is_narrow(loss) or any(map(_is_narrow, self._model.parameters()))
        claim = _Claim(loss, weights, explicit, narrow)
        settled: bool | None = None
        if batch is not None:
            settled = self._against_val_losses(claim, batch, start, seen)
        elif labels is not None and seen is None:
            raise UsageError(
                f"the forward pass of {self._name} was not seen in this batch (does the loop call its parts?), so the "
                "loss cannot be held against its logits; say what it is of: watch(loss, weights=…, batch=batch), "
                "which holds it against val_losses of the batch; or trust it: check=False"
            )
        elif seen is not None:
            own = _is_own(loss, seen)
            named = labels if labels is not None or not own else labels_by_name(self._model, seen, len(weights))
            without = self._refuse_terms(loss, seen, any_term=named is not None)
            words = words_in(self._model, seen, len(weights)) if own else []
            if named is not None:
                settled = self._against_logits(claim, [named], seen, without, said=labels is not None)
            elif words:
                settled = self._against_logits(claim, words, seen, without, guessed=True)
        if settled is None:
            self._say_not_held()
        self._beside = BesideLoss(loss, self._passes, narrow=narrow)
        self._done = settled is not False
        self._let_go()  # after an error above it stays: the loop may watch another loss of this batch

    def check_backward(self, upstream: Tensor) -> None:
        """UsageError if a gradient came to the model's output that is not ``upstream``, what came to the watched loss,
        times that loss's own: another term would enter the scores.
        """
        if self._beside is None:
            return
        try:
            self._beside.refuse(self._model, upstream)
        except UsageError:
            self._done = False  # the next batch's loss is held, too
            raise

    @property
    def _name(self) -> str:
        return type(self._model).__name__

    # What goes into the loss beside the cross-entropy.

    def _refuse_terms(self, loss: Tensor, seen: Seen, *, any_term: bool, seen_by_value: float = inf) -> list[Tensor]:
        """UsageError if another loss in the output is part of this one, unless its share in it is more than
        ``seen_by_value``: the value of the loss has been held already, and shows it.

        Returns those that are part of it with a coefficient of zero.
        """
        without: list[Tensor] = []
        hidden = hidden_auxiliary_loss(loss)
        if hidden is not None:
            raise UsageError(
                f"{self._name} adds an auxiliary loss in its backward pass ({hidden}), which the value of its loss "
                f"does not show: no sample's share of it is known. {_WITHOUT}"
            )
        for name, term in tensors_in(seen.output).items():
            if term.numel() != 1 or term.grad_fn is None or term is loss or term.grad_fn is loss.grad_fn:
                continue
            if not any_term and not _AUXILIARY.search(name):
                continue
            if not depends_on(loss, term):
                continue
            factor = coefficient_of(term, loss)
            if factor == 0.0:
                without.append(term)
                continue
            if factor is None and not _AUXILIARY.search(name):
                continue  # what it is to the loss, its value must show
            share = float("nan") if factor is None else factor * float(term.detach())
            if abs(share - float(loss.detach())) <= 1e-5 * abs(share):
                continue  # the loss itself, perhaps divided
            if abs(share) > seen_by_value:
                continue
            raise UsageError(
                f"the loss of {self._name} that is watched ({float(loss.detach()):.6g}) has a second loss in it: "
                f"{'' if factor is None else f'{factor:g} × '}{name} ({float(term.detach()):.6g}). It is one of the "
                f"whole batch: no sample's share of it is known. {_WITHOUT}"
            )
        return without

    # Against what it is held.

    def _against_logits(
        self,
        claim: _Claim,
        given: list[Tensor],
        seen: Seen,
        without: list[Tensor],
        *,
        said: bool = False,
        guessed: bool = False,
    ) -> bool | None:
        """For the labels ``given``: ``said`` by the user, or ``guessed``, any of them, from what the model was given.

        False if it fits, but every other loss would, too. None if there is nothing to hold it against.
        """
        value, gradient = claim.tolerances
        trusted = claim.explicit and not said  # the weights are the user's word, where nothing says otherwise
        best: list[tuple[Watched, Held, Tensor]] = []
        for labels in given:
            for logits in logits_in(seen.output, labels):
                if not seen.unchanged(logits):
                    continue
                for targets in _targets(logits, labels, also_own_places=not said):
                    watched = self._watched(claim, logits, targets, without, guessed=guessed)
                    held = hold(watched)
                    if held.fits(value, gradient):
                        return held.tells
                    best.append((watched, held, labels))
        if not guessed and (not best or best[0][0].gradient is None):
            # A fused head has no logits, and a fused loss may have worked in place: run it once more without labels.
            for logits in logits_in(self._without_labels(seen, trusted=trusted), given[0]):
                for targets in _targets(logits, given[0], also_own_places=not said):
                    watched = Watched(claim.value, logits, targets, claim.weights, None, 1.0)
                    held = hold(watched)
                    if held.fits(value, gradient):
                        return held.tells
                    best = [(watched, held, given[0])]
        if guessed:
            best = [hit for hit in best if not claim.explicit and names_it(hit[0], hit[2], value)]
            if not best:
                return None
        if not best:
            if trusted:
                return None
            raise UsageError(
                f"{self._name} returns no logits of shape (samples, tokens, words) for labels of shape "
                f"{tuple(given[0].shape)}, with labels nor without, so its loss cannot be held against them; say what "
                "it is of: watch(loss, weights=…), with batch=batch to hold it against val_losses; or trust it: "
                "check=False"
            )
        self._refuse(*best[0], seen, value, gradient)

    def _say_not_held(self) -> None:
        warnings.warn(
            f"the loss of {self._name} that is watched was not held against its logits, nor against val_losses: it is "
            "taken at its word, and a sum that is watched as a mean gives scores that many times too large. If it is "
            "the mean next-token loss over the targets, say watch(loss, labels=labels), with labels (samples, tokens); "
            "if it is of another kind, watch(loss, batch=batch) holds it against val_losses of the train batch",
            RuntimeWarning,
            stacklevel=4,
        )

    def _without_labels(self, seen: Seen, *, trusted: bool) -> Any:
        try:
            return output_without_labels(self._model, seen)
        except UsageError:
            if trusted:
                return None
            raise

    def _watched(
        self, claim: _Claim, logits: Tensor, targets: Tensor, without: list[Tensor], *, guessed: bool
    ) -> Watched:
        """With its gradient at the logits, where that can be had without running what is not ours twice."""
        gradient, scale = None, 1.0
        if logits.requires_grad:
            way = way_to(claim.loss, logits, without)
            if way.beside and not guessed:
                self._refuse_beside(claim, way.beside)
            if way.logits is not None and way.native:
                scale = float(min(4096, max(1, int((targets != IGNORED).sum()))))  # float16 would lose small ones
                gradient = gradient_at(claim.loss, way.logits, logits, scale)
        return Watched(claim.value, logits.detach(), targets, claim.weights, gradient, scale)

    def _refuse_beside(self, claim: _Claim, parameters: list[Tensor]) -> None:
        name_of = {id(parameter): name for name, parameter in self._model.named_parameters()}
        names = sorted({name_of.get(id(parameter), "one outside the model") for parameter in parameters})
        raise UsageError(
            f"the loss of {self._name} that is watched ({claim.value:.6g}) reaches {len(names)} parameters "
            f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) without passing through the logits: it has a "
            f"second loss in it, and no sample's share of that is known. {_WITHOUT} (a term that is zero may be added "
            "after watch())"
        )

    def _refuse(
        self, watched: Watched, held: Held, labels: Tensor, seen: Seen, value: float, gradient: float
    ) -> NoReturn:
        counts_B = watched.counts.double()
        by_targets = torch.allclose(watched.weights * counts_B.sum(), counts_B * watched.weights.sum(), rtol=1e-6)
        what = "the mean next-token loss over the targets in its labels"
        if not by_targets:
            what = "Σ weights × each sample's mean next-token loss"
        by = f"{held.expected:.6g}; {_percent(held.value_error)} off"
        if held.value_error <= value:
            by = f"{held.expected:.6g}, but its gradient is {_percent(held.gradient_error)} off"
        raise UsageError(
            f"the loss of {self._name} that is watched ({watched.loss:.6g}) is not {what} ({by}): "
            f"{explain(watched, labels, value, items_in(seen))}"
        )

    def _against_val_losses(self, claim: _Claim, batch: Any, start: Start, seen: Seen | None) -> bool:
        """False if it fits, but the losses held so far would fit other weights, or a loss of another kind, as well."""
        with replayed(self._model, start), torch.no_grad():
            losses = self._val_losses(self._model, batch)
        weights = claim.weights
        if losses.shape != weights.shape:
            raise UsageError(
                f"val_losses gave losses of shape {tuple(losses.shape)} for the train batch of {len(weights)} samples; "
                "one loss a sample is needed"
            )
        shares = torch.where(weights == 0, 0.0, losses.to(weights.device).double() * weights)
        expected = float(shares.sum())
        error, allowed = abs(claim.value - expected), claim.tolerances[0] * abs(expected) + 1e-9
        fits = error <= allowed
        if seen is not None:
            self._refuse_terms(claim.loss, seen, any_term=False, seen_by_value=2 * allowed if fits else inf)
        if not fits:
            off = error / abs(expected) if expected else float("inf")
            raise UsageError(
                f"the loss of {self._name} that is watched ({claim.value:.6g}) is not Σ weights × val_losses(model, "
                f"batch) ({expected:.6g}; {_percent(off)} off): the loss that trains and val_losses must be of "
                "one kind, with the weights that watch() is told (without any, the mean over samples), watched before "
                "it is divided or multiplied"
            )
        self._range.add(losses[(weights != 0).to(losses.device)])
        return not self._range.alike


_WITHOUT = (
    "Train without it (a mixture of experts: output_router_logits=False, in the call or in the model's config), or "
    "compute a loss from the logits, and watch that and train on it alone"
)


def _targets(logits: Tensor, labels: Tensor, *, also_own_places: bool) -> list[Tensor]:
    targets = [next_tokens(logits, labels)]
    if also_own_places and labels.shape == logits.shape[:2]:
        targets.append(labels.to(logits.device))
    return targets


def _pass_of(loss: Tensor, passes: list[Seen]) -> Seen | None:
    """The last forward pass whose output the loss is made of; where that does not show, the last one."""
    for seen in passes[::-1] if len(passes) > 1 else []:
        if any(term.grad_fn is not None and depends_on(loss, term) for term in tensors_in(seen.output).values()):
            return seen
    return passes[-1] if passes else None


def _is_own(loss: Tensor, seen: Seen) -> bool:
    """Whether it is the loss that the model returned, or made of it."""
    output = seen.output
    if isinstance(output, Tensor):
        return loss is output
    terms = tensors_in(output)
    own = [terms["loss"]] if "loss" in terms else [term for term in terms.values() if term.numel() == 1]
    return any(term.requires_grad and depends_on(loss, term) for term in own)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error < 1 else f"{error:.2g} times"
