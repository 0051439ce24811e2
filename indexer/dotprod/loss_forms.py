"""Compares a language model's loss with its logits, and explains what another loss is.

Legend: B samples, T tokens, V vocabulary, N = B·T positions.
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
"""Logits in memory at a time: the check must not need more memory than the training step."""

_LARGEST_DIVISOR = 64
"""Most accumulation steps that a loss is guessed to be divided by."""

ALIKE = 1e-3
"""Relative. Losses that differ by less do not show by their value which weights, targets or kind of loss it is.

A head that starts at zero gives each position log V, whatever its target.
"""


@dataclass(frozen=True, slots=True)
class WatchedLoss:
    """A loss and what it is said to be: Σ_i weights[i] · (mean cross-entropy over the targets of sample i)."""

    loss: float
    logits: Tensor
    """(B, T, V), detached."""
    targets: Tensor
    """(B, T): the label that each position predicts, -100 where it predicts none."""
    weights: Tensor
    """(B,) float64."""
    gradient: Tensor | None
    """(B, T, V): ``scale`` times the gradient of the loss at the logits; None if it is not known."""
    scale: float

    @property
    def counts(self) -> Tensor:
        """(B,): number of targets of each sample."""
        return (self.targets != IGNORED).sum(1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a watched loss is from that of its logits."""

    expected: float
    """The loss by the logits."""
    value_error: float
    """Relative, of the loss."""
    gradient_error: float
    """Relative, of its gradient at the logits, in norm; 0.0 if that is not known."""
    conclusive: bool
    """Whether no other loss would fit as well: the gradient is known, or the losses of the positions differ."""

    def fits(self, value: float, gradient: float) -> bool:
        """Whether both errors are within these tolerances. NaN is not."""
        return self.value_error <= value and self.gradient_error <= gradient


class LossRange:
    """The smallest and the largest of some losses."""

    def __init__(self) -> None:
        self._least, self._largest = float("inf"), float("-inf")

    def add(self, losses: Tensor) -> None:
        """Add losses of any shape."""
        if losses.numel():
            self._least = min(self._least, float(losses.min()))
            self._largest = max(self._largest, float(losses.max()))

    @property
    def alike(self) -> bool:
        """Whether all are equal, up to :data:`ALIKE`."""
        size = max(abs(self._least), abs(self._largest))
        return not self._largest - self._least > ALIKE * size


def next_tokens(logits_BTV: Tensor, labels: Tensor) -> Tensor:
    """(B, T): the label after each position. ``labels`` (B, T) or (B, T + 1)."""
    targets_BT = labels[:, 1:].to(logits_BTV.device)
    if targets_BT.shape[1] == logits_BTV.shape[1]:
        return targets_BT
    return F.pad(targets_BT, (0, 1), value=IGNORED)


def compare(watched: WatchedLoss) -> Comparison:
    """Compare the loss, and its gradient if that is known, with those of the logits.

    The loss is Σ share · cross-entropy over the targets; its gradient is share · (softmax − one-hot). Both are computed
    in float32, chunk by chunk.
    """
    share_N = _shares(watched.weights, watched.targets).flatten()
    logits_NV, target_N = watched.logits.flatten(0, 1), watched.targets.flatten()
    gradient_NV = None if watched.gradient is None else watched.gradient.flatten(0, 1)
    value, error, size = (torch.zeros((), dtype=torch.float64, device=logits_NV.device) for _ in range(3))
    spread = LossRange()
    for part in _chunks(logits_NV):
        index_N1, log_p = target_N[part].clamp_min(0).unsqueeze(1), logits_NV[part].float().log_softmax(1)
        absent_N1 = target_N[part].unsqueeze(1) == IGNORED  # their logits need not be finite
        loss_N1 = -log_p.gather(1, index_N1)
        value += (loss_N1.masked_fill(absent_N1, 0.0).squeeze(1).double() * share_N[part]).sum()
        if gradient_NV is None:
            spread.add(loss_N1[~absent_N1])
            continue
        expected = log_p.exp_()
        expected.scatter_add_(1, index_N1, torch.full_like(expected[:, :1], -1.0))
        expected *= (share_N[part] * watched.scale).float().unsqueeze(1)
        expected.masked_fill_(absent_N1, 0.0)
        size += expected.square().sum(dtype=torch.float64)
        error += (gradient_NV[part].float() - expected).square().sum(dtype=torch.float64)
    gap = abs(watched.loss - float(value))
    return Comparison(
        expected=float(value),
        value_error=gap / abs(float(value)) if float(value) else (float("inf") if gap else 0.0),
        gradient_error=float((error / size).sqrt()) if float(size) else (float("inf") if float(error) else 0.0),
        conclusive=gradient_NV is not None or not spread.alike,
    )


