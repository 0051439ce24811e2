"""The open train batch: its size, its loss, and the gradient that the loss received in the backward pass.

Legend: B samples of a batch, T tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.segments import Segments
from indexer.dotprod.val_data import target_counts
from indexer.encode.tap import See
from indexer.layers.call import Call

_serials = count()


@dataclass(slots=True, eq=False)
class OpenBatch:
    """A train batch from ``prepare`` to ``collect`` or ``discard``, or the batch of a ``scoring`` pass."""

    size: int
    segments: Segments | None = None
    """Of packed rows, which sample each position belongs to; None where a row is a sample."""
    leaf: Tensor | None = None
    """In a scoring pass, the tensor that makes autograd reach the taps but no weight."""
    weights_B: Tensor | None = None
    """(B,) float64: the watched loss is Σ weights·ℓ; None before it is watched."""
    forwarded: bool = False
    """Whether the forward pass is over: a layer that runs later is one that gradient checkpointing runs again."""
    closed: bool = False
    without_graph: list[str] = field(default_factory=list)
    """In a scoring pass, tapped modules that ran under no_grad, as in reentrant checkpointing."""
    sized: bool = False
    """Whether labels, weights or a layer showed that there are as many samples as ``size``."""
    ran: set[str] = field(default_factory=set)
    """Modules that ran, as their taps saw it."""
    serial: int = field(default_factory=_serials.__next__)
    """The number by which the backward pass of a compiled graph knows the batch."""
    hidden: list[str] = field(default_factory=list)
    """Parameters that the loss uses where no tap sees it."""
    seconds: float = 0.0
    """Time of the taps in the backward pass."""
    _upstreams: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the forward pass: first axis of every layer."""
        return self.size if self.segments is None else self.segments.rows

    def in_time(self, see: See, *, by_sample: bool = False) -> See:
        """``see`` by sample, timed, while the batch is open. A backward pass after it was discarded or collected is
        ignored. ``by_sample``: what comes is by sample already, also in packed rows.
        """
        segments = None if by_sample else self.segments

        def see_in_time(saved: Tensor | Call, dy: Tensor) -> None:
            if self.closed:
                return
            started = time.perf_counter()
            if segments is not None:
                saved, dy = segments.by_sample(saved, dy)
            see(saved, dy)
            self.seconds += time.perf_counter() - started

        return see_in_time

    def add_upstream(self, gradient: Tensor) -> None:
        """Record a gradient that the watched loss received."""
        self._upstreams.append(gradient.detach().double().reshape(()))

    def saw(self, name: str, *, flat: bool) -> None:
        """Note that module ``name`` ran; ``flat``: its rows do not show how many samples there are."""
        self.ran.add(name)
        self.sized |= not flat

    def refuse_unsized(self) -> None:
        """CaptureError if nothing showed that the batch has as many samples as was said."""
        if self.ran and not self.sized:
            raise CaptureError(
                f"every layer saw rows of samples and positions on one axis: nothing shows that there are {self.size} "
                "samples, as prepare() was told. Give watch() the labels, or weights of the samples"
            )

    def refuse_to_watch(self, loss: Tensor) -> None:
        """UsageError or CaptureError for what cannot be the loss of this batch."""
        if self.weights_B is not None:
            raise UsageError("this batch has a watched loss already; watch the one loss that goes through backward()")
        if loss.numel() != 1:
            raise UsageError(f"the training loss is one number, but has shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise CaptureError("the loss carries no gradient: was the forward pass under torch.no_grad()?")

    def weights_of(self, loss: Tensor, weights: Tensor | None, labels: Tensor | None) -> Tensor:
        """(B,) float64: ``weights``; else those of a mean over the targets of ``labels`` (B, T), or over the samples.

        UsageError for another shape, and for packed rows without ``labels``.
        """
        given = labels is not None or weights is not None
        if labels is not None:
            if labels.dim() != 2 or len(labels) != self.rows:
                raise UsageError(
                    f"labels are of tokens, one row a sample: there are labels of shape {tuple(labels.shape)} for a "
                    f"batch of {self.size} samples"
                )
            counts_B = self.counts(labels).to(loss.device).double()
            if weights is None:
                weights = counts_B / counts_B.sum().clamp_min(1)
        elif self.segments is not None:
            raise UsageError("the loss of packed rows is one of tokens: say watch(loss, labels=labels)")
        elif weights is None:
            weights = torch.full((self.size,), 1.0 / self.size, dtype=torch.float64, device=loss.device)
        self.sized |= given
        if weights.shape != (self.size,):
            raise UsageError(f"there are weights for {tuple(weights.shape)} samples, but the batch has {self.size}")
        return weights.to(loss.device).double()

    def counts(self, labels: Tensor) -> Tensor:
        """(B,) int64: targets of each sample in ``labels``, by row."""
        return target_counts(labels) if self.segments is None else self.segments.target_counts(labels)

    def weights_by_row(self, labels: Tensor | None) -> Tensor:
        """(rows,) float64: of the watched loss. Of packed rows UsageError unless they go with the targets."""
        assert self.weights_B is not None
        if self.segments is None or labels is None:
            return self.weights_B
        return self.segments.weights_of_rows(self.weights_B, self.counts(labels))

    @property
    def upstream(self) -> Tensor:
        """() float64: the gradient that the watched loss received, with the factors of accumulation and loss scaler.

        UsageError before a loss is watched, CaptureError unless it went through exactly one backward pass.
        """
        if self.weights_B is None:
            raise UsageError("the loss is not known; call watch(loss) between the forward and the backward pass")
        if not self._upstreams:
            raise CaptureError("no gradient came to the watched loss: call backward() on it before collect()")
        if len(self._upstreams) > 1:
            raise CaptureError("the watched loss went through backward() more than once; prepare() each pass")
        return self._upstreams[0]

    def scale(self) -> Tensor:
        """(B,) float64: the weight of each sample's loss in what went backward. Errors as of :attr:`upstream`."""
        upstream = self.upstream
        assert self.weights_B is not None
        return upstream * self.weights_B
