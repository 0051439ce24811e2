"""Exact scores, and beside them the projected gradients of the samples and of the val set, for a run that keeps them.

Legend: B samples of a train batch, G val groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from indexer.dotprod.exact import ExactMethod
from indexer.dotprod.scores import Scores
from indexer.dotprod.sketched import SketchedMethod
from indexer.encode.tap import See
from indexer.projection.matrices import Projection


class KeepingMethod:
    """Scores of ``exact``, with the vectors of ``sketched``. A tap keeps of an input what the exact score needs, and
    projects it in the backward pass: so batches that want no vectors cost nothing more.
    """

    needs_val = True

    def __init__(self, exact: ExactMethod, sketched: SketchedMethod) -> None:
        self.exact, self.sketched = exact, sketched
        self.wanted = True
        """Whether the train batch that comes next gives vectors."""
        self.wanted_val = True
        """Whether the val pass that comes next does."""

    @property
    def projection(self) -> Projection:
        """That of the vectors."""
        return self.sketched.projection

    @property
    def routes(self) -> dict[str, str]:
        """Those of the exact score."""
        return self.exact.routes

    @property
    def blocks(self) -> list[str]:
        """Those of the exact score."""
        return self.exact.blocks

    @property
    def modules(self) -> list[str]:
        """Names of the modules to tap, for either."""
        return list(dict.fromkeys([*self.exact.modules, *self.sketched.modules]))

    def attach(self, device: torch.device) -> None:
        """Make both ready."""
        self.exact.attach(device)
        self.sketched.attach(device)

    def to_keep(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's input; projected where the exact score leaves the layer out."""
        method = self.exact if name in self.exact.ledger.tapped else self.sketched
        return method.to_keep(name, x, dtype)

    def _both(self, name: str, exact: See | None, sketched: See | None) -> See:
        """The tap of module ``name``, from those of the two methods, where they have one."""

        def see(saved: Tensor, dy: Tensor) -> None:
            if exact is not None:
                exact(saved, dy)
            if sketched is not None:
                projected = saved if exact is None else self.sketched.to_keep(name, saved, dy.dtype)
                sketched(projected, dy)

        return see

    def _has(self, name: str) -> tuple[bool, bool]:
        """Whether module ``name`` is tapped by the exact method, and by the other."""
        return name in self.exact.ledger.tapped, name in self.sketched.uses

    # The val pass.

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """See :class:`indexer.dotprod.method.Method`, as the others."""
        self.exact.begin_val(group_V, groups, device)
        self.sketched.begin_val(group_V, groups, device)

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """The tap of module ``name`` for val samples from ``first`` on."""
        scored, projected = self._has(name)
        exact = self.exact.see_val(name, first, tokens, interval, batches) if scored else None
        if not (projected and self.wanted_val):
            return self._both(name, exact, None)
        return self._both(name, exact, self.sketched.see_val(name, first, tokens, interval, batches))

    def end_val_batch(self) -> None:
        """The backward pass of one val batch is done."""
        self.exact.end_val_batch()
        if self.wanted_val:
            self.sketched.end_val_batch()

    def end_val(self, scale: float) -> bool:
        """All are done; whether everything is finite."""
        finite = self.exact.end_val(scale)
        return self.sketched.end_val(scale) and finite if self.wanted_val else finite

    def checked_parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of the exact score."""
        return self.exact.checked_parameters()

    def check_val(self, expected: dict[str, Tensor], tolerance: float) -> None:
        """CaptureError where the exact val gradient is not what autograd says."""
        self.exact.check_val(expected, tolerance)

    def put_in_metric(self) -> bool:
        """Of the exact val gradient; the vectors are those of plain gradients."""
        return self.exact.put_in_metric()

    # A train batch.

    def awaiting_parameters(self) -> list[nn.Parameter]:
        """Those that either waits for."""
        return [*self.exact.awaiting_parameters(), *self.sketched.awaiting_parameters()]

    def begin_train(self, batch: int) -> None:
        """A train batch begins (0: none is open)."""
        self.exact.begin_train(batch)
        self.sketched.begin_train(batch if self.wanted else 0)

    def called(self, name: str) -> None:
        """Module ``name`` ran in its forward pass."""
        if self._has(name)[0]:
            self.exact.called(name)

    def see_train(self, name: str) -> See:
        """The tap of module ``name``."""
        scored, projected = self._has(name)
        exact = self.exact.see_train(name) if scored else None
        return self._both(name, exact, self.sketched.see_train(name) if projected and self.wanted else None)

    def scores(self, scale_B: Tensor, share_G: Tensor | None, tolerance: float) -> Scores:
        """The exact scores of the batch, with its vectors where they are wanted."""
        scores = self.exact.scores(scale_B, share_G, tolerance)
        if not self.wanted:
            return scores
        sketched = self.sketched.scores(scale_B, share_G, tolerance)
        return replace(scores, vectors=sketched.vectors, val_vector=sketched.val_vector)
