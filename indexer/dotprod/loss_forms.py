"""What a language model's loss is of: held against its logits, and named where it is something else.

Legend: B samples, T tokens, V vocabulary, N = B·T places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from indexer.encode.losses import IGNORED

CHUNK_NUMBERS = 1 << 22
"""Logits worked on at a time: the check must not need more memory than the training step."""

_LARGEST_DIVISOR = 64

ALIKE = 1e-3
"""Relative: losses this near to one another tell by their value alone neither weights nor targets nor kinds apart.

A head that starts at zero gives each place log V, whatever its target.
"""


@dataclass(frozen=True, slots=True)
class Watched:
    """A loss as it was watched: Σ_i weights[i] · (mean cross-entropy over the targets of sample i)."""

    loss: float
    logits: Tensor
    """(B, T, V), detached."""
    targets: Tensor
    """(B, T): the label that each place predicts, -100 where it predicts none."""
    weights: Tensor
    """(B,) float64."""
    gradient: Tensor | None
    """(B, T, V): ``scale`` times that of the loss at the logits; None where it cannot be had."""
    scale: float

    @property
    def counts(self) -> Tensor:
        """(B,): targets of each sample."""
        return (self.targets != IGNORED).sum(1)


@dataclass(frozen=True, slots=True)
class Held:
    """What was watched beside what the logits say."""

    expected: float
    value_error: float
    """Relative, of the loss."""
    gradient_error: float
    """Relative, of the norm of its gradient at the logits; 0.0 where that is not known."""
    tells: bool
    """Whether another loss would not fit as well: its gradient is known, or the places differ in theirs."""

    def fits(self, value: float, gradient: float) -> bool:
        """Whether both errors are within these tolerances (NaN is not)."""
        return self.value_error <= value and self.gradient_error <= gradient


class Range:
    """From the least to the largest of some losses."""

    def __init__(self) -> None:
        self._least, self._largest = float("inf"), float("-inf")

    def add(self, losses: Tensor) -> None:
        """More of them, of any shape."""
        if losses.numel():
            self._least = min(self._least, float(losses.min()))
            self._largest = max(self._largest, float(losses.max()))

    @property
    def alike(self) -> bool:
        """Whether they are one number, as near as :data:`ALIKE`."""
        size = max(abs(self._least), abs(self._largest))
        return not self._largest - self._least > ALIKE * size


def next_tokens(logits_BTV: Tensor, labels: Tensor) -> Tensor:
    """(B, T): the label after each place. ``labels`` has as many places as the logits, or one more."""
    targets_BT = labels[:, 1:].to(logits_BTV.device)
    if targets_BT.shape[1] == logits_BTV.shape[1]:
        return targets_BT
    return F.pad(targets_BT, (0, 1), value=IGNORED)


def hold(watched: Watched) -> Held:
    """Σ over targets of share · cross-entropy, chunk by chunk in float32, and its gradient softmax − one-hot."""
    share_N = _shares(watched.weights, watched.targets).flatten()
    logits_NV, target_N = watched.logits.flatten(0, 1), watched.targets.flatten()
    gradient_NV = None if watched.gradient is None else watched.gradient.flatten(0, 1)
    value, error, size = (torch.zeros((), dtype=torch.float64, device=logits_NV.device) for _ in range(3))
    spread = Range()
    for part in _chunks(logits_NV):
        place_N1, log_p = target_N[part].clamp_min(0).unsqueeze(1), logits_NV[part].float().log_softmax(1)
        absent_N1 = target_N[part].unsqueeze(1) == IGNORED  # their logits need not be finite
        each_N1 = -log_p.gather(1, place_N1)
        value += (each_N1.masked_fill(absent_N1, 0.0).squeeze(1).double() * share_N[part]).sum()
        if gradient_NV is None:
            spread.add(each_N1[~absent_N1])
            continue
        expected = log_p.exp_()
        expected.scatter_add_(1, place_N1, torch.full_like(expected[:, :1], -1.0))
        expected *= (share_N[part] * watched.scale).float().unsqueeze(1)
        expected.masked_fill_(absent_N1, 0.0)
        size += expected.square().sum(dtype=torch.float64)
        error += (gradient_NV[part].float() - expected).square().sum(dtype=torch.float64)
    gap = abs(watched.loss - float(value))
    return Held(
        expected=float(value),
        value_error=gap / abs(float(value)) if float(value) else (float("inf") if gap else 0.0),
        gradient_error=float((error / size).sqrt()) if float(size) else (float("inf") if float(error) else 0.0),
        tells=gradient_NV is not None or not spread.alike,
    )


def _shares(weights_B: Tensor, targets_BT: Tensor) -> Tensor:
    """(B, T) float64: what each place's cross-entropy counts in the loss."""
    there_BT = (targets_BT != IGNORED).double()
    share_B = weights_B.to(targets_BT.device) / there_BT.sum(1).clamp_min(1)
    return there_BT * share_B.unsqueeze(1)


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_NUMBERS // logits_NV.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits_NV), step))


