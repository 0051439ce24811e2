"""Which tapped layers are known to see the samples of a batch on their first axis. Found out once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.encode.forward_probe import ABSENT, Call, CallKeeper, CannotRun, strangers
from indexer.encode.modes import buffers_kept, evaluating, uncompiled
from indexer.encode.sample_axis import PROBE_SIZES, AxisProbe, refuse_mixed, taken
from indexer.layers import LayerType

Losses = Callable[[nn.Module, Any], Tensor]


class KnownAxes:
    """The verdicts on the layers ``kinds`` of ``model``, by name; ``trusted``: all are taken to be right.

    :meth:`probe` reweights the losses of val samples (:mod:`indexer.encode.sample_axis`); in the first train batch of
    two samples or more :meth:`check_train` has the model run on some of them (:mod:`indexer.encode.forward_probe`).
    Both must agree, but for layers that val samples do not reach, where the second alone decides.
    """

    def __init__(self, model: nn.Module, kinds: Mapping[str, LayerType], *, trusted: bool) -> None:
        self._model, self._kinds = model, kinds
        self._known: set[str] = set(kinds) if trusted else set()
        self._ran: set[str] = set()
        self._probed = self._followed = trusted
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
        return self._followed and len(self._known) == len(self._kinds)

    def probe(self, losses: Losses, batch: Any, size: int) -> None:
        """Reweight the losses of a val batch of ``size``, and of two and of three samples of it, the first time.

        CaptureError that names every layer whose rows are not the samples'.
        """
        if self._probed or not size:
            return
        probe = AxisProbe(self._model, self._kinds)
        with uncompiled(), evaluating(self._model), buffers_kept(self._model):
            if size > 1:
                probe.run(partial(losses, self._model, batch), size, more_of_the_same=True)
            for count in PROBE_SIZES:
                some = taken(batch, [place % size for place in range(count)], size)
                try:
                    probe.run(partial(losses, self._model, some), count, more_of_the_same=True)
                except CaptureError:
                    raise
                except Exception:  # noqa: BLE001 - a function of the user's: it may know one size of batch alone
                    break  # what the whole batch did not show, the first train batch will
        probe.refuse()
        self._known |= probe.seen
        self._probed = True

    def ran(self, name: str) -> None:
        """Layer ``name`` takes part in the train batch that is open."""
        if not self.complete:
            self._ran.add(name)

    def begin_train(self) -> None:
        """A train batch begins."""
        self._ran = set()
        if self._keeper is not None:
            self._keeper.begin(wanted=not self.complete)

    def end_train(self) -> None:
        """It is closed: nothing of it is kept."""
        if self._keeper is not None:
            self._keeper.forget()

    def check_train(self, batch: int) -> None:
        """Look at the layers of the train batch of ``batch`` samples, the first time, and later at those that did not
        run before. CaptureError that names every layer whose input does not follow the samples.
        """
        unknown = self._ran - self._known
        if not unknown and (self._followed or batch < 2):
            return
        call = None if self._keeper is None else self._keeper.call
        if call is None and unknown:
            raise CaptureError(
                f"it cannot be told which axis of {', '.join(sorted(unknown)[:5])} carries the samples: no val "
                "sample's loss reaches it, and the model itself is not called in the training step, only parts of it. "
                "Give val_data whose val_losses reach it, call the model, or leave it out with exclude_layers"
            )
        if call is not None:
            refuse_mixed(self._strangers(call, batch, unknown), len(self._kinds))
        self._followed |= batch > 1
        self._known |= unknown

    def _strangers(self, call: Call, batch: int, unknown: set[str]) -> dict[str, str]:
        try:
            layers = unknown if self._followed else self._ran
            with uncompiled():
                problems = strangers(self._model, call, batch, layers, outputs=bool(unknown))
        except CannotRun:
            if unknown:
                raise
            return {}  # reweighted losses have told
        return {name: problem for name, problem in problems.items() if problem != ABSENT or name in unknown}
