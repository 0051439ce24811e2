"""The projection P = S · diag(P_in ⊗ P_out): its configuration, ranks, matrices, columns and hash."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghoststore.errors import LayerError, UsageError
from indexer.layers import Axis, Sides, layer_type_by_name
from indexer.projection import draws
from indexer.projection.adam import SideScales
from indexer.projection.calibration import LEARNED, Calibration, LayerShape
from indexer.projection.selection import Block, Selection, Use
from indexer.projection.sketch import BlockSketches, Sketch

Compress = int | Literal["auto", "none"]
CompressBy = Literal["auto", "layer", "all"]
RankTotal = int | Literal["full"]
KINDS = (*draws.KINDS, LEARNED)
PRECONDITIONS = ("auto", "none", "kronecker")
LATER_SETTINGS = ("compress_by", "rank_ratio", "calibration_samples", "precondition", "damping")
"""Fields of a configuration that a manifest has only where they are not plain."""

SKETCHED_RANK_TOTAL = 64 * 64
PLAIN_RANK_TOTAL = 256
NUMBERS_PER_LAYER = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig:
    """What the user asks for. ``None`` and ``"auto"`` are decided by the other fields, see :meth:`plan`.

    By default blocks of up to 64 × 64 are sketched to 64 numbers a layer. Giving ``rank_total`` without
    ``compress`` means plain Kronecker blocks, whose scores can be taken layer by layer; ``"full"`` keeps every
    axis at its own length: the vectors are then the gradients themselves.

    ``compress_by`` says whether one sketch is made of all layers together (``"all"``; the default of drawn kinds) or
    one of each, with sizes in proportion to the layers' share of the squared norm of gradients (``"layer"``; the
    default of the kind ``"pca"``): scores can then be taken layer by layer. The kind ``"pca"`` and the sizes are
    learned from ``calibration_samples`` of the corpus, so only a build can have them.

    ``precondition="kronecker"`` puts the inverse root of the layers' second moment, as two factors, into the sides: see
    :mod:`indexer.projection.kfac`. It is learned, too; ``damping`` is relative to the mean eigenvalue of each factor.
    ``"auto"`` is ``"kronecker"`` for a build (:meth:`for_build`), else ``"none"``.
    """

    layers: tuple[str, ...] = ("mlp", "attn")
    exclude_layers: tuple[str, ...] = ()
    include_embeddings: bool = False
    rank_total: RankTotal | None = None
    rank_min: int = 1
    seed: int = 0
    kind: str = "gaussian"
    compress: Compress = "auto"
    compress_by: CompressBy = "auto"
    rank_ratio: float = 1.0
    """k_in ÷ k_out."""
    calibration_samples: int = 256
    precondition: str = "auto"
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"projection kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if self.compress_by not in ("auto", "layer", "all"):
            raise UsageError(f"--proj-compress-by takes layer, all or auto, not {self.compress_by!r}")
        if not 0 < self.rank_ratio < math.inf:
            raise UsageError(f"--proj-rank-ratio must be above 0, not {self.rank_ratio}")
        if self.precondition not in PRECONDITIONS:
            raise UsageError(f"--proj-precondition {self.precondition!r} is unknown; known: {', '.join(PRECONDITIONS)}")
        if not 0 < self.damping < math.inf:
            raise UsageError(f"--proj-damping must be above 0, not {self.damping}")
        if self.calibration_samples < 1:
            raise UsageError(f"--calibration-samples must be at least 1, not {self.calibration_samples}")
        if isinstance(self.rank_total, str) and self.rank_total != "full":
            raise UsageError(f"--proj-rank-total takes a number or full, not {self.rank_total!r}")
        if isinstance(self.rank_total, int) and self.rank_total < 1:
            raise UsageError(f"--proj-rank-total must be at least 1, not {self.rank_total}")
        if self.rank_min < 1:
            raise UsageError(f"--proj-rank-min must be at least 1, not {self.rank_min}")
        if isinstance(self.compress, int) and self.compress < 1:
            raise UsageError(f"--proj-compress must be at least 1 or none, not {self.compress}")
        if isinstance(self.compress, str) and self.compress not in ("auto", "none"):
            raise UsageError(f"--proj-compress takes a number, none or auto, not {self.compress!r}")

    @property
    def sketched(self) -> bool:
        """Whether the second step follows."""
        return self.compress != "none" and not (self.compress == "auto" and self.rank_total is not None)

    @property
    def by_layer(self) -> bool:
        """Whether each layer is sketched by itself."""
        by_default = self.compress_by == "auto" and self.learns_sides
        return self.sketched and (by_default or self.compress_by == "layer")

    def for_build(self, *, optimizer_state: bool) -> ProjectionConfig:
        """With ``precondition`` decided: by default Kronecker, unless the vectors have another metric already, or are
        to be the gradients themselves, or as near to these as can be (``"pca"``).
        """
        if self.precondition != "auto":
            return self
        plain = optimizer_state or self.rank_total == "full" or self.kind == LEARNED
        return replace(self, precondition="none" if plain else "kronecker")

    @property
    def preconditioned(self) -> bool:
        """Whether the sides hold a preconditioner."""
        return self.precondition == "kronecker"

    @property
    def learns_sides(self) -> bool:
        """Whether the sides depend on the corpus."""
        return self.kind == LEARNED or self.preconditioned

    @property
    def calibrated(self) -> bool:
        """Whether a sample of the corpus is needed."""
        return self.learns_sides or self.by_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """One layer of the manifest: its block and the ranks it is projected to."""

    block: Block
    k_out: int
    k_in: int
    start: int
    """First column in the Kronecker vector; the block is (k_out, k_in), row-major."""

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + self.k_out * self.k_in


def ranks(n_out: int, n_in: int, rank_total: RankTotal, ratio: float = 1.0) -> tuple[int, int]:
    """(k_out, k_in): ⌊√(rank_total / ratio)⌋ and ⌊√(rank_total · ratio)⌋, at least 1, unless an axis is smaller; then
    the other takes what is left.

    The product never exceeds ``rank_total``; ``"full"`` is the lengths of the axes.
    """
    if rank_total == "full":
        return n_out, n_in
    k_in = min(max(1, math.isqrt(math.floor(rank_total * ratio))), rank_total)
    k_out = max(1, min(math.isqrt(math.floor(rank_total / ratio)), rank_total // k_in))
    if n_in < k_in:
        return min(n_out, rank_total // n_in), n_in
    if n_out < k_out:
        return n_out, min(n_in, rank_total // n_out)
    return k_out, k_in


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionPlan:
    """The projection of one model, resolved: nothing is left to decide and nothing is drawn yet."""

    config: ProjectionConfig
    layers: tuple[BlockPlan, ...]
    compress: int | None
    """K of the sketch, or of the sketches of all layers together; None for plain Kronecker blocks."""
    coverage: float
    calibration: Calibration | None = None
    """What was learned, where that is needed."""

    @property
    def shared_out(self) -> bool:
        """Whether each layer has a sketch of its own, of a size that is learned."""
        return self.compress is not None and self.config.by_layer

    @property
    def shapes(self) -> list[LayerShape]:
        """What a calibration must know of each layer."""
        return [
            LayerShape(layer.block.name, layer.k_out, layer.k_in, layer.block.n_out, layer.block.n_in)
            for layer in self.layers
        ]

    @property
    def group_count(self) -> int:
        """Of :attr:`groups`, known before anything is learned."""
        return 1 if self.compress and not self.shared_out else len(self.layers)

    @property
    def kronecker_dimension(self) -> int:
        """Numbers in the vector before the sketch."""
        return self.layers[-1].stop

    @property
    def dimension(self) -> int:
        """D, numbers in a stored vector."""
        return self.compress or self.kronecker_dimension

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """(name, start, stop) of the stored columns that can be scored by themselves."""
        if self.shared_out:
            assert self.calibration is not None
            assert self.calibration.shares is not None
            names, sizes = (layer.block.name for layer in self.layers), self.calibration.shares.sizes
            ends = list(accumulate(sizes))
            return [(name, end - size, end) for name, size, end in zip(names, sizes, ends, strict=True)]
        if self.compress:
            return [("all", 0, self.compress)]
        return [(layer.block.name, layer.start, layer.stop) for layer in self.layers]

    @classmethod
    def of(cls, selection: Selection, config: ProjectionConfig) -> ProjectionPlan:
        """Ranks and columns of every selected layer.

        Raises LayerError where a rank that was asked for is larger than a layer, UsageError where
        ``compress`` is not smaller than the vector.
        """
        rank_total = config.rank_total or (SKETCHED_RANK_TOTAL if config.sketched else PLAIN_RANK_TOTAL)
        if rank_total != "full" and config.rank_min**2 > rank_total:
            raise UsageError(
                f"--proj-rank-min {config.rank_min} needs blocks of {config.rank_min**2} numbers or more, "
                f"but --proj-rank-total is {rank_total}"
            )
        layers, start = [], 0
        for block in selection.blocks:
            cls._refuse_too_large(config, block)
            k_out, k_in = ranks(block.n_out, block.n_in, rank_total, config.rank_ratio)
            if block.is_matrix and min(k_out, k_in) < config.rank_min:
                raise LayerError(
                    f"--proj-rank-min {config.rank_min} cannot be met by layer {block.name!r} "
                    f"({block.n_out} × {block.n_in}), whose ranks are {k_out} × {k_in}; lower --proj-rank-min or "
                    f"leave the layer out with --exclude-layers {block.name!r}"
                )
            layers.append(BlockPlan(block=block, k_out=k_out, k_in=k_in, start=start))
            start = layers[-1].stop
        return cls(
            config=config,
            layers=tuple(layers),
            compress=cls._resolve_compress(config, start, len(layers)),
            coverage=selection.coverage,
        )

    @staticmethod
    def _refuse_too_large(config: ProjectionConfig, block: Block) -> None:
        numbers = block.n_out * block.n_in
        if isinstance(config.rank_total, int) and block.is_matrix and config.rank_total > numbers:
            raise LayerError(
                f"--proj-rank-total {config.rank_total} is larger than layer {block.name!r}, whose gradient "
                f"is {block.n_out} × {block.n_in} = {numbers} numbers; lower the rank, leave the layer out with "
                f"--exclude-layers {block.name!r}, or give `full` for every axis at its own length"
            )

    @staticmethod
    def _resolve_compress(config: ProjectionConfig, dimension: int, layers: int) -> int | None:
        if not config.sketched:
            return None
        if isinstance(config.compress, int):
            if config.compress >= dimension:
                raise UsageError(
                    f"--proj-compress {config.compress} is not smaller than the {dimension} numbers of the "
                    "Kronecker blocks; give a smaller K, or none"
                )
            if config.by_layer and config.compress < layers:
                raise UsageError(
                    f"--proj-compress {config.compress} is less than a number for each of {layers} layers; give more, "
                    "or --proj-compress-by all"
                )
            return config.compress
        wanted = NUMBERS_PER_LAYER * layers
        return wanted if wanted < dimension else None

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``projection`` without the hash: what :meth:`same_as` compares."""
        settings = asdict(self.config)
        settings["compress_by"] = "layer" if self.shared_out else "all"
        settings["precondition"] = "kronecker" if self.config.preconditioned else "none"
        plain = {"compress_by": "all", "rank_ratio": 1.0, "precondition": "none"}
        if not self.config.calibrated:
            plain["calibration_samples"] = settings["calibration_samples"]
        if not self.config.preconditioned:
            plain["damping"] = settings["damping"]
        for name, value in plain.items():  # as the parts of earlier releases have it
            if settings[name] == value:
                del settings[name]
        if self.calibration is not None:
            settings["calibration"] = self.calibration.to_json()
        settings["layers"], settings["exclude_layers"] = (
            list(self.config.layers),
            list(self.config.exclude_layers),
        )
        settings["compress"] = self.compress
        settings["kronecker_dimension"] = self.kronecker_dimension
        settings["dimension"] = self.dimension
        return settings

    def layers_json(self) -> list[dict[str, Any]]:
        """The manifest's ``layers``: name, type, parameters, uses, axes, ranks and Kronecker columns."""
        return [
            {
                "name": layer.block.name,
                "type": layer.block.type,
                "parameters": list(layer.block.parameters),
                "modules": [use.module for use in layer.block.uses],
                "shape": [layer.block.n_out, layer.block.n_in],
                "ranks": [layer.k_out, layer.k_in],
                "columns": [layer.start, layer.stop],
            }
            for layer in self.layers
        ]


