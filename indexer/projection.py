"""The projection P = S · diag(P_in ⊗ P_out): its configuration, ranks, matrices, columns and hash."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghoststore.errors import LayerError, UsageError
from indexer import draws
from indexer.layers import Sides, layer_type_by_name
from indexer.optimizer_state import SideScales
from indexer.selection import Block, Selection, Use
from indexer.sketch import Sketch

Compress = int | Literal["auto", "none"]
RankTotal = int | Literal["full"]

SKETCHED_RANK_TOTAL = 64 * 64
PLAIN_RANK_TOTAL = 256
NUMBERS_PER_LAYER = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig:
    """What the user asks for. ``None`` and ``"auto"`` are decided by the other fields, see :meth:`plan`.

    By default blocks of up to 64 × 64 are sketched to 64 numbers a layer. Giving ``rank_total`` without
    ``compress`` means plain Kronecker blocks, whose scores can be taken layer by layer; ``"full"`` keeps every
    axis at its own length: the vectors are then the gradients themselves.
    """

    layers: tuple[str, ...] = ("mlp", "attn")
    exclude_layers: tuple[str, ...] = ()
    include_embeddings: bool = False
    rank_total: RankTotal | None = None
    rank_min: int = 1
    seed: int = 0
    kind: str = "gaussian"
    compress: Compress = "auto"

    def __post_init__(self) -> None:
        if self.kind not in draws.KINDS:
            raise UsageError(f"projection kind {self.kind!r} is unknown; known: {', '.join(draws.KINDS)}")
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


def ranks(n_out: int, n_in: int, rank_total: RankTotal) -> tuple[int, int]:
    """(k_out, k_in): both ⌊√rank_total⌋ unless an axis is smaller; then the other takes what is left.

    The product never exceeds ``rank_total``; ``"full"`` is the lengths of the axes.
    """
    if rank_total == "full":
        return n_out, n_in
    side = math.isqrt(rank_total)
    if n_in < side:
        return min(n_out, rank_total // n_in), n_in
    if n_out < side:
        return n_out, min(n_in, rank_total // n_out)
    return side, side


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionPlan:
    """The projection of one model, resolved: nothing is left to decide and nothing is drawn yet."""

    config: ProjectionConfig
    layers: tuple[BlockPlan, ...]
    compress: int | None
    """K of the global sketch, or None for plain Kronecker blocks."""
    coverage: float

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
            k_out, k_in = ranks(block.n_out, block.n_in, rank_total)
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
            return config.compress
        wanted = NUMBERS_PER_LAYER * layers
        return wanted if wanted < dimension else None

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``projection`` without the hash: what :meth:`same_as` compares."""
        settings = asdict(self.config)
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


class Projection:
    """The drawn matrices of a plan: float32 on the CPU until :meth:`to`.

    ``scales``, by block name, multiply the columns of P_in and P_out: see :mod:`indexer.optimizer_state`.
    """

    def __init__(self, plan: ProjectionPlan, scales: Mapping[str, SideScales] | None = None) -> None:
        self.plan = plan
        self.sides: dict[str, tuple[Tensor, Tensor]] = {}
        """(P_in, P_out) by block name."""
        digest = hashlib.sha256()
        for layer in plan.layers:
            block = layer.block
            p_in = draw_side(plan.config, block.name, "in", layer.k_in, block.n_in)
            p_out = draw_side(plan.config, block.name, "out", layer.k_out, block.n_out)
            if scales is not None:
                p_in, p_out = p_in * scales[block.name].scale_in, p_out * scales[block.name].scale_out
            self.sides[block.name] = (p_in, p_out)
            for matrix in (p_in, p_out):
                digest.update(matrix.numpy().astype("<f4", copy=False).tobytes())
        self.sketch: Sketch | None = None
        if plan.compress:
            key = f"ghoststore/1|seed={plan.config.seed}"
            self.sketch = Sketch(key, plan.kronecker_dimension, plan.compress)
            digest.update(self.sketch.digest())
        self.hash = f"sha256:{digest.hexdigest()}"
        """SHA-256 of every matrix in the order of the layers, then of the sketch."""

    def to(self, device: torch.device | str) -> Projection:
        """Move every matrix to ``device``, in place."""
        device = torch.device(device)
        self.sides = {name: (p_in.to(device), p_out.to(device)) for name, (p_in, p_out) in self.sides.items()}
        if self.sketch:
            self.sketch.to(device)
        return self

    def unsketched(self) -> Projection:
        """The same matrices without the second step: vectors are the Kronecker blocks of the layers."""
        other = copy.copy(self)
        other.plan, other.sketch = replace(self.plan, compress=None), None
        return other

    def sides_of(self, block: Block, use: Use, module: nn.Module) -> Sides:
        """The matrices of ``block`` as ``use`` by ``module`` sees them, in the dtype of its weight."""
        p_in, p_out = self.sides[block.name]
        if use.flipped:
            p_in, p_out = p_out, p_in
        n_out, n_in = layer_type_by_name(use.type).axes(module)
        dtype = module.get_parameter("weight").dtype
        bias = None if use.bias_column is None else p_in[:, use.bias_column].to(dtype)
        return Sides(p_in[:, :n_in].to(dtype).contiguous(), bias, p_out[:, :n_out].to(dtype).contiguous())

    def assemble(self, blocks: Sequence[Tensor]) -> Tensor:
        """Blocks (B, k_out, k_in) in the order of the layers to vectors (B, D) float32."""
        vector_BN = torch.cat([block.flatten(1) for block in blocks], dim=1)
        return self.sketch(vector_BN) if self.sketch else vector_BN
