"""The sketched score: projected gradients times the projected val gradient. Approximate, at a fraction of the cost.

Legend: B samples, V val samples, G groups, D numbers of a vector.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod.autograd_check import AutogradBlocks
from indexer.dotprod.exact import ExactMethod
from indexer.dotprod.ledger import survey
from indexer.dotprod.metric import AdamMetric
from indexer.dotprod.scores import Scores, divide
from indexer.encode.plain import plain_block
from indexer.encode.tap import See
from indexer.encode.uses import parameters_by_module
from indexer.layers import LayerType, Sides
from indexer.projection.blocks import Use
from indexer.projection.matrices import Projection
from indexer.projection.plan import BlockPlan


class SketchedMethod:
    """Sketched scores of the layers of a projection. The vectors are those that a build stores.

    With ``check`` the first informative batch is compared with autograd.
    """

    needs_val = False
    """It gives vectors without val samples."""

    def __init__(
        self, model: nn.Module, projection: Projection, *, metric: AdamMetric | None = None, check: bool = True
    ) -> None:
        """With a ``metric`` the full val gradient is formed, multiplied by the metric, and then projected."""
        self.projection = projection
        self._full_val = None if metric is None else _full_val_gradient(model, projection, metric, check=check)
        self.routes: dict[str, str] = {}
        self.val_GD: Tensor | None = None
        """The projected val gradient of each group, in the metric of the score."""
        self._plain_GD: Tensor | None = None
        """The same without the metric."""
        self._model = model
        self.uses: dict[str, list[tuple[BlockPlan, Use, Sides]]] = {}
        """By name of the module to tap; a module without a formula may have a block for each of its parameters."""
        self._blocks: dict[str, Tensor] = {}
        self._ran: set[str] = set()
        self._val: list[Tensor] = []
        self._in_val = False
        self._group_V = torch.zeros(0)
        self._groups = 1
        self._unchecked = check
        self._checking: AutogradBlocks | None = None

    def attach(self, device: torch.device) -> None:
        """Move the matrices to the model's device and cut them for each use."""
        self.projection.to(device)
        self.uses = {}
        for layer in self.projection.plan.layers:
            for use in layer.block.uses:
                sides = self.projection.sides_of(layer.block, use, self._model.get_submodule(use.module))
                self.uses.setdefault(use.module, []).append((layer, use, sides))

    @property
    def kinds(self) -> dict[str, LayerType]:
        """The types of the modules to tap, by name."""
        return {use.module: use.kind for layer in self.projection.plan.layers for use in layer.block.uses}

    @property
    def by_module(self) -> dict[str, list[nn.Parameter]]:
        """By module to tap, the projected parameters whose use in it the tap sees."""
        return parameters_by_module(self._model, self.projection.plan)

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that have scores of their own: none under a global sketch."""
        return [] if self.projection.sketch else [name for name, _, _ in self.projection.plan.groups]

    def to_keep(self, name: str, x: Any, dtype: torch.dtype) -> Any:
        """Keep P_in x, or what the layer's type keeps in its place."""
        if self._in_val and self._full_val is not None:
            return self._full_val.to_keep(name, x, dtype)
        _, use, sides = self.uses[name][0]  # what is kept is the same for all blocks of a module
        with torch.no_grad():
            return use.kind.keep(self._model.get_submodule(name), x, sides, dtype)

    def _see(self, name: str, saved: Any, dy: Tensor) -> None:
        for layer, use, sides in self.uses[name]:
            block_BKJ = use.kind.block(self._model.get_submodule(name), saved, dy, sides)
            if use.flipped:
                block_BKJ = block_BKJ.transpose(1, 2)
            earlier = self._blocks.get(layer.block.name)
            self._blocks[layer.block.name] = block_BKJ if earlier is None else earlier + block_BKJ
        self._ran.add(name)

    def _vectors(self) -> Tensor:
        missing = [name for name in self.kinds if name not in self._ran]
        if missing:
            raise CaptureError(
                f"{len(missing)} projected layer(s) had no part in the loss: {', '.join(missing[:5])}; leave them out "
                "with `exclude_layers`"
            )
        vectors = self.projection.assemble([self._blocks[p.block.name] for p in self.projection.plan.layers])
        self._blocks, self._ran = {}, set()
        return vectors

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """Begin a val pass."""
        self._val, self._blocks, self._ran = [], {}, set()
        self.val_GD = self._plain_GD = None
        self._group_V, self._groups = group_V.to(device), groups
        self._in_val = True
        if self._full_val is not None:
            self._full_val.begin_val(group_V, groups, device)

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """See :class:`indexer.dotprod.method.Method`."""
        if self._full_val is not None:
            return self._full_val.see_val(name, first, tokens, interval, batches)
        return partial(self._see, name)

    def end_val_batch(self) -> None:
        """End a val batch, after its backward pass."""
        if self._full_val is None:
            self._val.append(self._vectors())

    def checked_parameters(self) -> dict[str, nn.Parameter]:
        """With a metric all parameters, once. Without, none: train batches go through the same taps and are checked."""
        return {} if self._full_val is None else self._full_val.checked_parameters()

    def check_val(self, expected: dict[str, Tensor], tolerance: float) -> None:
        """See :class:`indexer.dotprod.method.Method`."""
        if self._full_val is not None:
            self._full_val.check_val(expected, tolerance)
            self._full_val.skip_check()

    def put_in_metric(self) -> bool:
        """Project the val gradient as it is, multiply it by the metric, and project it again."""
        if self._full_val is None:
            return True
        self._plain_GD = self._projected(self._full_val)
        ready = self._full_val.put_in_metric()
        self.val_GD, self._full_val.val = self._projected(self._full_val), None
        return ready

    def _projected(self, exact: ExactMethod) -> Tensor:
        """(G, D): the projection of the present val gradients of ``exact``."""
        assert exact.val is not None
        gradients = exact.val.gradients
        vectors = []
        for group in range(self._groups):
            of_group = {
                name: gradients[name][group] if name in gradients else torch.zeros_like(parameter, dtype=torch.float32)
                for name, parameter in exact.parameters.items()
            }
            blocks = [plain_block(self.projection, layer.block, of_group) for layer in self.projection.plan.layers]
            vectors.append(self.projection.assemble([block.unsqueeze(0).float() for block in blocks]))
        return torch.cat(vectors)

    def end_val(self, scale: float) -> bool:
        """Average the vectors of each group, divided by the ``scale`` of the loss. Returns whether they are finite."""
        self._in_val = False
        if self._full_val is not None:
            return self._full_val.end_val(scale)
        vectors_VD = torch.cat(self._val) / scale
        member = torch.nn.functional.one_hot(self._group_V, self._groups).to(vectors_VD.dtype)
        self.val_GD = self._plain_GD = (member / member.sum(0)).t() @ vectors_VD
        self._val = []
        return bool(torch.isfinite(self.val_GD).all())

    def begin_train(self, batch: int) -> None:
        """Begin a train batch."""
        self._in_val = False  # the val pass may have ended with an error
        self._blocks, self._ran = {}, set()
        if self._checking is not None:
            self._checking.detach()
            self._checking = None
        if batch and self._unchecked:
            self._checking = AutogradBlocks(self._model, self.projection)
            self._checking.attach()

    def awaiting_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the projected layers, until a train batch has been compared with autograd."""
        return [] if self._checking is None else self._checking.parameters

    def called(self, name: str) -> None:
        """Do nothing: uses need no count."""

    def see_train(self, name: str) -> See:
        """See :class:`indexer.dotprod.method.Method`."""
        return partial(self._see, name)

    def scores(self, scale_B: Tensor, share_G: Tensor | None, tolerance: float) -> Scores:
        """See :class:`indexer.dotprod.method.Method`. Without a val pass it gives vectors, and scores of NaN."""
        blocks_BKJ = dict(self._blocks)
        vectors_BD = divide(self._vectors().double(), scale_B)
        if self._checking is not None and self._checking.agree(blocks_BKJ, tolerance):
            self._unchecked = False
        if self.val_GD is None or self._plain_GD is None or share_G is None:
            groups, total = vectors_BD.new_zeros(len(scale_B), 0), vectors_BD.new_full((len(scale_B),), torch.nan)
            blocks: dict[str, Tensor] = {}
            plain_D: Tensor | None = None
        else:
            val_GD = self.val_GD.double()
            mean_D, groups = share_G @ val_GD, vectors_BD @ val_GD.t()
            plain_D = share_G @ self._plain_GD.double()
            total = groups @ share_G
            spans = self.projection.plan.groups if self.blocks else []
            blocks = {name: vectors_BD[:, first:last] @ mean_D[first:last] for name, first, last in spans}
        return Scores(total=total, groups=groups, blocks=blocks, vectors=vectors_BD.float(), val_vector=plain_D)


def _full_val_gradient(model: nn.Module, projection: Projection, metric: AdamMetric, *, check: bool) -> ExactMethod:
    """The method that forms the full val gradient of the projected parameters. UsageError if one is frozen."""
    names = {name for layer in projection.plan.layers for name in layer.block.parameters}
    for name in sorted(names):
        if not model.get_parameter(name).requires_grad:
            raise UsageError(
                f'parameter {name!r} is projected but frozen, so `score_metric="adam"` has no second moment of it: '
                "leave its layer out of the projection with `exclude_layers`"
            )
    uses = [use for layer in projection.plan.layers for use in layer.block.uses]
    ledger = survey(model, only=[use.path for use in uses])
    return ExactMethod(ledger, route="direct", metric=metric, check=check)
