"""The options that say how gradients are projected."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from ghoststore.errors import UsageError
from ghoststore.settings.option import check_at_least, check_choices, check_own_types, option

Compress = int | Literal["auto", "none"]
CompressBy = Literal["auto", "layer", "all"]
RankTotal = int | Literal["full"]
DRAWN_KINDS = ("gaussian", "rademacher", "orthonormal")
LEARNED = "pca"
"""The kind of projection whose sides are learned: the principal directions of the gradients."""
KINDS = (*DRAWN_KINDS, LEARNED)
PRECONDITIONS = ("auto", "none", "kronecker")
PLAIN_RANK_TOTAL = 256
"""Default numbers of a block that is not sketched."""

LEARNED_OPTIONS = ("compress_by", "precondition", "damping", "calibration_samples")
"""Names of the options of a projection that learns from a sample of the corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionConfig:
    """How to project gradients. ``None`` and ``"auto"`` are resolved from the other fields.

    By default blocks of up to 64 × 64 numbers are sketched, in a build to what 256 bytes a layer hold (64 numbers of
    float32, 2,048 of onebit), elsewhere to 64 numbers a layer. ``rank_total`` without ``compress``
    gives plain Kronecker blocks, which can be scored layer by layer. ``rank_total="full"`` keeps every axis at its own
    length: the vectors are then the gradients themselves.

    ``compress_by`` is ``"all"`` (the default of drawn kinds) for one sketch of all layers together, or ``"layer"`` (the
    default of learned sides) for one sketch of each layer, with sizes in proportion to the layers' shares of the
    squared norm of gradients. Scores can then be taken layer by layer. The kind ``"pca"`` and the sizes are learned
    from ``calibration_samples`` samples of the corpus, so only a build can have them.

    ``precondition="kronecker"`` multiplies the sides with the inverse root of the layers' second moment, as two
    factors: see ``docs/projections.md``. It is learned, too. ``damping`` is relative to the mean eigenvalue of
    each factor. ``"auto"`` means ``"kronecker"`` in a build (:meth:`for_build`), otherwise ``"none"``.
    """

    layers: tuple[str, ...] = option(
        ("auto",),
        "Layers: mlp, attn, norm, embeddings, head, adapter, all, module paths or globs; comma-separated. auto: those "
        "of a LoRA adapter, or mlp,attn without one.",
        "Projection",
        flag="--proj-layers",
    )
    exclude_layers: tuple[str, ...] = option((), "Layers to leave out of `layers`.", "Projection")
    include_embeddings: bool = option(False, "Project the embedding layers too.", "Projection")
    rank_total: RankTotal | None = option(
        None,
        "Numbers of a layer's block, k_in × k_out (default: 4096 before the sketch). Without `compress` nothing is "
        "sketched: so many numbers a layer are stored, plain Kronecker blocks, whose scores can be taken by layer.",
        "Projection",
        flag="--proj-rank-total",
        metavar="N|full",
    )
    rank_min: int = option(1, "Least rank of either side.", "Projection", flag="--proj-rank-min")
    seed: int = option(0, "Seed of the matrices.", "Projection", flag="--proj-seed")
    kind: str = option(
        "gaussian",
        "How matrices are drawn; pca: the principal directions of the gradients, learned (build alone).",
        "Projection",
        flag="--proj-kind",
        choices=KINDS,
        shortcut=("--proj-row-orthonormal", "orthonormal"),
    )
    compress: Compress | None = option(
        "auto",
        "Sketch the whole vector to K numbers; auto: 256 bytes a layer (64 numbers of float32, 2,048 of onebit).",
        "Projection",
        flag="--proj-compress",
        metavar="K|none",
    )
    compress_by: CompressBy = option(
        "auto",
        "layer: a sketch of each layer, sized by its share of the gradient, so that `ghoststore query --layers` can be "
        "asked for; all: one of all together; auto: layer where anything is learned.",
        "Projection",
        flag="--proj-compress-by",
    )
    calibration_samples: int = option(256, "Samples of the corpus that the projection is learned from.", "Projection")
    precondition: str = option(
        "auto",
        "kronecker: scores are products in the inverse second moment of the gradients, which is learned as two "
        "factors a layer (K-FAC); auto: kronecker, unless `optimizer_state`, pca or full blocks are given.",
        "Projection",
        flag="--proj-precondition",
        choices=PRECONDITIONS,
    )
    damping: float = option(
        0.1,
        "Damping of `precondition`, relative to the mean eigenvalue of each factor.",
        "Projection",
        flag="--proj-damping",
    )

    def __post_init__(self) -> None:
        check_own_types(self)
        check_choices(self)
        if not 0 < self.damping < math.inf:
            raise UsageError(f"`damping` must be above 0, not {self.damping}")
        check_at_least(1, calibration_samples=self.calibration_samples, rank_min=self.rank_min)
        if isinstance(self.rank_total, str) and self.rank_total != "full":
            raise UsageError(f"`rank_total` takes a number or full, not {self.rank_total!r}")
        if isinstance(self.rank_total, int):
            check_at_least(1, rank_total=self.rank_total)
        if isinstance(self.compress, int) and self.compress < 1:
            raise UsageError(f"`compress` must be at least 1 or none, not {self.compress}")
        if isinstance(self.compress, str) and self.compress not in ("auto", "none"):
            raise UsageError(f"`compress` takes a number, none or auto, not {self.compress!r}")

    @property
    def sketched(self) -> bool:
        """Whether the Kronecker blocks are sketched."""
        return self.compress != "none" and not (self.compress == "auto" and self.rank_total is not None)

    @property
    def by_layer(self) -> bool:
        """Whether each layer has a sketch of its own."""
        by_default = self.compress_by == "auto" and self.learns_sides
        return self.sketched and (by_default or self.compress_by == "layer")

    def for_build(self, *, optimizer_state: bool) -> Self:
        """This configuration with ``precondition`` resolved for a build.

        The default is ``"kronecker"``, except with an ``optimizer_state``, which is a metric of its own, and where
        vectors should be the gradients themselves (full blocks) or their best approximation (``"pca"``).
        """
        if self.precondition != "auto":
            return self
        plain = optimizer_state or self.rank_total == "full" or self.kind == LEARNED
        return replace(self, precondition="none" if plain else "kronecker")

    @property
    def preconditioned(self) -> bool:
        """Whether the sides are multiplied with a preconditioner."""
        return self.precondition == "kronecker"

    @property
    def learns_sides(self) -> bool:
        """Whether the sides are learned from the corpus."""
        return self.kind == LEARNED or self.preconditioned


def config_of(stored: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> ProjectionConfig:
    """The configuration from ``projection`` and ``layers`` of a manifest, which `ProjectionPlan.to_json` wrote."""
    settings = {field.name: stored[field.name] for field in fields(ProjectionConfig) if stored[field.name] is not None}
    patterns = {name: tuple(stored[name]) for name in ("layers", "exclude_layers")}
    return ProjectionConfig(**{**settings, **patterns, "compress": stored["compress"] or unsketched(stored, layers)})


def unsketched(stored: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Literal["auto", "none"]:
    """The option ``compress`` behind a manifest without a sketch, from its sections ``projection`` and ``layers``.

    It was ``auto`` if blocks are larger than those of ``none``: the model was then too small for a sketch. If all
    blocks are small, both give the same.
    """
    large = any(layer["ranks"][0] * layer["ranks"][1] > PLAIN_RANK_TOTAL for layer in layers)
    return "auto" if stored["rank_total"] is None and large else "none"
