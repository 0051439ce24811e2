"""What the engine asks of a way to score: exact by parameters, or sketched through a projection.

Legend: B samples of a train batch, V val samples, G val groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from indexer.dotprod.scores import Scores
from indexer.encode.tap import See
from indexer.projection.matrices import Projection


class Method(Protocol):
    """Val batches first, then one train batch after another, each from :meth:`begin_train` to :meth:`scores`."""

    needs_val: bool
    """Whether nothing can be given without val samples."""

    @property
    def routes(self) -> dict[str, str]:
        """The route of each parameter, where there is a choice; decided in the val pass."""

    @property
    def projection(self) -> Projection | None:
        """What the vectors of the samples are projected through; None where no vectors are made."""

    @property
    def modules(self) -> list[str]:
        """Names of the modules to tap."""

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that have scores of their own."""

    def attach(self, device: torch.device) -> None:
        """Before the taps are put in place."""

    def to_keep(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the tap of module ``name`` keeps of its input ``x``; ``dtype`` is that of its output."""

    # The val pass.

    def checked_parameters(self) -> Mapping[str, nn.Parameter]:
        """Parameters whose val gradient autograd must give, too, to hold ours against; none once that is done."""

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """A val pass begins; ``group_V`` is the group of each val sample."""

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """The tap of module ``name`` for val samples from ``first`` on; ``tokens`` is that of a train batch."""

    def end_val_batch(self) -> None:
        """The backward pass of one val batch is done."""

    def end_val(self, scale: float) -> bool:
        """All are done, each loss multiplied by ``scale``; whether everything is finite."""

    def check_val(self, expected: dict[str, Tensor], tolerance: float) -> None:
        """CaptureError where the val gradient is not what autograd says; ``expected`` as asked for."""

    def put_in_metric(self) -> bool:
        """Multiply the val gradient, which was checked, by the metric of the score; False where there is none to be had
        yet: the scores are NaN.
        """

    # A train batch.

    def begin_train(self, batch: int) -> None:
        """A train batch of ``batch`` samples begins (0: none is open)."""

    def awaiting_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradient the open train batch is held against, by hooks on them; none once that is done."""

    def called(self, name: str) -> None:
        """Module ``name`` ran in its forward pass."""

    def see_train(self, name: str) -> See:
        """The tap of module ``name``."""

    def scores(self, scale_B: Tensor, share_G: Tensor | None, tolerance: float) -> Scores:
        """The scores of the batch, after its backward pass. ``scale_B`` is each sample's share in what went backward,
        ``share_G`` each group's in the val samples (None without a val pass). CaptureError where the first batch is
        not what autograd says.
        """
