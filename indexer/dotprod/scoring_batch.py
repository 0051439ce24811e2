"""A batch that is scored but not trained on: autograd runs back to the first tap and forms no weight gradient.

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
"""Reentrant checkpointing runs layers under no_grad, and works only in a backward pass to all parameters."""


class ScoringBatch:
    """The open batch of :meth:`GradDotProdEngine.scoring`."""

    def __init__(
        self,
        open_batch: OpenBatch,
        loss_scale: float,
        method: Method,
        holder: FactorHolder | None,
        finish: Callable[[OpenBatch, Tensor], Scores],
        tolerance: Callable[[], float],
        look_for_hidden: Callable[[Tensor], None],
    ) -> None:
        """``finish`` closes the batch and returns its scores after the backward pass; ``holder`` with ``hold=True``."""
        self._open_batch, self._method, self._holder = open_batch, method, holder
        self._finish, self._tolerance, self._look_for_hidden = finish, tolerance, look_for_hidden
        self._scale = loss_scale / (1 << (open_batch.size - 1).bit_length()) if loss_scale != 1.0 else 1.0
        """In float16 a power of two near the scale of a mean over the batch: dividing by it is exact."""
        self._held: HeldFactors | None = None
        self._finite_B = torch.zeros(0, dtype=torch.bool)

    def scores(self, losses_B: Tensor) -> Scores:
        """Return the scores of the samples, after their forward pass. ``losses_B`` (B,) holds one loss a sample.

        A score is NaN if the loss is not finite (a sample without targets). UsageError for losses of another shape, a
        second call or reentrant checkpointing. CaptureError for losses without a gradient and, in the first pass, if
        the taps and autograd differ.
        """
        self._refuse(losses_B)
        self._open_batch.forwarded = True
        self._refuse_without_graph()
        self._finite_B = torch.isfinite(losses_B.detach())
        expected = self._backward(at_least_float(losses_B.masked_fill(~self._finite_B, 0.0)).sum() * self._scale)
        held = None
        if self._holder is not None:
            with torch.no_grad(), torch.autocast(losses_B.device.type, enabled=False):
                held = self._holder.take(expected, self._tolerance())
        scores = self._finish(self._open_batch, self._finite_B.double() * self._scale)
        self._held = held
        return scores

    def _refuse(self, losses_B: Tensor) -> None:
        if self._open_batch.forwarded:
            raise UsageError("this batch has been scored; open a scoring pass for each forward pass")
        if self._open_batch.closed:
            raise UsageError("this scoring pass is closed: call scores() before its with block ends")
        if losses_B.shape != (self._open_batch.size,):
            raise UsageError(
                f"there are losses of shape {tuple(losses_B.shape)} for a batch of {self._open_batch.size} samples: "
                "give one loss a sample"
            )
        if not losses_B.requires_grad:
            raise CaptureError("the losses carry no gradient: was the forward pass under torch.no_grad()?")

    def _refuse_without_graph(self) -> None:
        names = self._open_batch.without_graph
        if names:
            layers = f"{', '.join(names[:5])} ({len(names)} in all)"
            raise UsageError(
                f"layers ran without a graph: {layers}. Under gradient checkpointing {NON_REENTRANT}; under "
                "torch.no_grad(), leave them out with `exclude_layers`, or freeze them"
            )

    def _backward(self, total: Tensor) -> dict[str, Tensor | None]:
        """Run the backward pass to the taps. Returns autograd's gradients that the kept factors are compared with."""
        assert self._open_batch.leaf is not None
        held_parameters = {} if self._holder is None else self._holder.awaiting_parameters()
        method_parameters = {id(parameter): parameter for parameter in self._method.awaiting_parameters()}
        for parameter in held_parameters.values():
            method_parameters.pop(id(parameter), None)
        inputs = [self._open_batch.leaf, *held_parameters.values(), *method_parameters.values()]
        try:
            reached, *gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UsageError(f"for a scoring pass {NON_REENTRANT}") from error
        if reached is None:
            raise CaptureError("the losses do not depend on any scored layer")
        self._look_for_hidden(total)
        if self._holder is not None:
            self._holder.look_for_hidden(total)
        return dict(zip(held_parameters, gradients, strict=False))

    def add_gradients(self, weights_B: Tensor) -> None:
        """Add Σ_i weights[i] ∇ℓ_i to ``.grad`` of every trainable parameter, from what ``hold=True`` held; once.

        ``weights_B`` (B,) must be finite. Samples of weight 0 cost nothing. Every parameter that the losses depend on
        has a ``.grad`` afterwards: zeros if all weights are 0. Under a loss scaler multiply the weights by its scale.
        No hook of a parameter runs, so DistributedDataParallel does not sum over ranks: sum yourself.

        UsageError without ``hold=True``, before :meth:`scores`, in a second call, for weights of another shape or that
        are not finite, and if a factor was changed in place.
        """
        held = self._held
        if held is None or self._holder is None:
            raise UsageError(
                "nothing is held of this batch: open it with `hold=True` in scoring(), call scores(), and "
                "add_gradients() once"
            )
        device = self._finite_B.device
        weights_B = torch.as_tensor(weights_B).detach().to(device=device, dtype=torch.float64)
        if weights_B.shape != self._finite_B.shape:
            raise UsageError(
                f"there are weights for {tuple(weights_B.shape)} samples, but the batch has {self._open_batch.size}"
            )
        if not bool(torch.isfinite(weights_B).all()):
            raise UsageError("a weight of add_gradients() is not finite")
        if bool(weights_B[~self._finite_B].any()):
            indexes = (~self._finite_B).nonzero().flatten().tolist()
            raise UsageError(f"the loss of sample(s) {indexes[:5]} is not finite: give them the weight 0")
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
                del held.uses[name]  # frees the factors as the gradients appear
