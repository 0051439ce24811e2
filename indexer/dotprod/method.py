"""The interface between the engine and its methods: exact by parameter, or sketched through a projection.

Legend: B samples of a train batch, V val samples, G val groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from indexer.dotprod.scores import Scores
from indexer.encode.tap import See
from indexer.layers import LayerType
from indexer.projection.matrices import Projection


class Method(Protocol):
    """A method of scoring: a val pass, then train batches, each from :meth:`begin_train` to :meth:`scores`."""

    needs_val: bool
    """Whether the method gives nothing without val samples."""

    @property
    def routes(self) -> dict[str, str]:
        """The route of each parameter, chosen in the val pass; empty if there is no choice."""

    @property
    def projection(self) -> Projection | None:
        """The projection of the samples' vectors; None if the method gives no vectors."""

    @property
    def kinds(self) -> dict[str, LayerType]:
        """The types of the modules to tap, by name."""

    @property
    def by_module(self) -> dict[str, list[nn.Parameter]]:
        """By module to tap, the parameters whose use in it the tap sees."""

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that have scores of their own."""

    def attach(self, device: torch.device) -> None:
        """Get ready on ``device``, before the taps are put in place."""

    def to_keep(self, name: str, x: Any, dtype: torch.dtype) -> Any:
        """What the tap of module ``name`` keeps of the module's input ``x``; ``dtype`` is that of its output."""

    # The val pass.

    def checked_parameters(self) -> Mapping[str, nn.Parameter]:
        """Parameters whose val gradient is to be compared with autograd's; none once that is done."""

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """Begin a val pass; ``group_V`` is the group of each val sample, one of ``groups``."""

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """Return the tap of module ``name`` for a val batch that begins with sample ``first``.

        ``tokens`` (positions of a train batch), ``interval`` (steps from one val pass to the next) and ``batches`` (val
        batches) help to choose a route.
        """

    def end_val_batch(self) -> None:
        """End a val batch, after its backward pass."""

    def end_val(self, scale: float) -> bool:
        """End the val pass, whose losses were multiplied by ``scale``. Returns whether everything is finite."""

    def check_val(self, expected: dict[str, Tensor], tolerance: float) -> None:
        """CaptureError if the val gradient differs from ``expected``, autograd's of the :meth:`checked_parameters`."""

    def put_in_metric(self) -> bool:
        """Multiply the val gradient by the metric of the score, after its check.

        Returns False if the optimizer has no metric yet: the scores are NaN then.
        """

    # A train batch.

    def begin_train(self, batch: int) -> None:
        """Begin a train batch of ``batch`` samples; 0 ends the open one."""

    def awaiting_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradient is compared in the open train batch, by hooks; none once that is done."""

    def called(self, name: str) -> None:
        """Note that module ``name`` ran in the forward pass of the train batch."""

    def see_train(self, name: str) -> See:
        """Return the tap of module ``name`` for the train batch."""

    def scores(self, scale_B: Tensor, share_G: Tensor | None, tolerance: float) -> Scores:
        """Return the scores of the batch, after its backward pass.

        ``scale_B`` is the weight of each sample's loss in what went backward, ``share_G`` the share of each group in
        the val samples (None without a val pass). CaptureError if the first batch differs from autograd.
        """