def draw_side(config: ProjectionConfig, layer: str, side: Literal["in", "out"], k: int, n: int) -> Tensor:
    """The (k, n) float32 matrix of one side of one layer. An axis that keeps its length is left as it is."""
    if k == n:
        return torch.eye(n)
    key = f"ghoststore/1|seed={config.seed}|layer={layer}|side={side}|kind={config.kind}|shape={k}x{n}"
    return torch.from_numpy(draws.KINDS[config.kind](key, k, n))


def drawn_sides(config: ProjectionConfig, layer: BlockPlan) -> tuple[Tensor, Tensor]:
    """(P_in, P_out) of a layer, see :func:`draw_side`."""
    block = layer.block
    p_in = draw_side(config, block.name, "in", layer.k_in, block.n_in)
    return p_in, draw_side(config, block.name, "out", layer.k_out, block.n_out)


class Projection:
    """The matrices of a plan: float32 on the CPU until :meth:`to`.

    ``scales``, by block name, multiply the columns of P_in and P_out: see :mod:`indexer.projection.adam`. UsageError
    for a plan that lacks what it must learn from a sample of a corpus.
    """

    def __init__(self, plan: ProjectionPlan, scales: Mapping[str, SideScales] | None = None) -> None:
        calibration = plan.calibration
        if plan.config.calibrated and calibration is None:
            raise UsageError(
                "the kind 'pca', a precondition, and sketches layer by layer are learned from a sample of a corpus: "
                "only a build has them. Give --proj-kind gaussian, --proj-compress-by all and --proj-precondition none"
            )
        self.plan = plan
        self.sides: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        """(P_in, P_out) by block name; None, of :meth:`with_sides` alone: the axis as it is."""
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
    def with_sides(cls, plan: ProjectionPlan, sides: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> Projection:
        """Blocks of the layers of ``plan`` by other (P_in, P_out); None: the axis as it is. Without sketch and hash."""
        found = cls.__new__(cls)
        found.sides = dict(sides)
        layers, start = [], 0
        for layer in plan.layers:
            p_in, p_out = sides[layer.block.name]
            k_out, k_in = (
                n if p is None else len(p) for n, p in ((layer.block.n_out, p_out), (layer.block.n_in, p_in))
            )
            layers.append(replace(layer, k_out=k_out, k_in=k_in, start=start))
            start = layers[-1].stop
        found.plan = replace(plan, layers=tuple(layers), compress=None)
        found.sketch, found.hash = None, ""
        return found

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
        """The same matrices without the second step: vectors are the Kronecker blocks of the layers."""
        other = copy.copy(self)
        other.plan, other.sketch = replace(self.plan, compress=None), None
        return other

    def sides_of(self, block: Block, use: Use, module: nn.Module) -> Sides:
        """The matrices of ``block`` as ``use`` by ``module`` sees them, in the dtype of its weight. UsageError where
        they are too large for it.
        """
        (p_in, p_out), (size_in, size_out) = self.sides[block.name], (block.n_in, block.n_out)
        if use.flipped:
            p_in, p_out, size_in, size_out = p_out, p_in, size_out, size_in
        n_out, n_in = layer_type_by_name(use.type).axes(module)
        dtype = module.get_parameter("weight").dtype
        for side in (p_in, p_out):
            if side is not None and not bool(side.to(dtype).isfinite().all()):
                raise UsageError(
                    f"layer {block.name!r}: its projection has numbers up to {float(side.abs().max()):.2g}, which "
                    f"are infinite in {dtype}; give --model-dtype bfloat16, or --proj-precondition none"
                )
        bias = None if use.bias_column is None or p_in is None else p_in[:, use.bias_column].to(dtype)
        return Sides(
            Axis(size_in, use.bias_column) if p_in is None else p_in[:, :n_in].to(dtype).contiguous(),
            bias,
            Axis(size_out) if p_out is None else p_out[:, :n_out].to(dtype).contiguous(),
        )

    def assemble(self, blocks: Sequence[Tensor]) -> Tensor:
        """Blocks (B, k_out, k_in) in the order of the layers to vectors (B, D) float32."""
        vector_BN = torch.cat([block.flatten(1) for block in blocks], dim=1)
        return self.sketch(vector_BN) if self.sketch else vector_BN
