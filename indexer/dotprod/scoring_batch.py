"""A batch that is scored without being trained on: autograd walks back to the first tap, past every weight gradient.

Legend: B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.held_factors import FactorHolder, HeldFactors, Weighted
from indexer.dotprod.method import Method
from indexer.dotprod.open_batch import OpenBatch
from indexer.dotprod.scores import Scores
from indexer.layers.base import at_least_float

NON_REENTRANT = (
    "checkpoint with use_reentrant=False (of transformers: "
    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))'
)
"""Reentrant checkpointing runs layers under no_grad, and takes part in no pass but that to every parameter."""


class ScoringBatch:
    """What :meth:`GradDotProdEngine.scoring` gives."""

    def __init__(
        self,
        opened: OpenBatch,
        loss_scale: float,
        method: Method,
        holder: FactorHolder | None,
        scored: Callable[[OpenBatch, Tensor], Scores],
        tolerance: Callable[[], float],
    ) -> None:
        """``scored`` closes the batch and gives its scores, after the backward pass; ``holder`` with ``hold=True``."""
        self._opened, self._method, self._holder = opened, method, holder
        self._scored, self._tolerance = scored, tolerance
        self._scale = loss_scale / (1 << (opened.size - 1).bit_length()) if loss_scale != 1.0 else 1.0
        """float16: as a mean over the batch would have it, rounded to a power of two, so that dividing is exact."""
        self._held: HeldFactors | None = None
        self._finite_B = torch.zeros(0, dtype=torch.bool)

    def scores(self, losses_B: Tensor) -> Scores:
        """The scores of the samples, after their forward pass. ``losses_B`` (B,) are their own losses.

        NaN where a loss is not finite (a sample without targets). UsageError for losses of another shape, a second call
        or a model whose checkpointing cannot do it, CaptureError for losses without a gradient and, in the first
        pass, where the taps see something else than autograd.
        """
        self._refuse(losses_B)
        self._opened.forwarded = True
        self._refuse_without_graph()
        self._finite_B = torch.isfinite(losses_B.detach())
        expected = self._walk(at_least_float(losses_B.masked_fill(~self._finite_B, 0.0)).sum() * self._scale)
        held = None
        if self._holder is not None:
            with torch.no_grad(), torch.autocast(losses_B.device.type, enabled=False):
                held = self._holder.take(expected, self._tolerance())
        scores = self._scored(self._opened, self._finite_B.double() * self._scale)
        self._held = held
        return scores

    def _refuse(self, losses_B: Tensor) -> None:
        if self._opened.forwarded:
            raise UsageError("this batch has been scored; open a scoring pass for each forward pass")
        if self._opened.closed:
            raise UsageError("this scoring pass is closed: call scores() before its with block ends")
        if losses_B.shape != (self._opened.size,):
            raise UsageError(
                f"there are losses of shape {tuple(losses_B.shape)} for a batch of {self._opened.size} samples: give "
                "one loss a sample"
            )
        if not losses_B.requires_grad:
            raise CaptureError("the losses carry no gradient: was the forward pass under torch.no_grad()?")

    def _refuse_without_graph(self) -> None:
        names = self._opened.without_graph
        if names:
            layers = f"{', '.join(names[:5])} ({len(names)} in all)"
            raise UsageError(
                f"layers ran without a graph: {layers}. Under gradient checkpointing {NON_REENTRANT}; under "
                "torch.no_grad(), leave them out with exclude_layers, or freeze them"
            )

    def _walk(self, total: Tensor) -> dict[str, Tensor | None]:
        """Have every tap see the gradient at its output; the gradients that held factors are held against."""
        assert self._opened.leaf is not None
        held = {} if self._holder is None else self._holder.awaiting_parameters()
        others = {id(parameter): parameter for parameter in self._method.awaiting_parameters()}
        for parameter in held.values():
            others.pop(id(parameter), None)
        wanted = [self._opened.leaf, *held.values(), *others.values()]
        try:
            reached, *gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UsageError(f"for a scoring pass {NON_REENTRANT}") from error
        if reached is None:
            raise CaptureError("the losses do not depend on any scored layer")
        return dict(zip(held, gradients, strict=False))

    def add_gradients(self, weights_B: Tensor) -> None:
        """Add Σ_i weights[i] ∇ℓ_i to ``.grad`` of every trainable parameter, from what ``hold=True`` held; once.

        ``weights_B`` (B,) are finite. Samples of weight 0 cost nothing. Every parameter that the losses depend on has a
        ``.grad`` afterwards, zeros where all weights are 0. Under a loss scaler give the weights times its scale. No
        hook of a parameter runs, so DistributedDataParallel does not sum over ranks: the caller does.

        UsageError without ``hold=True``, before :meth:`scores`, a second time, for other weights, and if a factor was
        changed in place.
        """
        held = self._held
        if held is None or self._holder is None:
            raise UsageError(
                "nothing is held of this batch: open it with scoring(…, hold=True), call scores(), and "
                "add_gradients() once"
            )
        device = self._finite_B.device
        weights_B = torch.as_tensor(weights_B).detach().to(device=device, dtype=torch.float64)
        if weights_B.shape != self._finite_B.shape:
            raise UsageError(
                f"there are weights for {tuple(weights_B.shape)} samples, but the batch has {self._opened.size}"
            )
        if not bool(torch.isfinite(weights_B).all()):
            raise UsageError("a weight of add_gradients() is not finite")
        if bool(weights_B[~self._finite_B].any()):
            places = (~self._finite_B).nonzero().flatten().tolist()
            raise UsageError(f"the loss of sample(s) {places[:5]} is not finite: give them the weight 0")
        held.refuse_changed()
        self._held = None
        weighted = Weighted.of(weights_B / self._scale)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for name in list(held.uses):
                parameter = self._holder.ledger.parameters[name].parameter
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if weighted is not None:
                    held.add_gradient(name, weighted, parameter.grad)
                del held.uses[name]  # as gradients come, factors go
