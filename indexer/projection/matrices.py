"""The projection P = S · diag(P_in ⊗ P_out): its matrices and their hash. S is the sketch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.layers import Axis, Sides
from indexer.projection import draws
from indexer.projection.adam import SideScales
from indexer.projection.blocks import Block, Use
from indexer.projection.plan import BlockPlan, ProjectionPlan
from indexer.projection.sketch import BlockSketches, Sketch


def draw_side(config: ProjectionConfig, layer: str, side: Literal["in", "out"], k: int, n: int) -> Tensor:
    """The (k, n) float32 matrix of one side of one layer; the identity if k = n."""
    if k == n:
        return torch.eye(n)
    key = f"ghoststore/1|seed={config.seed}|layer={layer}|side={side}|kind={config.kind}|shape={k}x{n}"
    return torch.from_numpy(draws.KINDS[config.kind](key, k, n))


def drawn_sides(config: ProjectionConfig, layer: BlockPlan) -> tuple[Tensor, Tensor]:
    """(P_in, P_out) of a layer, drawn by :func:`draw_side`."""
    block = layer.block
    p_in = draw_side(config, block.name, "in", layer.k_in, block.n_in)
    return p_in, draw_side(config, block.name, "out", layer.k_out, block.n_out)


class Projection:
    """The matrices of a plan, float32, on the CPU until :meth:`to` moves them.

    ``scales``, by block name, multiply the columns of P_in and P_out: see :mod:`indexer.projection.adam`. UsageError
    for a plan that must learn from a sample of a corpus and has not done so.
    """

    def __init__(self, plan: ProjectionPlan, scales: Mapping[str, SideScales] | None = None) -> None:
        calibration = plan.calibration
        if plan.calibrated and calibration is None:
            raise UsageError(
                "the kind 'pca', a precondition, and sketches layer by layer are learned from a sample of a corpus: "
                "only a build has them. Give `kind=gaussian`, `compress_by=all` and `precondition=none`"
            )
        self.plan = plan
        self.sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        """(P_in, P_out) by block name. None, which only :meth:`with_sides` gives, leaves the axis as it is."""
        digest = hashlib.sha256()
        for layer in plan.layers:
            block = layer.block
            if calibration is not None and calibration.sides is not None:
                p_in, p_out = calibration.sides[block.name]
            else:
                p_in, p_out = drawn_sides(plan.config, layer)
            if scales is not None:
                p_in, p_out = p_in * scales[block.name].scale_in, p_out * scales[block.name].scale_out
            self.sides[block.name] = (p_in, p_out)
            for matrix in (p_in, p_out):
                digest.update(matrix.numpy().astype("<f4", copy=False).tobytes())
        self.sketch = self._sketch()
        if self.sketch is not None:
            digest.update(self.sketch.digest())
        self.hash = f"sha256:{digest.hexdigest()}"
        """SHA-256 of every matrix in the order of the layers, then of the sketch."""

    @classmethod
    def for_model(cls, model: nn.Module, config: ProjectionConfig) -> Projection:
        """The projection of the layers of ``model`` that ``config`` selects. Raises what
        :meth:`ProjectionPlan.for_model` raises.
        """
        return cls(ProjectionPlan.for_model(model, config))

    @classmethod
    def with_sides(cls, plan: ProjectionPlan, sides: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> Projection:
        """A projection of the layers of ``plan`` with other (P_in, P_out), without sketch and hash.

        None leaves an axis as it is.
        """
        projection = cls.__new__(cls)
        projection.sides = dict(sides)
        layers, start = [], 0
        for layer in plan.layers:
            p_in, p_out = sides[layer.block.name]
            k_out, k_in = (
                n if p is None else len(p) for n, p in ((layer.block.n_out, p_out), (layer.block.n_in, p_in))
            )
            layers.append(replace(layer, k_out=k_out, k_in=k_in, start=start))
            start = layers[-1].stop
        projection.plan = replace(plan, layers=tuple(layers), compress=None)
        projection.sketch, projection.hash = None, ""
        return projection

    def _sketch(self) -> Sketch | BlockSketches | None:
        plan = self.plan
        key = f"ghoststore/1|seed={plan.config.seed}"
        if plan.shared_out and plan.calibration is not None and plan.calibration.shares is not None:
            columns = [(layer.start, layer.stop) for layer in plan.layers]
            return BlockSketches(key, [layer.block.name for layer in plan.layers], columns, *plan.calibration.shares)
        if plan.compress and not plan.shared_out:
            return Sketch(key, plan.kronecker_dimension, plan.compress)
        return None

    def to(self, device: torch.device | str) -> Projection:
        """Move every matrix to ``device``, in place."""
        device = torch.device(device)
        self.sides = {
            name: (None if p_in is None else p_in.to(device), None if p_out is None else p_out.to(device))
            for name, (p_in, p_out) in self.sides.items()
        }
        if self.sketch:
            self.sketch.to(device)
        return self

    def unsketched(self) -> Projection:
        """The same projection without the sketch: its vectors are the Kronecker blocks of the layers."""
        projection = copy.copy(self)
        projection.plan, projection.sketch = replace(self.plan, compress=None), None
        return projection

    def sides_of(self, block: Block, use: Use, module: nn.Module) -> Sides:
        """The matrices of ``block`` for its ``use`` in ``module``, in the dtype of the module's weight.

        UsageError if they overflow in that dtype.
        """
        (p_in, p_out), (size_in, size_out) = self.sides[block.name], (block.n_in, block.n_out)
        if use.flipped:
            p_in, p_out, size_in, size_out = p_out, p_in, size_out, size_in
        n_out, n_in = use.kind.axes(module)
        dtype = module.get_parameter(use.parameter).dtype
        for side in (p_in, p_out):
            if side is not None and not bool(side.to(dtype).isfinite().all()):
                raise UsageError(
                    f"layer {block.name!r}: its projection has numbers up to {float(side.abs().max()):.2g}, which "
                    f"are infinite in {dtype}; give `model_dtype=bfloat16`, or `precondition=none`"
                )
        bias = None if use.bias_column is None or p_in is None else p_in[:, use.bias_column].to(dtype)
        return Sides(
            Axis(size_in, use.bias_column) if p_in is None else p_in[:, :n_in].to(dtype).contiguous(),
            bias,
            Axis(size_out) if p_out is None else p_out[:, :n_out].to(dtype).contiguous(),
        )

    def assemble(self, blocks: Sequence[Tensor]) -> Tensor:
        """(B, D) float32: the vectors made of blocks (B, k_out, k_in) in the order of the layers."""
        vector_BN = torch.cat([block.flatten(1) for block in blocks], dim=1)
        return self.sketch(vector_BN) if self.sketch else vector_BN
