"""A batch that is scored without being trained on: autograd walks back to the first tap, past every weight gradient.

Legend: B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ghoststore.errors import CaptureError, UsageError
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
        self, opened: OpenBatch, loss_scale: float, method: Method, scored: Callable[[OpenBatch, Tensor], Scores]
    ) -> None:
        """``scored`` closes the batch and gives its scores, after the backward pass."""
        self._opened, self._method, self._scored = opened, method, scored
        self._scale = loss_scale / (1 << (opened.size - 1).bit_length()) if loss_scale != 1.0 else 1.0
        """float16: as a mean over the batch would have it, rounded to a power of two, so that dividing is exact."""

    def scores(self, losses_B: Tensor) -> Scores:
        """The scores of the samples, after their forward pass. ``losses_B`` (B,) are their own losses.

        NaN where a loss is not finite (a sample without targets). UsageError for losses of another shape, a second call
        or a model whose checkpointing cannot do it, CaptureError for losses without a gradient and, in the first
        pass, where the taps see something else than autograd.
        """
        opened = self._opened
        if opened.forwarded:
            raise UsageError("this batch has been scored; open a scoring pass for each forward pass")
        if losses_B.shape != (opened.size,):
            raise UsageError(
                f"there are losses of shape {tuple(losses_B.shape)} for a batch of {opened.size} samples: give one "
                "loss a sample"
            )
        if not losses_B.requires_grad:
            raise CaptureError("the losses carry no gradient: was the forward pass under torch.no_grad()?")
        opened.forwarded = True
        if opened.without_graph:
            layers = f"{', '.join(opened.without_graph[:5])} ({len(opened.without_graph)} in all)"
            raise UsageError(
                f"scored layers ran without a graph: {layers}. Under gradient checkpointing {NON_REENTRANT}; under "
                "torch.no_grad(), leave them out with exclude_layers"
            )
        finite_B = torch.isfinite(losses_B.detach())
        self._backward(at_least_float(losses_B.masked_fill(~finite_B, 0.0)).sum() * self._scale)
        return self._scored(opened, finite_B.double() * self._scale)

    def _backward(self, total: Tensor) -> None:
        """Have every tap see the gradient at its output; also what the first batch is held against."""
        assert self._opened.leaf is not None
        try:
            reached, *_ = torch.autograd.grad(
                total, [self._opened.leaf, *self._method.awaiting_parameters()], allow_unused=True
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UsageError(f"for a scoring pass {NON_REENTRANT}") from error
        if reached is None:
            raise CaptureError("the losses do not depend on any scored layer")
