"""The sketched score: projected gradients against the projected val gradient. Approximate, and a fraction of the cost.

Legend: B samples, V val samples, G groups, D numbers of a vector.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ghoststore.errors import CaptureError
from indexer.dotprod.autograd_check import AutogradBlocks
from indexer.layers import LayerType, Sides, layer_type_by_name
from indexer.projection import BlockPlan, Projection
from indexer.selection import Use
from indexer.tap import See


class SketchedMethod:
    """Scores of the layers of a projection, through it: the vectors are those that a build stores."""

    def __init__(self, model: torch.nn.Module, projection: Projection) -> None:
        self.projection = projection
        self.routes: dict[str, str] = {}
        self.val_GD: Tensor | None = None
        self._model = model
        self._uses: dict[str, tuple[BlockPlan, Use, LayerType, Sides]] = {}
        self._blocks: dict[str, Tensor] = {}
        self._ran: set[str] = set()
        self._val: list[Tensor] = []
        self._group_V = torch.zeros(0)
        self._groups = 1

    def attach(self, device: torch.device) -> None:
        """Move the matrices to the model's device and cut them for each use."""
        self.projection.to(device)
        for layer in self.projection.plan.layers:
            for use in layer.block.uses:
                kind = layer_type_by_name(use.type)
                sides = self.projection.sides_of(layer.block, use, self._model.get_submodule(use.module))
                self._uses[use.module] = (layer, use, kind, sides)

    @property
    def modules(self) -> list[str]:
        """Names of the modules to tap."""
        return [use.module for layer in self.projection.plan.layers for use in layer.block.uses]

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that have scores of their own: none under a global sketch."""
        return [] if self.projection.sketch else [name for name, _, _ in self.projection.plan.groups]

    def to_keep(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """P_in x, or what the layer's type keeps instead."""
        _, _, kind, sides = self._uses[name]
        with torch.no_grad():
            return kind.keep(self._model.get_submodule(name), x, sides, dtype)

    def _see(self, name: str, kept: Tensor, dy: Tensor) -> None:
        layer, use, kind, sides = self._uses[name]
        block_BKJ = kind.block(self._model.get_submodule(name), kept, dy, sides)
        if use.flipped:
            block_BKJ = block_BKJ.transpose(1, 2)
        before = self._blocks.get(layer.block.name)
        self._blocks[layer.block.name] = block_BKJ if before is None else before + block_BKJ
        self._ran.add(name)

    def _vectors(self) -> Tensor:
        missing = [name for name in self.modules if name not in self._ran]
        if missing:
            raise CaptureError(
                f"{len(missing)} projected layer(s) had no part in the loss: {', '.join(missing[:5])}; leave them out "
                "with exclude_layers"
            )
        vectors = self.projection.assemble([self._blocks[p.block.name] for p in self.projection.plan.layers])
        self._blocks, self._ran = {}, set()
        return vectors

    def begin_val(self, group_V: Tensor, groups: int, device: torch.device) -> None:
        """A val pass begins."""
        self._val, self.val_GD, self._blocks, self._ran = [], None, {}, set()
        self._group_V, self._groups = group_V.to(device), groups

    def see_val(self, name: str, first: int, tokens: int, interval: int, batches: int) -> See:
        """The tap of module ``name`` for val samples from ``first`` on."""
        return partial(self._see, name)

    def end_val_batch(self) -> None:
        """The backward pass of one val batch is done."""
        self._val.append(self._vectors())

    def end_val(self, scale: float) -> bool:
        """Mean vectors of the groups, divided by the ``scale`` of the loss; whether they are finite."""
        vectors_VD = torch.cat(self._val) / scale
        member = torch.nn.functional.one_hot(self._group_V, self._groups).to(vectors_VD.dtype)
        self.val_GD = (member / member.sum(0)).t() @ vectors_VD
        self._val = []
        return bool(torch.isfinite(self.val_GD).all())

    def begin_train(self, batch: int) -> None:
        """A train batch begins."""
        self._blocks, self._ran = {}, set()

    def called(self, name: str) -> None:
        """Nothing to count."""

    def see_train(self, name: str) -> See:
        """The tap of module ``name``."""
        return partial(self._see, name)

    def end_train_vectors(self, checking: AutogradBlocks | None, tolerance: float) -> tuple[Tensor, bool]:
        """(B, D): the vectors of the batch, still times the scale of the training loss; and whether ``checking`` found
        them to be autograd's.
        """
        blocks = dict(self._blocks)
        vectors = self._vectors()
        return vectors, checking is not None and checking.agree(blocks, tolerance)
