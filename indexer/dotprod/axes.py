"""Which tapped layers are known to see the samples of a batch on their first axis. Found out once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from indexer.forward_probe import CallKeeper, strangers
from indexer.layers import LayerType
from indexer.modes import evaluating
from indexer.sample_axis import PROBE_SIZES, AxisProbe, refuse_mixed, taken

Losses = Callable[[nn.Module, Any], Tensor]


class KnownAxes:
    """The verdicts on the layers ``kinds`` of ``model``, by name; ``trusted``: all are taken to be right.

    :meth:`probe` reweights the losses of val samples. A layer that took no part in these is looked at in the first
    train batch that runs it, see :mod:`indexer.forward_probe`.
    """

    def __init__(self, model: nn.Module, kinds: Mapping[str, LayerType], *, trusted: bool) -> None:
        self._model, self._kinds = model, kinds
        self._known: set[str] = set(kinds) if trusted else set()
        self._ran: set[str] = set()
        self._probed = trusted
        self._keeper: CallKeeper | None = None

    def attach(self) -> None:
        """Watch what the model is called with, as long as something is not known."""
        if not self.complete:
            self._keeper = CallKeeper(self._model)

    def detach(self) -> None:
        """Take the hook away."""
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to find out."""
        return len(self._known) == len(self._kinds)

    def probe(self, losses: Losses, batch: Any, size: int, loss_scale: float) -> None:
        """Reweight the losses of two and of three samples of a val batch of ``size``, the first time this is called.

        CaptureError that names every layer whose rows are not the samples'.
        """
        if self._probed or not size:
            return
        with evaluating(self._model):
            probe = self._resized(losses, batch, size, loss_scale)
            if probe is None and size > 1:  # one that knows one size of batch alone
                probe = AxisProbe(self._model, self._kinds)
                self._run(probe, partial(losses, self._model, batch), size, loss_scale)
        if probe is not None:
            probe.refuse()
            self._known |= probe.seen
        self._probed = True

    def _resized(self, losses: Losses, batch: Any, size: int, scale: float) -> AxisProbe | None:
        """The probe of two and of three samples of ``batch``; None where that says nothing."""
        probe = AxisProbe(self._model, self._kinds)
        try:
            for count in PROBE_SIZES:
                some = taken(batch, [place % size for place in range(count)], size)
                if not self._run(probe, partial(losses, self._model, some), count, scale):
                    return None
        except CaptureError:
            raise
        except Exception as error:
            if size > 1:
                return None
            raise UsageError(
                f"val_losses cannot be run on {PROBE_SIZES[0]} copies of the val sample ({error}), so it cannot be "
                "told which axis of each layer carries the samples; give a val batch of two samples or more"
            ) from error
        return probe

    @staticmethod
    def _run(probe: AxisProbe, losses: Callable[[], Tensor], size: int, scale: float) -> bool:
        while not (told := probe.run(losses, size, scale)) and scale > 1.0:
            scale = max(1.0, scale / 16)
        return told

    def ran(self, name: str) -> None:
        """Layer ``name`` takes part in the train batch that is open."""
        if name not in self._known:
            self._ran.add(name)

    def begin_train(self) -> None:
        """A train batch begins."""
        self._ran = set()
        if self._keeper is not None:
            self._keeper.call, self._keeper.wanted = None, not self.complete

    def check_train(self, batch: int) -> None:
        """The layers of the train batch of ``batch`` samples that were not known before. CaptureError that names every
        layer whose input does not follow the samples.
        """
        unknown = {name for name in self._ran if name not in self._known}
        if not unknown:
            return
        call = None if self._keeper is None else self._keeper.call
        if call is None:
            raise CaptureError(
                f"it cannot be told which axis of {', '.join(sorted(unknown)[:5])} carries the samples: no val "
                "sample's loss reaches it, and the model itself is not called in the training step, only parts of it. "
                "Give val_data whose val_losses reach it, call the model, or leave it out with exclude_layers"
            )
        refuse_mixed(strangers(self._model, call, batch, unknown), len(self._kinds))
        self._known |= unknown
        self.begin_train()
