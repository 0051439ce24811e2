"""Which tapped layers are known to carry the samples of a batch on their first axis. Each layer is checked once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ghoststore.errors import CaptureError
from indexer.dotprod.open_batch import OpenBatch
from indexer.dotprod.packed_check import refuse_mixed_segments
from indexer.dotprod.segments import Segments
from indexer.encode.forward_probe import ABSENT, Call, CallKeeper, CannotRun, strangers
from indexer.encode.graphs import NewGraphs, called, hidden_in_graphs
from indexer.encode.modes import buffers_kept, evaluating, uncompiled
from indexer.encode.sample_axis import PROBE_SIZES, AxisProbe, refuse_mixed, taken
from indexer.layers import LayerType

Losses = Callable[[nn.Module, Any], Tensor]


class KnownAxes:
    """Checks the layers ``kinds`` of ``model``, by name; with ``trusted`` none.

    Two checks must pass. :meth:`probe` reweights the losses of val samples (:mod:`indexer.encode.sample_axis`). In the
    first train batch of at least two samples, :meth:`check_train` runs the model on some of them
    (:mod:`indexer.encode.forward_probe`). A layer that no val sample reaches needs the second alone.
    """

    def __init__(self, model: nn.Module, kinds: Mapping[str, LayerType], *, trusted: bool) -> None:
        self._model, self._kinds, self._trusted = model, kinds, trusted
        self._known: set[str] = set(kinds) if trusted else set()
        self._ran: set[str] = set()
        self._probed = self._train_checked = self._packed_checked = trusted
        self._keeper: CallKeeper | None = None
        self._graphs = NewGraphs()

    def attach(self) -> None:
        """Record what the model is called with, unless the axes are trusted."""
        if not self._trusted:
            self._keeper = CallKeeper(self._model)

    def detach(self) -> None:
        """Remove the hook."""
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None

    @property
    def complete(self) -> bool:
        """Whether every layer has been checked."""
        return self._train_checked and len(self._known) == len(self._kinds)

    def probe(self, losses: Losses, batch: Any, size: int) -> None:
        """Reweight the losses of a val batch of ``size`` samples, and of two and three of them; later calls do nothing.

        CaptureError that names every layer whose rows are not the samples'.
        """
        if self._probed or not size:
            return
        probe = AxisProbe(self._model, self._kinds)
        with uncompiled(), evaluating(self._model), buffers_kept(self._model):
            if size > 1:
                probe.run(partial(losses, self._model, batch), size, more_of_the_same=True)
            for count in PROBE_SIZES:
                subset = taken(batch, [index % size for index in range(count)], size)
                try:
                    probe.run(partial(losses, self._model, subset), count, more_of_the_same=True)
                except CaptureError:
                    raise
                except Exception:  # noqa: BLE001 - a function of the user's may know only one size of batch
                    break  # the first train batch checks the rest
        probe.refuse()
        self._known |= probe.seen
        self._probed = True

    def ran(self, name: str) -> None:
        """Note that layer ``name`` ran in the open train batch."""
        if not self.complete:
            self._ran.add(name)

    def begin_train(self) -> None:
        """Begin a train batch."""
        self._ran = set()
        self._graphs.begin()
        if self._keeper is not None:
            self._keeper.begin()

    def end_train(self) -> None:
        """End the train batch and drop what was recorded of it."""
        if self._keeper is not None:
            self._keeper.forget()

    def check_train(self, open_batch: OpenBatch, *, new_forms: bool = False) -> None:
        """Check the layers that ran in the train batch; later, those that never ran before, or all of them where axes
        have ``new_forms``. In the first packed one check that its rows keep the samples apart.

        CaptureError that names every layer whose input does not follow the samples.
        """
        batch, unknown = open_batch.rows, self._ran - self._known
        if open_batch.segments is not None and not self._packed_checked:
            self._check_packed(open_batch.segments, open_batch.ran)
        again = new_forms and self._train_checked and not self._trusted and open_batch.segments is None
        if not unknown and ((self._train_checked and not again) or batch < 2):
            return
        call = None if self._keeper is None else self._keeper.call
        if call is None and unknown:
            raise CaptureError(
                f"it cannot be told which axis of {', '.join(sorted(unknown)[:5])} carries the samples: no val "
                "sample's loss reaches it, and the model itself is not called in the training step, only parts of it. "
                "Give `val_data` whose `val_losses` reach it, call the model, or leave it out with `exclude_layers`"
            )
        if call is not None:
            ran = open_batch.ran if again else self._ran
            layers = ran if again or not self._train_checked else unknown
            refuse_mixed(self._strangers(call, batch, layers, unknown), len(self._kinds))
        self._train_checked |= batch > 1
        self._known |= unknown

    def hidden_in_graphs(self, by_module: Mapping[str, Sequence[nn.Parameter]], ran: Collection[str]) -> list[str]:
        """Names of the parameters, given by module, that graphs of torch.compile use where no tap sees it.

        They are looked for where layers ``ran`` in graphs and one of them may be new. The taps must see nothing.
        CaptureError if it cannot be told: the loop calls parts of the model.
        """
        if self._trusted or not ran or not self._graphs.any():
            return []
        call = None if self._keeper is None else self._keeper.call
        ids = {id(p) for p in hidden_in_graphs(self._model, called(self._model, call), by_module)}
        self._graphs.looked()
        return [name for name, p in self._model.named_parameters() if id(p) in ids]

    def _check_packed(self, segments: Segments, ran: set[str]) -> None:
        call = None if self._keeper is None else self._keeper.call
        if call is None:
            raise CaptureError(
                "packed rows were trained on, but the model itself was not called, only parts of it: whether it keeps "
                "the samples of a row apart is not known. Call the model, or trust it: `check=False`"
            )
        with uncompiled():
            refuse_mixed_segments(self._model, call, segments, {name: self._kinds[name] for name in sorted(ran)})
        self._packed_checked = True

    def _strangers(self, call: Call, batch: int, layers: set[str], unknown: set[str]) -> dict[str, str]:
        try:
            kinds = {name: self._kinds[name] for name in layers}
            with uncompiled():
                problems = strangers(self._model, call, batch, kinds, outputs=bool(unknown))
        except CannotRun:
            if unknown:
                raise
            return {}  # the reweighted losses have shown it
        return {name: problem for name, problem in problems.items() if problem != ABSENT or name in unknown}