# What it is instead. This is the way to an error: clear rather than lean.


Loss = Callable[[Tensor, slice], Tensor]
"""Of the logits (N, V) at some of the places, and which these are: their part of the loss."""


def names_it(watched: Watched, labels: Tensor, tolerance: float) -> bool:
    """Whether :func:`explain` knows what the loss is, by its gradient: its value alone can be had by chance."""
    return watched.gradient is not None and any(
        _is(watched, loss_of, tolerance) for loss_of, _ in _guesses(watched, labels, None)
    )


def explain(watched: Watched, labels: Tensor, tolerance: float, items: float | None = None) -> str:
    """What the loss is, and what to do; where nothing fits, what to do alone. ``items`` is ``num_items_in_batch``."""
    for loss_of, words in _guesses(watched, labels, items):
        if _is(watched, loss_of, tolerance):
            return words if watched.gradient is not None else f"by its value, {words}"
    return f"what else it is of is not known; {_OWN}"


_OWN = (
    "compute a next-token loss from the logits (no labels for the model) and watch that; or, for a loss of another "
    "kind, give the engine val_losses of that kind and call watch(loss, weights=…, batch=batch)"
)


def _guesses(watched: Watched, labels: Tensor, items: float | None) -> Iterator[tuple[Loss, str]]:
    counts_B, targets_BT = watched.counts.double(), watched.targets
    if items:
        yield (
            _cross_entropy(targets_BT, counts_B / items),
            f"it is the sum over the targets, divided by num_items_in_batch ({items:g}): "
            f"watch(loss, weights=(labels[:, 1:] != -100).sum(1) / {items:g}, labels=labels)",
        )
    own_BT = labels.to(targets_BT.device)
    if own_BT.shape == targets_BT.shape:
        own_counts_B = (own_BT != IGNORED).sum(1).double()
        for weights_B in (own_counts_B / own_counts_B.sum(), watched.weights):
            yield (
                _cross_entropy(own_BT, weights_B),
                "it is the cross-entropy at the labels' own places, not shifted. If the labels are meant so (shifted "
                "already), say so: watch(loss, labels=torch.cat([labels[:, :1], labels], 1)); for classes of tokens, "
                "which are no next tokens, watch(loss, weights=n / n.sum()), with n = (labels != -100).sum(1). Else "
                "compute a next-token loss from the logits (no labels for the model) and watch(loss, labels=labels)",
            )
    there_B = (counts_B > 0).double()
    mean = _cross_entropy(targets_BT, counts_B / counts_B.sum())
    yield mean, "it is the mean over all targets: watch(loss, labels=labels)"
    yield (
        _cross_entropy(targets_BT, counts_B),
        "it is the sum over the targets, not the mean: divide it by their number, or say "
        "watch(loss, weights=(labels[:, 1:] != -100).sum(1), labels=labels)",
    )
    for number, words in (
        (len(counts_B), "watch(loss)"),
        (float(there_B.sum()), "watch(loss, weights=w / w.sum()), with w = (labels[:, 1:] != -100).any(1)"),
    ):
        yield (
            _cross_entropy(targets_BT, there_B / number),
            f"it is the mean over the samples of their own means: {words}",
        )
    claimed = _cross_entropy(targets_BT, watched.weights)
    factor = _coefficient(watched, lambda logits, part: 0.0 * claimed(logits, part), claimed)
    yield from _multiples(claimed, factor, _rounded(watched, factor))
    spread, z_loss = _spread(watched), _z(watched)
    smoothing = _coefficient(watched, claimed, lambda logits, part: spread(logits, part) - claimed(logits, part))
    if 0.0 < smoothing < 1.0:
        epsilon = _rounded(watched, smoothing)
        yield (
            lambda logits, part: (1 - epsilon) * claimed(logits, part) + epsilon * spread(logits, part),
            f"it is that of label smoothing {epsilon:g}: train without it, or {_OWN}",
        )
    z = _rounded(watched, _coefficient(watched, claimed, z_loss))
    if 0.0 < z < 0.01:
        yield (
            lambda logits, part: claimed(logits, part) + z * z_loss(logits, part),
            f"it has a z-loss in it, {z:g} × the mean of log²Σexp(logits): train without it, or {_OWN}",
        )


