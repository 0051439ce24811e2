"""The val gradient: the val samples, their groups, and the pass that computes it.

Legend: V val samples, G groups of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.axes import KnownAxes
from indexer.dotprod.method import Method
from indexer.dotprod.val_data import (
    ValLossError,
    ValLosses,
    batches_of,
    computes_in_float16,
    language_model_losses,
    size_of,
)
from indexer.dotprod.val_targets import Groups, group_names, rows_with_targets
from indexer.encode.modes import evaluating, uncompiled
from indexer.encode.tap import See
from indexer.encode.uses import CallWindows


class ValGradient:
    """The val samples of one model, and the pass over them."""

    def __init__(self, model: nn.Module, method: Method, losses: ValLosses, windows: CallWindows | None = None) -> None:
        """``windows`` show uses of weights where no tap sees them."""
        self.losses = losses
        self.batches: list[Any] = []
        self.group_names: list[str] = []
        """In the order of ``Scores.groups``; known after the first pass."""
        self.group_share: Tensor | None = None
        """(G,) float64: share of each group in the val samples; None before the first pass."""
        self.leaf: Tensor | None = None
        """While a val batch is open, the tensor that makes autograd reach its taps."""
        self._model, self._method = model, method
        self._groups: Groups = None
        self._first = 0
        self._windows = windows
        self.hidden: list[str] = []
        """Parameters that the val losses use where no tap sees it."""

    def set(self, val_data: Any, groups: Sequence[str] | Literal["each"] | None) -> None:
        """Replace the val samples. Rows of a language model without targets are left out."""
        batches = batches_of(val_data)
        if self.losses is language_model_losses:
            batches, groups = rows_with_targets(batches, groups)
        self.batches, self._groups = batches, groups

    @property
    def samples(self) -> int:
        """Number of val samples."""
        return sum(size_of(batch) for batch in self.batches)

    def examine(self, axes: KnownAxes) -> None:
        """Check ``axes`` with the losses of the first val batch."""
        if self.batches:
            axes.probe(self.losses, self.batches[0], size_of(self.batches[0]))

    def see(self, name: str, tokens: int, interval: int) -> See:
        """The tap of module ``name`` for the open val batch."""
        return self._method.see_val(name, self._first, tokens, interval, len(self.batches))

    def compute(self, loss_scale: float, tolerance: Callable[[], float], begin_batch: Callable[[int], None]) -> bool:
        """Compute the val gradient: one pass, or more with a smaller loss scale until everything is finite.

        ``begin_batch`` is called with the size of each val batch before its forward pass. Returns False if the
        optimizer has no metric yet, so that scores are NaN.

        UsageError if a val sample's loss is not finite. CaptureError if the gradient is not finite or differs from
        autograd's.
        """
        if self.losses is language_model_losses and not computes_in_float16(self._model):
            loss_scale = 1.0  # no other dtype needs it
        checked = dict(self._method.checked_parameters())
        while (expected := self._pass(loss_scale, checked, begin_batch)) is None:
            if loss_scale <= 1.0:
                raise CaptureError("the val gradient is not finite; are the weights, or a val sample, out of range?")
            loss_scale = max(1.0, loss_scale / 16)
        if checked:
            self._method.check_val(expected, tolerance())
        return self._method.put_in_metric()

    def _pass(
        self, scale: float, checked: dict[str, nn.Parameter], begin_batch: Callable[[int], None]
    ) -> dict[str, Tensor] | None:
        """Run one pass over the val batches.

        Returns autograd's gradient of the mean loss for the parameters ``checked``; None if something was not finite.
        """
        if not self.batches:
            raise UsageError("there is no val set: give `val_data`, or call set_validation()")
        device = next(self._model.parameters()).device
        self._name_groups(self.samples, device)
        expected = {
            name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            for name, p in checked.items()
        }
        self._first, self.hidden = 0, []
        with uncompiled(), evaluating(self._model), torch.enable_grad():
            for batch in self.batches:
                size = size_of(batch)
                self.leaf = torch.zeros((), device=device, requires_grad=True)
                begin_batch(size)
                if self._windows is not None:
                    self._windows.begin()
                try:
                    self._backward(self.losses(self._model, batch), size, scale, checked, expected)
                finally:
                    self.leaf = None
                self._method.end_val_batch()
                self._first += size
        for gradient in expected.values():
            gradient.div_(self._first * scale)
        return expected if self._method.end_val(scale) else None

    def _backward(
        self, losses_V: Tensor, size: int, scale: float, checked: dict[str, nn.Parameter], expected: dict[str, Tensor]
    ) -> None:
        if losses_V.shape != (size,):
            raise UsageError(
                f"`val_losses` gave losses of shape {tuple(losses_V.shape)} for a val batch of {size} samples; "
                "one loss a sample is needed"
            )
        if not bool(torch.isfinite(losses_V).all()):
            indexes = (~torch.isfinite(losses_V)).nonzero().flatten() + self._first
            raise ValLossError(indexes.tolist())
        assert self.leaf is not None
        total = losses_V.sum() if scale == 1.0 else losses_V.sum() * scale
        if not total.requires_grad:
            raise CaptureError("the val losses carry no gradient: does `val_losses` run under torch.no_grad()?")
        reached, *gradients = torch.autograd.grad(total, [self.leaf, *checked.values()], allow_unused=True)
        if reached is None:
            raise CaptureError("the val losses do not depend on any scored layer")
        if self._windows is not None:
            self.hidden = self.hidden or self._windows.hidden(total)
        for into, gradient in zip(expected.values(), gradients, strict=True):
            if gradient is not None:
                into += gradient.to_dense() if gradient.is_sparse else gradient

    def _name_groups(self, count: int, device: torch.device) -> None:
        if count < 1:
            raise UsageError("the val set has no samples")
        names = group_names(self._groups, count) or ["val"] * count
        self.group_names = list(dict.fromkeys(names))
        index_of = {name: index for index, name in enumerate(self.group_names)}
        group_V = torch.tensor([index_of[name] for name in names], device=device)
        self.group_share = torch.bincount(group_V, minlength=len(index_of)).double() / count
        self._method.begin_val(group_V, len(index_of), device)
