"""Steps that a loss scaler leaves out, because a gradient was out of range: they change no weight."""

from __future__ import annotations

import torch
from torch.utils.hooks import RemovableHandle

from indexer.dotprod.ledger import unwrapped_optimizer


class LeftOut:
    """Whether the step at hand was left out. ``scaler`` is the loop's; None: no step is."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._scale = 1.0
        self._stepped = False
        self._optimizer = unwrapped_optimizer(optimizer)

    def attach(self) -> RemovableHandle:
        """Watch the optimizer."""

        def stepped(*_: object) -> None:
            self._stepped = True

        assert self._optimizer is not None
        return self._optimizer.register_step_post_hook(stepped)

    def begin(self) -> None:
        """A step begins."""
        self._stepped = False
        if self._scaler is not None:
            self._scale = float(self._scaler.get_scale())

    def learning_rate(self, given: float) -> float:
        """That of the step, which is done: 0 if it was left out, else as ``given``."""
        if self._scaler is None:
            return given
        # A fused optimizer is called all the same, and leaves the step out itself: then the scale has fallen.
        left_out = not self._stepped or float(self._scaler.get_scale()) < self._scale
        return 0.0 if left_out else given
