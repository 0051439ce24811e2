"""The val set of an engine: what it is, when its gradient is due, and the pass that computes it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ghoststore.errors import UsageError
from indexer.dotprod.axes import KnownAxes
from indexer.dotprod.method import Method
from indexer.dotprod.open_batch import OpenBatch
from indexer.dotprod.val_age import ValAge
from indexer.dotprod.val_gradient import ValGradient


class ValSide:
    """The side of an engine that faces its val set. The engine makes the parts that are named here."""

    method: Method
    val_refresh_interval: int
    on_val_batch: Callable[[int], object]
    """Called with the size of each val batch before its forward pass."""
    _val: ValGradient
    _age: ValAge
    _axes: KnownAxes
    _train: OpenBatch | None
    _size: int
    _seconds: float

    @abstractmethod
    def _require_attached(self) -> None: ...

    @abstractmethod
    def _tolerance(self) -> float: ...

    @property
    def val_batches(self) -> list[Any]:
        """The val set as given, less the rows without a target; empty without a val set."""
        return list(self._val.batches)

    @property
    def val_due(self) -> bool:
        """Whether the next :meth:`prepare` computes the val gradient."""
        return self._age.due(self.val_refresh_interval) and (self.method.needs_val or bool(self._val.batches))

    @property
    def val_samples(self) -> int:
        """Samples in the val set."""
        return self._val.samples

    @property
    def group_names(self) -> list[str]:
        """Names of the val groups, in the order of ``Scores.groups``; known after the first val pass."""
        return self._val.group_names

    def stepped(self) -> None:
        """Report an optimizer step. An engine with ``optimizer`` calls this itself."""
        self._age.stepped()

    def set_validation(self, val_data: Any, groups: Sequence[str] | Literal["each"] | None = None) -> None:
        """Replace the val samples. The next :meth:`prepare` computes their gradient."""
        self._val.set(val_data, groups)
        self._age.forget()

    def refresh(self, loss_scale: float = 1.0) -> None:
        """Compute the val gradient now.

        ``loss_scale`` multiplies the val losses, and the gradient is divided by it: float16 needs that.
        UsageError if a val sample's loss is not finite. CaptureError if the gradient is not finite or differs from
        autograd's.
        """
        self._require_attached()
        if self._train is not None:
            raise UsageError("a train batch is open; call collect() or discard() before refresh()")
        started = time.perf_counter()
        self._age.forget()  # an error below leaves half a gradient behind, which must not be used
        self.examine()
        self._age.computed(complete=self._val.compute(loss_scale, self._tolerance, self._begin_val_batch))
        self._seconds += time.perf_counter() - started

    def examine(self) -> None:
        """Check that the first axis of each layer carries the samples, unless that is known. :meth:`refresh` does, too.

        CaptureError naming every layer that mixes the samples of a batch.
        """
        self._val.examine(self._axes)

    def _begin_val_batch(self, size: int) -> None:
        self._size = size
        self.on_val_batch(size)