def _multiples(claimed: Loss, factor: float, rounded: float) -> Iterator[tuple[Loss, str]]:
    if factor <= 0.0 or rounded == 1.0:
        return
    divisor = round(1 / factor)
    if 2 <= divisor <= _LARGEST_DIVISOR:
        yield (
            lambda logits, part: claimed(logits, part) / divisor,
            f"it is that divided by {divisor}: watch it before it is divided (for accumulation)",
        )
    yield (
        lambda logits, part: claimed(logits, part) * rounded,
        f"it is that times {rounded:g}: watch it before it is multiplied, or say watch(loss, weights=…, labels=labels)",
    )


def _cross_entropy(targets_BT: Tensor, weights_B: Tensor) -> Loss:
    share_N, target_N = _shares(weights_B, targets_BT).flatten(), targets_BT.flatten()

    def loss_of(logits_NV: Tensor, part: slice) -> Tensor:
        each_N = F.cross_entropy(logits_NV, target_N[part], ignore_index=IGNORED, reduction="none")
        return (each_N.double() * share_N[part]).sum()

    return loss_of


def _spread(watched: Watched) -> Loss:
    """Cross-entropy against all words alike."""
    share_N = _shares(watched.weights, watched.targets).flatten()
    return lambda logits_NV, part: (-logits_NV.log_softmax(1).mean(1).double() * share_N[part]).sum()


def _z(watched: Watched) -> Loss:
    share_N = _shares(watched.weights, watched.targets).flatten()
    return lambda logits_NV, part: (logits_NV.logsumexp(1).double().square() * share_N[part]).sum()


def _coefficient(watched: Watched, base: Loss, direction: Loss) -> float:
    """c of loss = base + c · direction: by least squares of gradients, where there is one, else of values."""
    left, reach, product, size = watched.loss, 0.0, 0.0, 0.0
    for given, (at_base, at_direction) in _pieces(watched, base, direction):
        left, reach = left - at_base[0], reach + at_direction[0]
        if given is not None:
            rest = given.double() / watched.scale - at_base[1]
            product += float((rest * at_direction[1]).sum())
            size += _squares(at_direction[1])
    if watched.gradient is None:
        return left / reach if reach else 0.0
    return product / size if size else 0.0


def _rounded(watched: Watched, coefficient: float) -> float:
    """As people choose them. One number, the value, can be had with some coefficient of anything; few are round."""
    return float(f"{coefficient:.{2 if watched.gradient is None else 3}g}")


def _is(watched: Watched, loss_of: Loss, tolerance: float) -> bool:
    value, error, size = 0.0, 0.0, 0.0
    for given, ((part_value, gradient),) in _pieces(watched, loss_of):
        value += part_value
        if given is not None:
            error += _squares(given.float() / watched.scale - gradient)
            size += _squares(gradient)
    return abs(watched.loss - value) <= tolerance * abs(value) and sqrt(error) <= 0.02 * sqrt(size)


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _pieces(watched: Watched, *losses: Loss) -> Iterator[tuple[Tensor | None, list[tuple[float, Tensor]]]]:
    """Chunk by chunk: the gradient (N, V) that was seen, and the part of each loss with its own gradient."""
    logits_NV = watched.logits.flatten(0, 1)
    gradient_NV = None if watched.gradient is None else watched.gradient.flatten(0, 1)
    for part in _chunks(logits_NV):
        at = [_at(logits_NV[part], part, loss_of) for loss_of in losses]
        yield None if gradient_NV is None else gradient_NV[part], at


def _at(logits_NV: Tensor, part: slice, loss_of: Loss) -> tuple[float, Tensor]:
    with torch.enable_grad(), torch.autocast(logits_NV.device.type, enabled=False):
        logits_NV = logits_NV.detach().float().requires_grad_()
        value = loss_of(logits_NV, part)
        (gradient_NV,) = torch.autograd.grad(value, logits_NV)
    return float(value.detach()), gradient_NV
