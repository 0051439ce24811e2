"""How gradients are projected: the options of a projection."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ghoststore.errors import UsageError

Compress = int | Literal["auto", "none"]
CompressBy = Literal["auto", "layer", "all"]
RankTotal = int | Literal["full"]
DRAWN_KINDS = ("gaussian", "rademacher", "orthonormal")
LEARNED = "pca"
"""The kind of projection whose sides are principal directions of the gradients."""
KINDS = (*DRAWN_KINDS, LEARNED)
PRECONDITIONS = ("auto", "none", "kronecker")


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
    calibration_samples: int = 256
    precondition: str = "auto"
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"projection kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if self.compress_by not in ("auto", "layer", "all"):
            raise UsageError(f"--proj-compress-by takes layer, all or auto, not {self.compress_by!r}")
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