def _shares(weights_B: Tensor, targets_BT: Tensor) -> Tensor:
    """(B, T) float64: the weight of each position's cross-entropy in the loss."""
    has_target_BT = (targets_BT != IGNORED).double()
    share_B = weights_B.to(targets_BT.device) / has_target_BT.sum(1).clamp_min(1)
    return has_target_BT * share_B.unsqueeze(1)


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK_NUMBERS // logits_NV.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits_NV), step))


# What another loss is. This runs only before an error, so it is written to be clear, not fast.


Loss = Callable[[Tensor, slice], Tensor]
"""(logits (N, V) of some positions, which positions these are) to their part of the loss."""


def is_explained(watched: WatchedLoss, labels: Tensor, tolerance: float) -> bool:
    """Whether :func:`explain` recognises the loss by its gradient: a value alone can agree by chance."""
    return watched.gradient is not None and any(
        _matches(watched, loss_of, tolerance) for loss_of, _ in _guesses(watched, labels, None)
    )


def explain(watched: WatchedLoss, labels: Tensor, tolerance: float, items: float | None = None) -> str:
    """Say what the loss is, if it is recognised, and what to do. ``items`` is ``num_items_in_batch``."""
    for loss_of, message in _guesses(watched, labels, items):
        if _matches(watched, loss_of, tolerance):
            return message if watched.gradient is not None else f"by its value, {message}"
    return f"what else it is of is not known; {_OTHER_LOSS}"


_OTHER_LOSS = (
    "compute a next-token loss from the logits (no labels for the model) and watch that; or, for a loss of another "
    "kind, give the engine `val_losses` of that kind and call watch(loss, weights=…, batch=batch)"
)


