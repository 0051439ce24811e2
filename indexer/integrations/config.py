"""The configuration of GhostEngineManager: a GhostConfig, or the fields of a configuration of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ghoststore.errors import UsageError
from ghoststore.settings.choosing import refuse_contrast_in
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import KEPT_DTYPE, OnStoreError, ScoreLayers, ScoreMetric, check_kept
from indexer.session.choosing import Choosing

Method = Literal["GradDotProd", "GradProjLora", "Regular"]

OUR_PREFIXES = ("proj_", "dot_prod_", "val_refresh_")
"""A field that begins so and is not known is an error; other unknown fields are the caller's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostConfig:
    """The configuration of :class:`GhostEngineManager`. Any object or mapping with fields of these names will do, see
    :meth:`of`.

    UsageError where it is made for a value that cannot be, or that the method would have to ignore. (``Regular`` does
    nothing, whatever it is given.)
    """

    method: Method = "GradDotProd"
    """GradDotProd: exact scores against the val data. GradProjLora: each sample's projected gradient (and, with val
    data, its sketched score). Regular: nothing."""
    store: str | Path | None = None
    """None: scores are in ``last_scores`` alone."""
    name: str = "run"
    """Of the run in the store."""
    max_steps: int | None = None
    """Optimizer steps of the whole training."""
    batch_size: int | None = None
    """Most samples of one rank's micro-batch; this, ``max_steps`` and ``samples`` are needed with a store."""
    gradient_accumulation_steps: int = 1
    """Most micro-batches of a step."""
    samples: int | Sequence[str] | None = None
    """Ids of the training samples, or how many there are; ``batch_idx`` are places among them."""
    domains: Sequence[str | None] | None = None
    """Of each of ``samples``."""
    dot_prod_save_interval: int = 10
    """Steps that are committed to the store together."""
    val_refresh_interval: int = 1
    """Steps for which a val gradient is used."""
    per_layer: bool = False
    """Keep the score of every layer in the store; under GradProjLora for plain blocks only, not for a sketch."""
    exclude_layers: tuple[str, ...] | str = ()
    """Patterns of modules to leave out; commas between them in a string."""
    proj_layers: tuple[str, ...] | str = ("auto",)
    """This and the next are of GradProjLora and of ``keep_gradients``, see :class:`ProjectionConfig`."""
    proj_rank_total: int | Literal["full"] | None = None
    proj_rank_min: int = 1
    proj_compress: int | Literal["auto", "none"] = "auto"
    proj_kind: str = "gaussian"
    proj_row_orthonormal: bool = False
    """The same as ``proj_kind="orthonormal"``."""
    proj_seed: int = 0
    include_embeddings: bool = False
    score_layers: ScoreLayers | None = None
    """``blocks``: GradDotProd scores the linears of the transformer blocks alone; ``all``: every trainable parameter
    (None: all; with ``choosing`` blocks)."""
    score_metric: ScoreMetric = "sgd"
    """``adam``: scores of what a step of the optimizer, torch's Adam or AdamW, takes off the val loss."""
    choosing: Choosing | None = None
    """Train on those samples of each micro-batch alone that a policy chooses by their scores; None: on all."""
    keep_gradients: int | None = None
    """Keep the projected gradients of every so many steps' samples in the store, as ``proj_dtype``, whatever the
    method. None: GradProjLora keeps those of every step, as float32."""
    proj_dtype: str = KEPT_DTYPE
    on_store_error: OnStoreError = "stop"
    """``continue``: training goes on without scores in the store, after a warning."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UsageError(f"`method` {self.method!r} is unknown; known: {', '.join(get_args(Method))}")
        if self.method == "Regular":
            return
        for name in ("exclude_layers", "proj_layers"):
            object.__setattr__(self, name, _patterns(getattr(self, name)))
        self._check_numbers()
        if self.on_store_error not in get_args(OnStoreError):
            raise UsageError(
                f"`on_store_error` {self.on_store_error!r} is unknown; known: {', '.join(get_args(OnStoreError))}"
            )
        if self.store is not None:
            lacking = [name for name in ("max_steps", "batch_size", "samples") if getattr(self, name) is None]
            if lacking:
                raise UsageError(f"with a store the configuration needs {', '.join(f'`{name}`' for name in lacking)}")
        if self.choosing is not None and not isinstance(self.choosing, Choosing):
            raise UsageError(f"`choosing` is a ghoststore.Choosing, not {self.choosing!r:.60}")
        if self.choosing is not None and self.choosing.contrast:
            refuse_contrast_in(self.score_metric)
        if self.domains is not None and self.samples is None:
            raise UsageError("`domains` are those of `samples`: give `samples`, too")
        if self.method == "GradProjLora":
            if self.score_layers is not None:
                raise UsageError("`score_layers` belongs to `method=GradDotProd`; GradProjLora takes `proj_layers`")
            if self.proj_row_orthonormal and self.proj_kind not in ("gaussian", "orthonormal"):
                raise UsageError(f"`proj_row_orthonormal` contradicts `proj_kind` {self.proj_kind!r}; give one of them")
            self.projection()  # refuses what cannot be
        else:
            self._refuse_projection()

    def _check_numbers(self) -> None:
        check_kept(self.keep_gradients, self.proj_dtype)
        if self.keep_gradients is not None and self.store is None:
            raise UsageError("`keep_gradients` keeps them in a store: give `store`, too")
        optional = ("max_steps", "batch_size")
        for name in ("gradient_accumulation_steps", "dot_prod_save_interval", "val_refresh_interval", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"`{name}` must be a whole number of at least 1, not {value!r}")

    def _refuse_projection(self) -> None:
        """What only a projection reads is not ignored."""
        if self.keep_gradients is not None:
            self.projection()  # refuses what cannot be
            return
        for field in fields(self):
            if field.name.startswith("proj_") or field.name == "include_embeddings":
                value = getattr(self, field.name)
                if value != field.default:
                    raise UsageError(
                        f"`{field.name}={value!r}` belongs to `method=GradProjLora` or `keep_gradients`; {self.method} "
                        "scores every trainable parameter but those of `exclude_layers`"
                    )

    @classmethod
    def of(cls, config: Any) -> GhostConfig:
        """From ``config``, an object (its class's attributes included) or a mapping: the fields it has, the defaults
        for others. Other fields are the caller's own, but for those that begin like ours (``proj_``, ``dot_prod_``,
        ``val_refresh_``): UsageError for one that is not known.
        """
        if isinstance(config, cls):
            return config
        names = {f.name for f in fields(cls)}
        if isinstance(config, Mapping):
            values: dict[str, Any] = {str(name): value for name, value in config.items()}
        else:
            of_config = [name for name in dir(config) if name in names or name.startswith(OUR_PREFIXES)]
            values = {name: getattr(config, name) for name in of_config}
        unknown = sorted(name for name in values if name.startswith(OUR_PREFIXES) and name not in names)
        if unknown:
            raise UsageError(
                f"the configuration has {unknown[0]!r}, which is not known; fields: {', '.join(sorted(names))}"
            )
        known = {name: value for name, value in values.items() if name in names}
        if not known:
            raise UsageError(
                f"a configuration of type {type(config).__name__} has none of the fields {', '.join(sorted(names))}"
            )
        return cls(**known)

    @property
    def scored_layers(self) -> ScoreLayers | None:
        """Of exact scores; None: all, or those of a projection."""
        if self.method == "GradDotProd" and self.score_layers is None and self.choosing is not None:
            return "blocks"
        return self.score_layers

    @property
    def pairs(self) -> bool:
        """Whether products within a micro-batch are needed; a projection's vectors give them without."""
        return self.method == "GradDotProd" and self.choosing is not None and self.choosing.contrast

    def projection(self) -> ProjectionConfig:
        """The projection of GradProjLora, and of ``keep_gradients``."""
        return ProjectionConfig(
            layers=_patterns(self.proj_layers),
            exclude_layers=_patterns(self.exclude_layers),
            include_embeddings=self.include_embeddings,
            rank_total=self.proj_rank_total,
            rank_min=self.proj_rank_min,
            seed=self.proj_seed,
            kind="orthonormal" if self.proj_row_orthonormal else self.proj_kind,
            compress=self.proj_compress,
        )


def _patterns(given: Sequence[str] | str) -> tuple[str, ...]:
    pieces = given.split(",") if isinstance(given, str) else given
    return tuple(piece.strip() for piece in pieces if piece.strip())
