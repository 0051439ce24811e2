"""Exact scores together with projected gradients of the samples and the val set, for a run that keeps them.

Legend: B samples of a train batch, G val groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from indexer.dotprod.exact import ExactMethod
from indexer.dotprod.scores import Scores
from indexer.dotprod.sketched import SketchedMethod
from indexer.encode.tap import See
from indexer.layers import LayerType
from indexer.projection.matrices import Projection


class KeepingMethod:
    """Scores of ``exact`` with the vectors of ``sketched``.

    A tap keeps what the exact score needs and projects it only in the backward pass, so a batch without vectors costs
    nothing extra.
    """

    needs_val = True

    def __init__(self, exact: ExactMethod, sketched: SketchedMethod) -> None:
        self.exact, self.sketched = exact, sketched
        self.wanted = True
        """Whether the next train batch gives vectors."""
        self.wanted_val = True
        """Whether the next val pass gives its vector."""

    @property
    def projection(self) -> Projection:
        """The projection of the vectors."""
        return self.sketched.projection

    @property
    def routes(self) -> dict[str, str]:
        """The routes of the exact score."""
        return self.exact.routes

    @property
    def blocks(self) -> list[str]:
        """The blocks of the exact score."""
        return self.exact.blocks

    @property
    def kinds(self) -> dict[str, LayerType]:
        """The types of the modules that either method taps, by name."""
        return {**self.sketched.kinds, **self.exact.kinds}

    @property
    def by_module(self) -> dict[str, list[nn.Parameter]]:
        """By module to tap, the parameters of either method."""
        exact, sketched = self.exact.by_module, self.sketched.by_module
        return {name: [*exact.get(name, []), *sketched.get(name, [])] for name in self.kinds}

    def attach(self, device: torch.device) -> None:
        """Attach both methods."""
        self.exact.attach(device)
        self.sketched.attach(device)

    def to_keep(self, name: str, x: Any, dtype: torch.dtype) -> Any:
        """Keep the layer's input; its projection if the exact score leaves the layer out."""
        method = self.exact if name in self.exact.ledger.tapped else self.sketched
        return method.to_keep(name, x, dtype)

    def _combined(self, name: str, exact: See | None, sketched: See | None) -> See:
        """Combine the taps of both methods on module ``name``."""

        def see(saved: Any, dy: Tensor) -> None:
            if exact is not None:
                exact(saved, dy)
            if sketched is not None:
                projected = saved if exact is None else self.sketched.to_keep(name, saved, dy.dtype)
                sketched(projected, dy)

        return see

    def _tapped_by(self, name: str) -> tuple[bool, bool]:
        """Whether the exact and the sketched method tap module ``name``."""
        return name in self.exact.ledger.tapped, name in self.sketched.uses

    # The val pass.

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """Begin a val pass of both methods."""
        self.exact.begin_val(group_V, groups, device)
        self.sketched.begin_val(group_V, groups, device)

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """See :class:`indexer.dotprod.method.Method`."""
        scored, projected = self._tapped_by(name)
        exact = self.exact.see_val(name, first, tokens, interval, batches) if scored else None
        if not (projected and self.wanted_val):
            return self._combined(name, exact, None)
        return self._combined(name, exact, self.sketched.see_val(name, first, tokens, interval, batches))

    def end_val_batch(self) -> None:
        """End a val batch, after its backward pass."""
        self.exact.end_val_batch()
        if self.wanted_val:
            self.sketched.end_val_batch()

    def end_val(self, scale: float) -> bool:
        """End the val pass. Returns whether everything is finite."""
        finite = self.exact.end_val(scale)
        return self.sketched.end_val(scale) and finite if self.wanted_val else finite

    def checked_parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the exact score checks."""
        return self.exact.checked_parameters()

    def check_val(self, expected: dict[str, Tensor], tolerance: float) -> None:
        """CaptureError if the exact val gradient differs from autograd's."""
        self.exact.check_val(expected, tolerance)

    def put_in_metric(self) -> bool:
        """Put the exact val gradient in the metric; the vectors stay those of plain gradients."""
        return self.exact.put_in_metric()

    # A train batch.

    def awaiting_parameters(self) -> list[nn.Parameter]:
        """The parameters that either method waits for."""
        return [*self.exact.awaiting_parameters(), *self.sketched.awaiting_parameters()]

    def begin_train(self, batch: int) -> None:
        """Begin a train batch; 0 ends the open one."""
        self.exact.begin_train(batch)
        self.sketched.begin_train(batch if self.wanted else 0)

    def called(self, name: str) -> None:
        """Note that module ``name`` ran in the forward pass."""
        if self._tapped_by(name)[0]:
            self.exact.called(name)

    def see_train(self, name: str) -> See:
        """See :class:`indexer.dotprod.method.Method`."""
        scored, projected = self._tapped_by(name)
        exact = self.exact.see_train(name) if scored else None
        return self._combined(name, exact, self.sketched.see_train(name) if projected and self.wanted else None)

    def scores(self, scale_B: Tensor, share_G: Tensor | None, tolerance: float) -> Scores:
        """Return the exact scores of the batch, with its vectors if they are wanted."""
        scores = self.exact.scores(scale_B, share_G, tolerance)
        if not self.wanted:
            return scores
        sketched = self.sketched.scores(scale_B, share_G, tolerance)
        return replace(scores, vectors=sketched.vectors, val_vector=sketched.val_vector)