def _guesses(watched: WatchedLoss, labels: Tensor, items: float | None) -> Iterator[tuple[Loss, str]]:
    counts_B, targets_BT = watched.counts.double(), watched.targets
    if items:
        yield (
            _cross_entropy(targets_BT, counts_B / items),
            f"it is the sum over the targets, divided by num_items_in_batch ({items:g}): "
            f"watch(loss, weights=(labels[:, 1:] != -100).sum(1) / {items:g}, labels=labels)",
        )
    unshifted_BT = labels.to(targets_BT.device)
    if unshifted_BT.shape == targets_BT.shape:
        unshifted_counts_B = (unshifted_BT != IGNORED).sum(1).double()
        for weights_B in (unshifted_counts_B / unshifted_counts_B.sum(), watched.weights):
            yield (
                _cross_entropy(unshifted_BT, weights_B),
                "it is the cross-entropy at the labels' own places, not shifted. If the labels are meant so (shifted "
                "already), say so: watch(loss, labels=torch.cat([labels[:, :1], labels], 1)); for classes of tokens, "
                "which are no next tokens, watch(loss, weights=n / n.sum()), with n = (labels != -100).sum(1). Else "
                "compute a next-token loss from the logits (no labels for the model) and watch(loss, labels=labels)",
            )
    has_target_B = (counts_B > 0).double()
    mean = _cross_entropy(targets_BT, counts_B / counts_B.sum())
    yield mean, "it is the mean over all targets: watch(loss, labels=labels)"
    yield (
        _cross_entropy(targets_BT, counts_B),
        "it is the sum over the targets, not the mean: divide it by their number, or say "
        "watch(loss, weights=(labels[:, 1:] != -100).sum(1), labels=labels)",
    )
    for number, message in (
        (len(counts_B), "watch(loss)"),
        (float(has_target_B.sum()), "watch(loss, weights=w / w.sum()), with w = (labels[:, 1:] != -100).any(1)"),
    ):
        yield (
            _cross_entropy(targets_BT, has_target_B / number),
            f"it is the mean over the samples of their own means: {message}",
        )
    claimed = _cross_entropy(targets_BT, watched.weights)
    factor = _coefficient(watched, lambda logits, part: 0.0 * claimed(logits, part), claimed)
    yield from _multiples(claimed, factor, _rounded(watched, factor))
    spread, z_loss = _uniform_cross_entropy(watched), _z_loss(watched)
    smoothing = _coefficient(watched, claimed, lambda logits, part: spread(logits, part) - claimed(logits, part))
    if 0.0 < smoothing < 1.0:
        epsilon = _rounded(watched, smoothing)
        yield (
            lambda logits, part: (1 - epsilon) * claimed(logits, part) + epsilon * spread(logits, part),
            f"it is that of label smoothing {epsilon:g}: train without it, or {_OTHER_LOSS}",
        )
    z = _rounded(watched, _coefficient(watched, claimed, z_loss))
    if 0.0 < z < 0.01:
        yield (
            lambda logits, part: claimed(logits, part) + z * z_loss(logits, part),
            f"it has a z-loss in it, {z:g} × the mean of log²Σexp(logits): train without it, or {_OTHER_LOSS}",
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
        loss_N = F.cross_entropy(logits_NV, target_N[part], ignore_index=IGNORED, reduction="none")
        return (loss_N.double() * share_N[part]).sum()

    return loss_of


def _uniform_cross_entropy(watched: WatchedLoss) -> Loss:
    """Cross-entropy against the uniform distribution over the vocabulary."""
    share_N = _shares(watched.weights, watched.targets).flatten()
    return lambda logits_NV, part: (-logits_NV.log_softmax(1).mean(1).double() * share_N[part]).sum()


def _z_loss(watched: WatchedLoss) -> Loss:
    share_N = _shares(watched.weights, watched.targets).flatten()
    return lambda logits_NV, part: (logits_NV.logsumexp(1).double().square() * share_N[part]).sum()


def _coefficient(watched: WatchedLoss, base: Loss, direction: Loss) -> float:
    """c of loss = base + c · direction: by least squares over the gradient if it is known, else by the value."""
    rest, reach, product, size = watched.loss, 0.0, 0.0, 0.0
    for gradient_NV, (at_base, at_direction) in _by_chunk(watched, base, direction):
        rest, reach = rest - at_base[0], reach + at_direction[0]
        if gradient_NV is not None:
            difference_NV = gradient_NV.double() / watched.scale - at_base[1]
            product += float((difference_NV * at_direction[1]).sum())
            size += _squares(at_direction[1])
    if watched.gradient is None:
        return rest / reach if reach else 0.0
    return product / size if size else 0.0


def _rounded(watched: WatchedLoss, coefficient: float) -> float:
    """Round the coefficient: any term explains a value with some coefficient, but people choose round ones."""
    return float(f"{coefficient:.{2 if watched.gradient is None else 3}g}")


def _matches(watched: WatchedLoss, loss_of: Loss, tolerance: float) -> bool:
    value, error, size = 0.0, 0.0, 0.0
    for gradient_NV, ((part_value, expected_NV),) in _by_chunk(watched, loss_of):
        value += part_value
        if gradient_NV is not None:
            error += _squares(gradient_NV.float() / watched.scale - expected_NV)
            size += _squares(expected_NV)
    return abs(watched.loss - value) <= tolerance * abs(value) and sqrt(error) <= 0.02 * sqrt(size)


def _squares(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _by_chunk(watched: WatchedLoss, *losses: Loss) -> Iterator[tuple[Tensor | None, list[tuple[float, Tensor]]]]:
    """By chunk of positions: the known gradient (N, V), and for each of ``losses`` its part and gradient."""
    logits_NV = watched.logits.flatten(0, 1)
    gradient_NV = None if watched.gradient is None else watched.gradient.flatten(0, 1)
    for part in _chunks(logits_NV):
        parts = [_value_and_gradient(logits_NV[part], part, loss_of) for loss_of in losses]
        yield None if gradient_NV is None else gradient_NV[part], parts


def _value_and_gradient(logits_NV: Tensor, part: slice, loss_of: Loss) -> tuple[float, Tensor]:
    with torch.enable_grad(), torch.autocast(logits_NV.device.type, enabled=False):
        logits_NV = logits_NV.detach().float().requires_grad_()
        value = loss_of(logits_NV, part)
        (gradient_NV,) = torch.autograd.grad(value, logits_NV)
    return float(value.detach()), gradient_NV
