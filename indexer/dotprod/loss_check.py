"""Checks that the loss that trains is the one that is scored: compares the first watched loss with the model's logits.

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
from indexer.dotprod.forward_record import (
    ForwardRecord,
    ForwardState,
    labels_by_name,
    logits_in,
    num_items_in,
    output_without_labels,
    replayed,
    tensors_in,
    token_inputs,
)
from indexer.dotprod.loss_forms import (
    Comparison,
    LossRange,
    WatchedLoss,
    compare,
    explain,
    is_explained,
    next_tokens,
)
from indexer.dotprod.loss_graph import coefficient_of, depends_on, gradient_at, hidden_auxiliary_loss, path_to
from indexer.dotprod.output_gradients import OutputGradients
from indexer.dotprod.val_data import ValLosses
from indexer.encode.losses import IGNORED
from indexer.encode.modes import outside_graphs

WIDE, NARROW = (1e-4, 1e-3), (1e-3, 2e-2)
"""Relative tolerances of the loss and of its gradient at the logits: in float32, and where 16-bit numbers take part.

The gradient says more than the value: at the initial weights of a model every cross-entropy is about log V.
"""


@dataclass(frozen=True, slots=True)
class _Claim:
    """What the caller of ``watch`` says: ``loss`` = Σ_i weights[i]·ℓ_i, weights (B,) float64."""

    loss: Tensor
    weights: Tensor
    explicit: bool
    """Whether the user gave the weights."""
    narrow: bool
    """Whether 16-bit numbers take part."""

    @property
    def value(self) -> float:
        """The number that was watched."""
        return float(self.loss.detach())

    @property
    def tolerances(self) -> tuple[float, float]:
        """Relative tolerances of the loss and of its gradient at the logits."""
        value, gradient = NARROW if self.narrow else WIDE
        return value + (torch.finfo(self.loss.dtype).eps if _is_narrow(self.loss) else 0.0), gradient


_AUXILIARY = re.compile(r"aux|router|balanc|z_loss|penalt", re.IGNORECASE)


class LossCheck:
    """Keeps the forward pass of the first training batch until its loss is watched, and compares the two.

    An engine does this once: after the first loss that is finite and differs from every other, it keeps nothing.
    """

    def __init__(self, model: nn.Module, val_losses: ValLosses, *, enabled: bool) -> None:
        self._model = model
        self._val_losses = val_losses
        self._done = not enabled
        self._open = False
        self._range = LossRange()
        """Of the samples' losses in all comparisons with val_losses."""
        self._state: ForwardState | None = None
        self._passes: list[ForwardRecord] = []
        """Forward passes of the open batch, in order."""
        self._output_gradients: OutputGradients | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LossCheck:
        """Return this object: a deep copy of the model copies its hooks, which must not act on the copy."""
        return self

    def attach(self) -> list[RemovableHandle]:
        """Put hooks on the model, and return them; none once the check is done."""
        if self._done:
            return []
        return [
            outside_graphs(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)),
            outside_graphs(self._model.register_forward_hook(self._after_forward, with_kwargs=True)),
        ]

    def begin(self) -> None:
        """Begin a train batch."""
        if not self._done:
            self._open, self._state = True, ForwardState.current(self._model)

    def forget(self) -> None:
        """End the train batch and drop all that was kept of it."""
        self._release()
        if self._output_gradients is not None:
            self._output_gradients.close()
            self._output_gradients = None

    def _release(self) -> None:
        self._open, self._state, self._passes = False, None, []

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._open and module is self._model and torch.is_grad_enabled():  # a deep copy has this hook, too
            self._state = ForwardState.current(self._model)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self._open and module is self._model and torch.is_grad_enabled():
            assert self._state is not None
            self._passes.append(ForwardRecord.of(args, kwargs, output, self._state))

    def check(
        self, loss: Tensor, weights: Tensor, *, labels: Tensor | None, batch: Any, explicit: bool, narrow: bool
    ) -> None:
        """Check that ``loss`` = Σ_i weights[i]·ℓ_i, weights (B,) float64.

        ℓ comes from ``val_losses`` of ``batch`` if that is given, else from the logits and ``labels`` (B, T), else, if
        the model itself returned the loss, from the logits and the labels that the model was given. ``explicit`` says
        that the user gave the weights. If the loss is not finite, has no target, or every other loss of these logits
        would fit as well, the next batch is checked, too.

        RuntimeWarning if there is nothing to compare with. UsageError if it is another loss, or cannot be compared.
        """
        if self._done:
            return
        record = _pass_of(loss, self._passes)
        state = self._state if record is None else record.state
        assert state is not None
        if not bool(torch.isfinite(loss.detach()).all()) or not bool(weights.any()):
            self._release()
            return
        narrow |= state.autocast is not None or _is_narrow(loss) or any(map(_is_narrow, self._model.parameters()))
        claim = _Claim(loss, weights, explicit, narrow)
        settled: bool | None = None
        if batch is not None:
            settled = self._against_val_losses(claim, batch, state, record)
        elif labels is not None and record is None:
            raise UsageError(
                f"the forward pass of {self._name} was not seen in this batch (does the loop call its parts?), so the "
                "loss cannot be compared with its logits; say what it is of: watch(loss, weights=…, batch=batch), "
                "which compares it with `val_losses` of the batch; or trust it: `check=False`"
            )
        elif record is not None:
            own = _is_model_loss(loss, record)
            named = labels if labels is not None or not own else labels_by_name(self._model, record, len(weights))
            zero_terms = self._refuse_terms(loss, record, any_term=named is not None)
            inputs = token_inputs(self._model, record, len(weights)) if own else []
            if named is not None:
                settled = self._against_logits(claim, [named], record, zero_terms, labels_given=labels is not None)
            elif inputs:
                settled = self._against_logits(claim, inputs, record, zero_terms, guessed=True)
        if settled is None:
            self._warn_unchecked()
        self._output_gradients = OutputGradients(loss, self._passes, narrow=narrow)
        self._done = settled is not False
        self._release()  # kept after an error above: the loop may watch another loss of this batch

    def check_backward(self, upstream: Tensor) -> None:
        """UsageError if another term than the watched loss went backward: it would enter the scores.

        ``upstream`` is the gradient that the watched loss received.
        """
        if self._output_gradients is None:
            return
        try:
            self._output_gradients.refuse(self._model, upstream)
        except UsageError:
            self._done = False  # the next batch is checked, too
            raise

    @property
    def _name(self) -> str:
        return type(self._model).__name__

    # Terms of the loss beside the cross-entropy.

    def _refuse_terms(
        self, loss: Tensor, record: ForwardRecord, *, any_term: bool, visible: float = inf
    ) -> list[Tensor]:
        """UsageError if another loss in the output is a term of this one.

        Terms larger than ``visible`` pass: the value of the loss was compared already, and would show them. So do
        terms with a coefficient of zero, which are returned. ``any_term``: look at all outputs of one number, not only
        at those with the name of an auxiliary loss.
        """
        zero_terms: list[Tensor] = []
        hidden = hidden_auxiliary_loss(loss)
        if hidden is not None:
            raise UsageError(
                f"{self._name} adds an auxiliary loss in its backward pass ({hidden}), which the value of its loss "
                f"does not show: no sample's share of it is known. {_TRAIN_WITHOUT}"
            )
        for name, term in tensors_in(record.output).items():
            if term.numel() != 1 or term.grad_fn is None or term is loss or term.grad_fn is loss.grad_fn:
                continue
            if not any_term and not _AUXILIARY.search(name):
                continue
            if not depends_on(loss, term):
                continue
            factor = coefficient_of(term, loss)
            if factor == 0.0:
                zero_terms.append(term)
                continue
            if factor is None and not _AUXILIARY.search(name):
                continue  # the value of the loss must show it
            share = float("nan") if factor is None else factor * float(term.detach())
            if abs(share - float(loss.detach())) <= 1e-5 * abs(share):
                continue  # the loss itself, perhaps divided for accumulation
            if abs(share) > visible:
                continue
            raise UsageError(
                f"the loss of {self._name} that is watched ({float(loss.detach()):.6g}) has a second loss in it: "
                f"{'' if factor is None else f'{factor:g} × '}{name} ({float(term.detach()):.6g}). It is one of the "
                f"whole batch: no sample's share of it is known. {_TRAIN_WITHOUT}"
            )
        return zero_terms

    # What the loss is compared with.

    def _against_logits(
        self,
        claim: _Claim,
        candidates: list[Tensor],
        record: ForwardRecord,
        zero_terms: list[Tensor],
        *,
        labels_given: bool = False,
        guessed: bool = False,
    ) -> bool | None:
        """Compare with the logits for one of ``candidates``, labels (B, T).

        ``labels_given``: by the user. ``guessed``: they are inputs of the model that may be labels. Returns False if
        the loss fits, but every other would, too; None if there is nothing to compare with.
        """
        value, gradient = claim.tolerances
        trusted = claim.explicit and not labels_given  # the user knows, where there is nothing to compare with
        attempts: list[tuple[WatchedLoss, Comparison, Tensor]] = []
        for labels in candidates:
            for logits in logits_in(record.output, labels):
                if not record.unchanged(logits):
                    continue
                for targets in _targets(logits, labels, also_unshifted=not labels_given):
                    watched = self._watched(claim, logits, targets, zero_terms, guessed=guessed)
                    comparison = compare(watched)
                    if comparison.fits(value, gradient):
                        return comparison.conclusive
                    attempts.append((watched, comparison, labels))
        if not guessed and (not attempts or attempts[0][0].gradient is None):
            # A fused head returns no logits, and a fused loss may overwrite them: run the model without labels.
            for logits in logits_in(self._without_labels(record, trusted=trusted), candidates[0]):
                for targets in _targets(logits, candidates[0], also_unshifted=not labels_given):
                    watched = WatchedLoss(claim.value, logits, targets, claim.weights, None, 1.0)
                    comparison = compare(watched)
                    if comparison.fits(value, gradient):
                        return comparison.conclusive
                    attempts = [(watched, comparison, candidates[0])]
        if guessed:
            attempts = [
                attempt for attempt in attempts if not claim.explicit and is_explained(attempt[0], attempt[2], value)
            ]
            if not attempts:
                return None
        if not attempts:
            if trusted:
                return None
            raise UsageError(
                f"{self._name} returns no logits of shape (samples, tokens, words) for labels of shape "
                f"{tuple(candidates[0].shape)}, with labels nor without, so its loss cannot be compared with them; "
                "say what it is of: watch(loss, weights=…), with `batch=batch` to compare it with `val_losses`; or "
                "trust it: `check=False`"
            )
        self._refuse(*attempts[0], record, value, gradient)

    def _warn_unchecked(self) -> None:
        warnings.warn(
            f"the loss of {self._name} that is watched was not compared with its logits, nor with `val_losses`: it is "
            "taken at its word, and a sum that is watched as a mean gives scores that many times too large. If it is "
            "the mean next-token loss over the targets, say watch(loss, labels=labels), with labels (samples, tokens); "
            "if it is of another kind, watch(loss, batch=batch) compares it with `val_losses` of the train batch",
            RuntimeWarning,
            stacklevel=4,
        )

    def _without_labels(self, record: ForwardRecord, *, trusted: bool) -> Any:
        try:
            return output_without_labels(self._model, record)
        except UsageError:
            if trusted:
                return None
            raise

    def _watched(
        self, claim: _Claim, logits: Tensor, targets: Tensor, zero_terms: list[Tensor], *, guessed: bool
    ) -> WatchedLoss:
        """The loss with its gradient at the logits, if no custom backward has to run twice for that."""
        gradient, scale = None, 1.0
        if logits.requires_grad:
            path = path_to(claim.loss, logits, zero_terms)
            if path.bypassing and not guessed:
                self._refuse_bypassing(claim, path.bypassing)
            if path.node is not None and path.native:
                scale = float(min(4096, max(1, int((targets != IGNORED).sum()))))  # float16 loses small gradients
                gradient = gradient_at(claim.loss, path.node, logits, scale)
        return WatchedLoss(claim.value, logits.detach(), targets, claim.weights, gradient, scale)

    def _refuse_bypassing(self, claim: _Claim, parameters: list[Tensor]) -> None:
        name_of = {id(parameter): name for name, parameter in self._model.named_parameters()}
        names = sorted({name_of.get(id(parameter), "one outside the model") for parameter in parameters})
        raise UsageError(
            f"the loss of {self._name} that is watched ({claim.value:.6g}) reaches {len(names)} parameters "
            f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''}) without passing through the logits: it has a "
            f"second loss in it, and no sample's share of that is known. {_TRAIN_WITHOUT} (a term that is zero may be "
            "added after watch())"
        )

    def _refuse(
        self,
        watched: WatchedLoss,
        comparison: Comparison,
        labels: Tensor,
        record: ForwardRecord,
        value: float,
        gradient: float,
    ) -> NoReturn:
        counts_B = watched.counts.double()
        by_targets = torch.allclose(watched.weights * counts_B.sum(), counts_B * watched.weights.sum(), rtol=1e-6)
        what = "the mean next-token loss over the targets in its labels"
        if not by_targets:
            what = "Σ weights × each sample's mean next-token loss"
        by = f"{comparison.expected:.6g}; {_percent(comparison.value_error)} off"
        if comparison.value_error <= value:
            by = f"{comparison.expected:.6g}, but its gradient is {_percent(comparison.gradient_error)} off"
        raise UsageError(
            f"the loss of {self._name} that is watched ({watched.loss:.6g}) is not {what} ({by}): "
            f"{explain(watched, labels, value, num_items_in(record))}"
        )

    def _against_val_losses(self, claim: _Claim, batch: Any, state: ForwardState, record: ForwardRecord | None) -> bool:
        """Compare with val_losses of ``batch``. False if it fits, but the losses are so alike that any weights fit."""
        with replayed(self._model, state), torch.no_grad():
            losses = self._val_losses(self._model, batch)
        weights = claim.weights
        if losses.shape != weights.shape:
            raise UsageError(
                f"`val_losses` gave losses of shape {tuple(losses.shape)} for the train batch of {len(weights)} "
                "samples; one loss a sample is needed"
            )
        shares = torch.where(weights == 0, 0.0, losses.to(weights.device).double() * weights)
        expected = float(shares.sum())
        error, allowed = abs(claim.value - expected), claim.tolerances[0] * abs(expected) + 1e-9
        fits = error <= allowed
        if record is not None:
            self._refuse_terms(claim.loss, record, any_term=False, visible=2 * allowed if fits else inf)
        if not fits:
            off = error / abs(expected) if expected else float("inf")
            raise UsageError(
                f"the loss of {self._name} that is watched ({claim.value:.6g}) is not Σ weights × val_losses(model, "
                f"batch) ({expected:.6g}; {_percent(off)} off): the loss that trains and `val_losses` must be of "
                "one kind, with the weights that watch() is told (without any, the mean over samples), watched before "
                "it is divided or multiplied"
            )
        self._range.add(losses[(weights != 0).to(losses.device)])
        return not self._range.alike


