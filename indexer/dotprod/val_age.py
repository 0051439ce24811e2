"""The age of the val gradient in optimizer steps, where each step is reported."""

from __future__ import annotations

from torch import nn

from ghoststore.errors import UsageError
from indexer.dotprod.ledger import version_of


class ValAge:
    """The age of the val gradient of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: int | None = None
        """Optimizer steps since the val gradient was computed; None if there is none for these weights."""
        self._model = model
        self._complete = True
        self._step_reported = False
        self._version_at_compute = self._version_at_detach = -1

    def stepped(self) -> None:
        """Count an optimizer step."""
        self._step_reported = True
        if self.steps is not None:
            self.steps += 1

    def computed(self, *, complete: bool) -> None:
        """The val gradient was computed for the present weights. Not ``complete``: it is NaN until the first step."""
        self._complete = complete
        self.steps, self._version_at_compute = 0, version_of(self._model)

    def forget(self) -> None:
        """Note that there is no val gradient to use."""
        self.steps = None

    def due(self, interval: int) -> bool:
        """Whether the val gradient must be computed again."""
        return self.steps is None or self.steps >= (interval if self._complete else 1)

    def attached(self) -> None:
        """The engine is attached again. If the weights changed meanwhile, the val gradient is of no use."""
        if version_of(self._model) != self._version_at_detach:
            self.steps = None

    def detached(self) -> None:
        """The engine is detached: remember the version of the weights."""
        self._version_at_detach = version_of(self._model)

    def refuse_unreported(self) -> None:
        """UsageError if the weights changed and no step was ever reported."""
        if self.steps == 0 and not self._step_reported and version_of(self._model) != self._version_at_compute:
            raise UsageError(
                "the weights changed after the val gradient was computed, but no optimizer step was reported: give the "
                "engine the optimizer, or call stepped() after each of its steps; after loading weights, refresh()"
            )
