"""Whether the shapes of later batches are still those that the checks of the first batches have seen.

Layers that see samples and positions on one axis must keep as many positions of each sample: rows of padding that a
model takes out, or that a router picks, may be a multiple of the batch by accident. And an axis that is not that of the
samples may have their number.
"""

from __future__ import annotations

from ghoststore.errors import CaptureError
from indexer.layers.base import Seen


class FlatRows:
    """Compares the positions of flat layers with those of layers that have them on an axis of their own."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, int]] = {}
        """Of each flat layer when it ran first: its positions, and the most of any other layer."""
        self._flat: dict[str, int] = {}
        self._others: set[int] = set()
        self._forms: set[tuple[str, bool, tuple[bool, ...]]] = set()
        self._checked: set[tuple[str, bool, tuple[bool, ...]]] = set()

    def begin(self) -> None:
        """Begin a batch."""
        self._flat, self._others, self._forms = {}, set(), set()

    @property
    def new_forms(self) -> bool:
        """Whether a layer ran whose axes, or which of them are as long as the batch, are not of a checked batch."""
        return not self._forms <= self._checked

    def remember(self) -> None:
        """The batch is checked, or the first."""
        self._checked |= self._forms

    def saw(self, name: str, seen: Seen, batch: int) -> None:
        """Note a run of the layer ``name`` with ``batch`` samples."""
        output = seen.outputs[0]
        self._forms.add((name, seen.flat, tuple(size == batch for size in output.shape[1:-1])))
        if output.dim() < 3:
            return
        if seen.flat:
            self._flat[name] = output.shape[1]
        else:
            self._others.add(output.shape[1])

    def check(self) -> None:
        """CaptureError for a flat layer whose rows are no longer all positions of all samples.

        Allowed are as many positions as another layer has, or fewer by the same number or share as at first.
        """
        if not self._others:
            return
        most = max(self._others)
        for name, positions in self._flat.items():
            first, first_most = self._known.setdefault(name, (positions, most))
            if positions in self._others or positions - most == first - first_most:
                continue
            if positions * first_most != first * most:
                raise CaptureError(
                    f"layer {name!r} saw rows of {positions} positions of each sample where other layers have {most}, "
                    f"and in an earlier batch {first} of {first_most}: rows were taken out (padding), or routed, so it "
                    "is not known whose they are. Leave the layer out with `exclude_layers`"
                )
