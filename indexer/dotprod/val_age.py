"""How old the val gradient is: in optimizer steps, as long as each of them was told of."""

from __future__ import annotations

from torch import nn

from ghoststore.errors import UsageError
from indexer.dotprod.ledger import version_of


class ValAge:
    """Of the val gradient of one model."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: int | None = None
        """Optimizer steps since the val gradient was computed; None: it is not, or not of these weights."""
        self._model = model
        self._complete = True
        self._step_reported = False
        self._version_then = self._version_at_detach = -1

    def stepped(self) -> None:
        """The optimizer has made a step."""
        self._step_reported = True
        if self.steps is not None:
            self.steps += 1

    def computed(self, *, complete: bool) -> None:
        """The val gradient is that of the weights as they are; not ``complete``: it is NaN until there is a step."""
        self._complete = complete
        self.steps, self._version_then = 0, version_of(self._model)

    def forget(self) -> None:
        """There is no val gradient that could be used."""
        self.steps = None

    def due(self, interval: int) -> bool:
        """Whether it is to be computed anew."""
        return self.steps is None or self.steps >= (interval if self._complete else 1)

    def attached(self) -> None:
        """The engine watches again: what happened to the weights meanwhile, nobody told."""
        if version_of(self._model) != self._version_at_detach:
            self.steps = None

    def detached(self) -> None:
        """The engine watches no longer."""
        self._version_at_detach = version_of(self._model)

    def refuse_unreported(self) -> None:
        """UsageError if the weights changed and nobody ever told of a step."""
        if self.steps == 0 and not self._step_reported and version_of(self._model) != self._version_then:
            raise UsageError(
                "the weights changed after the val gradient was computed, but no optimizer step was reported: give the "
                "engine the optimizer, or call stepped() after each of its steps; after loading weights, refresh()"
            )
