"""What a training run is asked to do. Every field is an option of ``ghoststore train`` with the same name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal, get_args

from ghoststore.errors import UsageError
from indexer.dotprod.exact import Route
from indexer.encode.tokens import Overlong

Method = Literal["GradDotProd", "Regular"]
Score = Literal["exact", "sketched"]
ValSampling = Literal["rotate", "fixed"]
OnStoreError = Literal["stop", "continue"]

DTYPES = ("float32", "bfloat16", "float16")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _at_least(least: float, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not least <= value < inf:
            raise UsageError(f"{_option(name)} must be at least {least}, not {value}")


def _one_of(kind: Any, **values: str) -> None:
    for name, value in values.items():
        if value not in get_args(kind):
            raise UsageError(f"{_option(name)} {value!r} is unknown; known: {', '.join(get_args(kind))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizationConfig:
    """AdamW, linear warm-up, half a cosine, and the batches."""

    batch_size: int = 8
    """Samples of one rank's micro-batch."""
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    """Optimizer steps; None: one pass over the data."""
    learning_rate: float = 6e-4
    min_learning_rate_ratio: float = 0.1
    """The cosine ends at this share of the peak."""
    warmup_steps: int | None = None
    """None: a twentieth of the steps, at most 2,000."""
    weight_decay: float = 0.1
    """Of matrices; vectors (biases, norms) are not decayed."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    """0: no clipping."""

    def __post_init__(self) -> None:
        _at_least(1, batch_size=self.batch_size, gradient_accumulation_steps=self.gradient_accumulation_steps)
        _at_least(1, max_steps=self.max_steps)
        _at_least(0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm)
        if not 0 < self.learning_rate <= 1e30:
            raise UsageError(f"--learning-rate must be above 0 and at most 1e30, not {self.learning_rate}")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise UsageError(f"--min-learning-rate-ratio must be between 0 and 1, not {self.min_learning_rate_ratio}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{_option(name)} must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """How training samples are scored."""

    method: Method = "GradDotProd"
    val_batch_size: int = 8
    """Val samples of one val gradient."""
    val_refresh_interval: int = 1
    """Steps for which a val gradient is used."""
    val_sampling: ValSampling = "rotate"
    """``rotate``: each refresh takes the next val samples of a seeded order; ``fixed``: always the first."""
    val_groups: bool = False
    """Score against each domain of the val set as well."""
    score: Score = "exact"
    route: Route = "auto"
    per_layer: bool = False
    """Keep the score of every layer."""
    exclude_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _at_least(1, val_batch_size=self.val_batch_size, val_refresh_interval=self.val_refresh_interval)
        _one_of(Method, method=self.method)
        _one_of(Score, score=self.score)
        _one_of(Route, route=self.route)
        _one_of(ValSampling, val_sampling=self.val_sampling)
        if self.score == "sketched" and (self.exclude_layers or self.route != "auto"):
            raise UsageError("--exclude-layers and --route belong to --score exact; give --proj-layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The rest: model, data, how often what is written."""

    architecture: str | None = None
    """A name of ``ARCHITECTURES``; None where training starts from a checkpoint."""
    optimization: OptimizationConfig = OptimizationConfig()
    scoring: ScoringConfig = ScoringConfig()
    max_length: int | None = None
    overlong: Overlong = "window"
    dropout: float = 0.0
    seed: int = 0
    model_dtype: str = "float32"
    """dtype of the parameters."""
    train_dtype: str | None = None
    """dtype of the arithmetic: autocast where it is not the model's; None: the model's."""
    gradient_checkpointing: bool = False
    eval_interval: int = 100
    dot_prod_save_interval: int = 10
    """Steps committed to the store together."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints; None: as ``eval_interval``."""
    keep_checkpoints: int | None = 2
    """How many of the newest stay; None: all."""
    on_store_error: OnStoreError = "stop"

    def __post_init__(self) -> None:
        _at_least(
            1,
            eval_interval=self.eval_interval,
            dot_prod_save_interval=self.dot_prod_save_interval,
            checkpoint_interval=self.checkpoint_interval,
            keep_checkpoints=self.keep_checkpoints,
        )
        _at_least(2, max_length=self.max_length)
        _one_of(Overlong, overlong=self.overlong)
        _one_of(OnStoreError, on_store_error=self.on_store_error)
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed must be between 0 and 2**63 - 1, not {self.seed}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout must be at least 0 and below 1, not {self.dropout}")
        for name, dtype in (("model_dtype", self.model_dtype), ("train_dtype", self.arithmetic)):
            if dtype not in DTYPES:
                raise UsageError(f"{_option(name)} {dtype!r} is unknown; known: {', '.join(DTYPES)}")
        if self.model_dtype == "float16":
            raise UsageError(
                "--model-dtype float16: optimizer steps are too small for it; keep float32 parameters and give "
                "--train-dtype float16"
            )
        if self.model_dtype != "float32" and self.arithmetic != self.model_dtype:
            raise UsageError(
                f"--train-dtype {self.arithmetic} with --model-dtype {self.model_dtype}: arithmetic is that of the "
                "parameters, or narrower than float32 parameters"
            )

    @classmethod
    def of(cls, **options: Any) -> TrainConfig:
        """The configuration of flat ``options``: each goes to the part that has a field of its name.

        UsageError for a name that none has.
        """
        parts = {"optimization": OptimizationConfig, "scoring": ScoringConfig}
        taken: dict[str, Any] = {}
        for part, kind in parts.items():
            names = {f.name for f in fields(kind)} & options.keys()
            taken[part] = kind(**{name: options.pop(name) for name in names})
        unknown = sorted(options.keys() - {f.name for f in fields(cls) if f.name not in parts})
        if unknown:
            raise UsageError(f"there is no option {_option(unknown[0])}")
        return cls(**taken, **options)

    @property
    def arithmetic(self) -> str:
        """dtype of the forward and backward pass."""
        return self.train_dtype or self.model_dtype

    @property
    def autocast(self) -> bool:
        """Whether the arithmetic is not that of the parameters."""
        return self.arithmetic != self.model_dtype
