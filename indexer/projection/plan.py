"""The plan of a projection: the ranks and columns of every layer, before any matrix is drawn."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from torch import nn

from ghoststore.errors import LayerError, UsageError
from ghoststore.settings.projection import PLAIN_RANK_TOTAL, ProjectionConfig, RankTotal
from indexer.projection.blocks import Block
from indexer.projection.calibration import Calibration, LayerShape
from indexer.projection.selection import default_layers, select_blocks

SKETCHED_RANK_TOTAL = 64 * 64
NUMBERS_PER_LAYER = 64
"""Of a sketch by default, where no encoding says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """One layer of the manifest: its block, and the ranks to which it is projected."""

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
    """(k_out, k_in): ⌊√rank_total⌋ each. If an axis is shorter than that, the other one gets ⌊rank_total ÷ its length⌋.

    The product never exceeds ``rank_total``. With ``"full"`` the ranks are the lengths of the axes.
    """
    if rank_total == "full":
        return n_out, n_in
    k = math.isqrt(rank_total)
    if n_in < k:
        return min(n_out, rank_total // n_in), n_in
    if n_out < k:
        return n_out, min(n_in, rank_total // n_out)
    return k, k


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionPlan:
    """The resolved projection of one model: all choices are made, and no matrix is drawn yet."""

    config: ProjectionConfig
    layers: tuple[BlockPlan, ...]
    compress: int | None
    """K, the numbers after the sketch (of all sketches together, if each layer has one); None for plain Kronecker
    blocks.
    """
    covered: int
    total: int
    """Numbers in the parameters of the layers, and in all parameters of the model (tied ones once)."""
    calibration: Calibration | None = None
    """What was learned from the corpus; None if nothing must be learned, or has been yet."""

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that the layers cover, 0 to 1."""
        return self.covered / self.total if self.total else 0.0

    @property
    def shared_out(self) -> bool:
        """Whether each layer has a sketch of its own, with a size that is learned."""
        return self.compress is not None and self.config.by_layer

    @property
    def calibrated(self) -> bool:
        """Whether anything is learned from a sample of the corpus. Blocks too small for a sketch share nothing out."""
        return self.config.learns_sides or self.shared_out

    @property
    def replayed(self) -> dict[str, int]:
        """How many modules without a formula run again for each sample, by class."""
        uses = (use for layer in self.layers for use in layer.block.uses if not use.kind.has_formula)
        return dict(Counter({use.module: use.owner for use in uses}.values()))

    @property
    def shapes(self) -> list[LayerShape]:
        """The shape of each layer, for a calibration."""
        return [
            LayerShape(layer.block.name, layer.k_out, layer.k_in, layer.block.n_out, layer.block.n_in)
            for layer in self.layers
        ]

    @property
    def group_count(self) -> int:
        """The number of :attr:`groups`, which is known before anything is learned."""
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
        """(name, start, stop) of each group of stored columns that has a score of its own."""
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
    def for_model(
        cls, model: nn.Module, config: ProjectionConfig, *, numbers: int = NUMBERS_PER_LAYER
    ) -> ProjectionPlan:
        """Ranks and columns of every layer of ``model`` that ``config`` selects. ``numbers`` a layer are what
        ``compress="auto"`` sketches to, if the blocks have more.

        Raises LayerError as :func:`select_blocks` does, and for a rank larger than a layer; UsageError if ``compress``
        is not smaller than the vector.
        """
        if config.layers == ("auto",):
            config = replace(config, layers=default_layers(model))
        selection = select_blocks(
            model, config.layers, config.exclude_layers, include_embeddings=config.include_embeddings
        )
        rank_total = config.rank_total or (SKETCHED_RANK_TOTAL if config.sketched else PLAIN_RANK_TOTAL)
        if rank_total != "full" and config.rank_min**2 > rank_total:
            raise UsageError(
                f"`rank_min={config.rank_min}` needs blocks of {config.rank_min**2} numbers or more, "
                f"but `rank_total` is {rank_total}"
            )
        layers, start = [], 0
        for block in selection.blocks:
            cls._refuse_too_large(config, block)
            k_out, k_in = ranks(block.n_out, block.n_in, rank_total)
            if block.is_matrix and min(k_out, k_in) < config.rank_min:
                raise LayerError(
                    f"`rank_min={config.rank_min}` cannot be met by layer {block.name!r} "
                    f"({block.n_out} × {block.n_in}), whose ranks are {k_out} × {k_in}; lower `rank_min` or "
                    f"leave the layer out with `exclude_layers` {block.name!r}"
                )
            layers.append(BlockPlan(block=block, k_out=k_out, k_in=k_in, start=start))
            start = layers[-1].stop
        return cls(
            config=config,
            layers=tuple(layers),
            compress=cls._resolve_compress(config, start, len(layers), numbers),
            covered=selection.covered,
            total=selection.total,
        )

    @staticmethod
    def _refuse_too_large(config: ProjectionConfig, block: Block) -> None:
        numbers = block.n_out * block.n_in
        if isinstance(config.rank_total, int) and block.is_matrix and config.rank_total > numbers:
            raise LayerError(
                f"`rank_total={config.rank_total}` is larger than layer {block.name!r}, whose gradient "
                f"is {block.n_out} × {block.n_in} = {numbers} numbers; lower the rank, leave the layer out with "
                f"`exclude_layers` {block.name!r}, or give `full` for every axis at its own length"
            )

    @staticmethod
    def _resolve_compress(config: ProjectionConfig, dimension: int, layers: int, numbers: int) -> int | None:
        """K of the sketch for Kronecker vectors of ``dimension`` numbers; None for no sketch."""
        if not config.sketched:
            return None
        if isinstance(config.compress, int):
            if config.compress >= dimension:
                raise UsageError(
                    f"`compress={config.compress}` is not smaller than the {dimension} numbers of the "
                    "Kronecker blocks; give a smaller K, or none"
                )
            if config.by_layer and config.compress < layers:
                raise UsageError(
                    f"`compress={config.compress}` is less than a number for each of {layers} layers; give more, "
                    "or `compress_by=all`"
                )
            return config.compress
        default = numbers * layers
        return default if default < dimension else None

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``projection``, without the digests of matrices and scales.

        Settings are resolved, and None if they are not used, so that a setting without effect on the vectors cannot
        stop a build from being continued.
        """
        config = self.config
        return {
            **asdict(config),
            "layers": list(config.layers),
            "exclude_layers": list(config.exclude_layers),
            "compress": self.compress,
            "compress_by": "layer" if self.shared_out else "all",
            "precondition": "kronecker" if config.preconditioned else "none",
            "damping": config.damping if config.preconditioned else None,
            "calibration_samples": config.calibration_samples if self.calibrated else None,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "kronecker_dimension": self.kronecker_dimension,
            "dimension": self.dimension,
        }

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