_TRAIN_WITHOUT = (
    "Train without it (a mixture of experts: output_router_logits=False, in the call or in the model's config), or "
    "compute a loss from the logits, and watch that and train on it alone"
)


def _targets(logits: Tensor, labels: Tensor, *, also_unshifted: bool) -> list[Tensor]:
    targets = [next_tokens(logits, labels)]
    if also_unshifted and labels.shape == logits.shape[:2]:
        targets.append(labels.to(logits.device))
    return targets


def _pass_of(loss: Tensor, passes: list[ForwardRecord]) -> ForwardRecord | None:
    """The last forward pass that the loss depends on; the last one if that is not visible in its graph."""
    for record in passes[::-1] if len(passes) > 1 else []:
        if any(term.grad_fn is not None and depends_on(loss, term) for term in tensors_in(record.output).values()):
            return record
    return passes[-1] if passes else None


def _is_model_loss(loss: Tensor, record: ForwardRecord) -> bool:
    """Whether the loss is the one that the model returned, or depends on it."""
    output = record.output
    if isinstance(output, Tensor):
        return loss is output
    terms = tensors_in(output)
    own = [terms["loss"]] if "loss" in terms else [term for term in terms.values() if term.numel() == 1]
    return any(term.requires_grad and depends_on(loss, term) for term in own)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %" if error < 1 else f"{error:.2g} times"
