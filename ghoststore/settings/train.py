"""Options of ``ghoststore train``: optimization, scoring, and all others."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from ghoststore.errors import UsageError
from ghoststore.settings.choosing import ChoosingConfig, refuse_contrast_in
from ghoststore.settings.keywords import refuse_unknown
from ghoststore.settings.option import about, check_at_least, check_choices, option, options
from ghoststore.settings.projection import LEARNED_OPTIONS, ProjectionConfig
from ghoststore.settings.shared import (
    DOMAINS,
    FIRST_SAMPLES,
    FIRST_VAL_SAMPLES,
    FLOATS,
    OVERLONG,
    VECTOR_DTYPES,
    CorpusOptions,
    Data,
    DeviceOption,
    Overlong,
    ProgressOption,
    TokenizerSource,
)

Method = Literal["GradDotProd", "Regular"]
Score = Literal["exact", "sketched"]
Route = Literal["auto", "direct", "gram", "low-rank"]
ScoreLayers = Literal["blocks", "all"]
ScoreMetric = Literal["sgd", "adam"]
ValSampling = Literal["rotate", "fixed"]
OnStoreError = Literal["stop", "continue"]
KEPT_DTYPE = "int8"
VAL_REFRESH = 10
"""Steps of one val gradient where nothing is said (benchmarks/results/training-scores.md, dot-product.md)."""


def check_kept(keep_gradients: int | None, proj_dtype: str) -> None:
    """UsageError for options of gradients that are kept which cannot be, or would be ignored."""
    check_at_least(1, keep_gradients=keep_gradients)
    if proj_dtype not in VECTOR_DTYPES:
        raise UsageError(f"`proj_dtype={proj_dtype}` is no encoding of vectors; give {', '.join(VECTOR_DTYPES)}")
    if keep_gradients is None and proj_dtype != KEPT_DTYPE:
        raise UsageError(f"`proj_dtype={proj_dtype}` belongs to `keep_gradients`")


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """The options of AdamW, of its schedule (linear warm-up, then half a cosine), and of the batches."""

    batch_size: int = option(8, "Samples of one rank's micro-batch.", "Model")
    gradient_accumulation_steps: int = option(1, "Micro-batches of a step.", "Model")
    max_steps: int | None = option(None, "Optimizer steps (default: one pass over the data).", "Model")
    learning_rate: float = option(6e-4, "Peak learning rate of AdamW.", "Model")
    min_learning_rate_ratio: float = option(0.1, "The cosine ends at this share of the peak.", "Model")
    warmup_steps: int | None = option(
        None, "Linear warm-up (default: a twentieth of the steps, at most 2,000).", "Model"
    )
    weight_decay: float = option(0.1, "Weight decay of matrices; vectors (biases, norms) do not decay.", "Model")
    adam_beta1: float = option(0.9, "Decay of AdamW's mean of gradients.", "Model")
    adam_beta2: float = option(0.95, "Decay of AdamW's mean of squares.", "Model")
    max_grad_norm: float = option(1.0, "Gradient clipping; 0 for none.", "Model")

    def __post_init__(self) -> None:
        check_at_least(
            1,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            max_steps=self.max_steps,
        )
        check_at_least(
            0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm
        )
        if not 0 < self.learning_rate <= 1e30:
            raise UsageError(f"`learning_rate` must be above 0 and at most 1e30, not {self.learning_rate}")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise UsageError(f"`min_learning_rate_ratio` must be between 0 and 1, not {self.min_learning_rate_ratio}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"`{name}` must be at least 0 and below 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """The options that say how training samples are scored."""

    method: Method = option("GradDotProd", "Regular trains without scores: the same weights, bit for bit.", "Scoring")
    val_batch_size: int = option(8, "Val samples of one val gradient.", "Scoring")
    val_refresh_interval: int | None = option(
        None, "Steps for which a val gradient is used (default: 10; with `candidates` 1).", "Scoring"
    )
    val_sampling: ValSampling = option(
        "rotate", "Each val gradient takes the next val samples of a seeded order, or always the first.", "Scoring"
    )
    val_groups: bool = option(False, "Score against each domain of the val set as well.", "Scoring")
    score: Score | None = option(
        None,
        "sketched: approximate, through random projections, at a fraction of the cost (default: exact; of `candidates` "
        "sketched, unless `route`, `per_layer` or a choice of layers asks for exact ones).",
        "Scoring",
    )
    route: Route = option(
        "auto",
        "How exact scores are computed; auto takes the cheapest for each parameter. low-rank: from the 64 leading "
        "directions of its val gradient, where these hold 99 % of it; direct and gram: to the last digits.",
        "Scoring",
    )
    per_layer: bool = option(False, "Keep the score of every layer.", "Scoring")
    exclude_layers: tuple[str, ...] = option((), "Layers whose parameters are left out of the score.", "Scoring")
    score_layers: ScoreLayers | None = option(
        None,
        "Score the linears of the transformer blocks alone, or every trainable parameter (default: all; with "
        "`candidates` blocks).",
        "Scoring",
    )
    score_metric: ScoreMetric = option(
        "sgd", "adam: what a step of the optimizer takes off the val loss, not one along the gradient.", "Scoring"
    )
    keep_gradients: int | None = option(
        None,
        "Keep the projected gradients of every EVERYth step's samples in the run, for `ghoststore query --run`. Save "
        "intervals are rounded up to whole times EVERY.",
        "Projection",
        metavar="EVERY",
    )
    proj_dtype: str = option(
        KEPT_DTYPE, "Numbers of `keep_gradients` in the store.", "Projection", choices=VECTOR_DTYPES
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(1, val_batch_size=self.val_batch_size, val_refresh_interval=self.val_refresh_interval)
        check_kept(self.keep_gradients, self.proj_dtype)
        if self.keep_gradients is not None and self.method == "Regular":
            raise UsageError("`keep_gradients` belongs to `method=GradDotProd`: a regular step has no taps")
        if self.method == "Regular" and (self.score_metric != "sgd" or self.score_layers is not None):
            raise UsageError("`score_metric` and `score_layers` belong to `method=GradDotProd`")
        if self.score_metric == "adam" and self.route == "gram":
            raise UsageError("`score_metric=adam` takes the direct route: leave `route=gram` out")
        if self.score == "sketched" and self.of_exact:
            instead = "" if self.of_exact == ["`route`"] else "; which layers are sketched `projection.layers` says"
            raise UsageError(
                f"{' and '.join(self.of_exact)} belong{'s' * (len(self.of_exact) == 1)} to `score=exact`: leave out "
                f"one or the other{instead}"
            )

    @property
    def of_exact(self) -> list[str]:
        """The options given, in backticks, that exact scores alone have."""
        given = {
            "exclude_layers": bool(self.exclude_layers),
            "score_layers": self.score_layers is not None,
            "route": self.route != "auto",
        }
        return [f"`{name}`" for name, is_given in given.items() if is_given]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options for model and data, and for how often things are written."""

    architecture: str | None = option(None, "GPT2-Tiny, GPT2-Small, GPT2-Medium or GPT2-Large, from scratch.", "Model")
    model_config: str | Path | None = option(
        None,
        "A new model of this configuration of a causal language model of transformers (a config.json).",
        "Model",
        flag="--config",
        metavar="FILE",
    )
    max_length: int | None = option(
        None, "Longest row in tokens (default: the model's positions, at most 1024).", "Input"
    )
    overlong: Overlong = option("window", OVERLONG, "Input")
    dropout: float = option(0.0, "Dropout of a new model.", "Model")
    seed: int = option(0, "Seed of weights, data order and dropout.", "Advanced")
    model_dtype: str = option("float32", "dtype of the parameters.", "Model", choices=FLOATS)
    train_dtype: str | None = option(
        None,
        "dtype of the arithmetic: autocast where it is narrower (default: the parameters').",
        "Model",
        choices=FLOATS,
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.", "Advanced")
    eval_interval: int = option(100, "Steps between val losses.", "Output")
    dot_prod_save_interval: int = option(10, "Steps committed to the store together.", "Output")
    checkpoint_interval: int | None = option(None, "Steps between checkpoints (default: `eval_interval`).", "Output")
    keep_checkpoints: int | None = option(
        2, "How many of the newest checkpoints to keep.", "Output", metavar="N|all", none="all"
    )
    on_store_error: OnStoreError = option(
        "stop", "If the store cannot be written: stop, or train on without scores.", "Output"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(
            1,
            eval_interval=self.eval_interval,
            dot_prod_save_interval=self.dot_prod_save_interval,
            checkpoint_interval=self.checkpoint_interval,
            keep_checkpoints=self.keep_checkpoints,
        )
        check_at_least(2, max_length=self.max_length)
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"`seed` must be between 0 and 2**63 - 1, not {self.seed}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"`dropout` must be at least 0 and below 1, not {self.dropout}")
        if self.model_dtype == "float16":
            raise UsageError(
                "`model_dtype=float16`: optimizer steps are too small for it; keep float32 parameters and give "
                "`train_dtype=float16`"
            )
        if self.model_dtype != "float32" and self.arithmetic != self.model_dtype:
            raise UsageError(
                f"`train_dtype={self.arithmetic}` with `model_dtype={self.model_dtype}`: arithmetic is that of the "
                "parameters, or narrower than float32 parameters"
            )

    @property
    def arithmetic(self) -> str:
        """The dtype of the forward and backward pass."""
        return self.train_dtype or self.model_dtype

    @property
    def autocast(self) -> bool:
        """Whether the arithmetic has another dtype than the parameters."""
        return self.arithmetic != self.model_dtype


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """All options of a training run, except the paths of its inputs and outputs. :meth:`of` takes them flat."""

    optimization: OptimizationConfig = OptimizationConfig()
    scoring: ScoringConfig = ScoringConfig()
    choosing: ChoosingConfig = field(default_factory=ChoosingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choosing.candidates is None:
            return
        if self.scoring.method != "GradDotProd":
            raise UsageError(
                f"`candidates` are chosen by their scores: `method={self.scoring.method}` gives none; leave out one of "
                "them"
            )
        if self.choosing.policy == "greats":
            self._refuse_greats()
        if self.contrast:
            refuse_contrast_in(self.scoring.score_metric)
        accumulated = self.optimization.gradient_accumulation_steps
        if accumulated > 1:
            raise UsageError(
                f"`gradient_accumulation_steps={accumulated}` does not go with `candidates`: `keep` says how many "
                "samples a step trains on, at most `batch_size` of them at a time; leave it out"
            )

    def _refuse_greats(self) -> None:
        """UsageError where products within a step's candidates are not to be had."""
        candidates, size = self.choosing.candidates or 0, self.optimization.batch_size
        changes = ["leave out `score=sketched`"] if self.score != "exact" else []
        changes += ["leave out `score_metric=adam`"] if self.scoring.score_metric != "sgd" else []
        changes += [f"give `batch_size={candidates}`, not {size}"] if candidates > size else []
        if changes:
            raise UsageError(
                f"`policy=greats` takes products of whole gradients of all {candidates} candidates, scored together: "
                f"{' and '.join(changes)}"
            )

    def _refuse_contrast(self, own: int, ranks: int) -> None:
        """UsageError where the exact products of the candidates are not to be had at once."""
        choosing, size = self.choosing, self.optimization.batch_size
        changes = [f"`batch_size={own}`, not {size}"] if own > size else []
        if ranks > 1 and choosing.choose_over == "all":
            changes.append("`choose_over=rank`")
            if choosing.keep is not None and choosing.keep % ranks:
                changes.append(f"`keep={choosing.keep - choosing.keep % ranks or ranks}`")
        if not changes:
            return
        without = f" without {' and '.join(self.against_sketched)}" if self.against_sketched else ""
        where = f", and they are on {ranks} ranks" if ranks > 1 and choosing.choose_over == "all" else ""
        raise UsageError(
            f"`contrast` of exact scores takes products of all {own} candidates of a rank, scored together{where}: "
            f"give {' and '.join(changes)}, or `score=sketched`{without}"
        )

    @property
    def against_sketched(self) -> list[str]:
        """The options given, in backticks, that do not go with sketched scores, or not with a global sketch."""
        scoring = self.scoring
        greats = ["`policy=greats`"] if self.choosing.policy == "greats" else []
        return [*scoring.of_exact, *(["`per_layer`"] if scoring.per_layer else []), *greats]

    @property
    def score(self) -> Score:
        """The kind of score; of candidates sketched unless something is given that exact ones alone have."""
        if self.scoring.score is not None:
            return self.scoring.score
        return "exact" if self.choosing.candidates is None or self.against_sketched else "sketched"

    @property
    def val_refresh_interval(self) -> int:
        """Steps for which a val gradient is used. Candidates take a new one at every step: with an old one they are
        chosen hardly better than by chance, while sums of scores lose little.
        """
        if self.scoring.val_refresh_interval is not None:
            return self.scoring.val_refresh_interval
        return VAL_REFRESH if self.choosing.candidates is None else 1

    @property
    def contrast(self) -> bool:
        """Whether candidates are chosen by contrast: where nothing is said, by sketched scores in the plain metric, if
        the policy ranks them. (A threshold is one of scores.)
        """
        if self.choosing.contrast is not None:
            return self.choosing.contrast
        ranked = self.choosing.policy in ("top-k", "bottom-k", "reweight")
        return ranked and self.score == "sketched" and self.scoring.score_metric == "sgd"

    @property
    def score_layers(self) -> ScoreLayers | None:
        """Of exact scores; None of sketched ones, whose projection names its layers."""
        if self.score == "sketched" or self.scoring.score_layers is not None:
            return self.scoring.score_layers
        return "all" if self.choosing.candidates is None else "blocks"

    def drawn(self, ranks: int) -> int:
        """Samples that each of ``ranks`` draws for a step. UsageError for candidates that cannot be dealt out."""
        choosing, optimization = self.choosing, self.optimization
        if choosing.policy == "greats" and ranks > 1:
            raise UsageError(f"`policy=greats` takes products of all candidates: run one process, not {ranks}")
        if choosing.candidates is None:
            return optimization.batch_size * optimization.gradient_accumulation_steps
        for name, count in (("candidates", choosing.candidates), ("keep", choosing.keep)):
            if count is not None and count % ranks and (name == "candidates" or choosing.choose_over == "rank"):
                raise UsageError(
                    f"`{name}={count}` cannot be dealt out to {ranks} ranks in equal shares: give a multiple of {ranks}"
                )
        if self.contrast and self.score == "exact":
            self._refuse_contrast(choosing.candidates // ranks, ranks)
        return choosing.candidates // ranks

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The configuration from flat ``options``. TypeError for an unknown name."""
        refuse_unknown("TrainConfig.of", options, FLAT)

        def part(kind: type) -> dict[str, Any]:
            return {spec.name: options[spec.name] for spec in fields(kind) if spec.name in options}

        return cls(
            **part(RunConfig),
            optimization=OptimizationConfig(**part(OptimizationConfig)),
            scoring=ScoringConfig(**part(ScoringConfig)),
            choosing=ChoosingConfig(**part(ChoosingConfig)),
        )


FLAT = [spec.name for kind in (RunConfig, OptimizationConfig, ScoringConfig, ChoosingConfig) for spec in fields(kind)]
"""The names that :meth:`TrainConfig.of` accepts."""


@options
class TrainOptions(
    ProgressOption, RunConfig, ScoringConfig, ChoosingConfig, OptimizationConfig, DeviceOption, CorpusOptions
):
    """Options of ``ghoststore train``."""

    val_set: Data | None = option(None, "Val samples that training samples are scored against.", "Input")
    store: str | Path | None = option(None, "The store that scores go to: a directory.", "Output")
    output_dir: str | Path = field(metadata=about("Folder for checkpoints (and tokens).", "Output"))
    name: str | None = option(None, "Name of the run (default: after model and data).", "Output")
    checkpoint: str | Path | None = option(None, "Continue from this checkpoint instead.", "Model")
    tokenizer: TokenizerSource | None = option(
        None, "Folder of a saved tokenizer (default: the checkpoint's or shards').", "Model"
    )
    domains: tuple[str, ...] = option((), DOMAINS, "Input", flag="--domain", repeated=True)
    max_samples: int | None = option(None, FIRST_SAMPLES, "Input")
    max_val_samples: int | None = option(None, FIRST_VAL_SAMPLES, "Input")
    config: TrainConfig | None = option(
        None, "All options of training in one, instead of single ones.", "Advanced", python_only=True
    )
    projection: ProjectionConfig | None = option(
        None,
        "Of `score=sketched` and `keep_gradients`: how gradients are projected.",
        "Projection",
        group=ProjectionConfig,
        leave_out=("exclude_layers", *LEARNED_OPTIONS),
    )
    eval_only: bool = option(False, "Only the val loss of `checkpoint`.", "Output")
    dry_run: bool = option(False, "Say what would be done, and try two steps; write nothing.", "Output")
    tensorboard: str | Path | None = option(None, "Log to this TensorBoard folder.", "Output")
    wandb: str | None = option(
        None, "Log to Weights & Biases (offline unless WANDB_MODE is set).", "Output", metavar="PROJECT"
    )

    @classmethod
    def refuse_together(cls, names: Iterable[str]) -> None:
        """UsageError if ``config`` is given together with an option that it contains."""
        single = sorted(set(names) & set(FLAT))
        if "config" in names and single:
            raise UsageError(f"give config or single options, not both: {single}")

    def configuration(self) -> TrainConfig:
        """``config`` if it is given, else the configuration from the single options."""
        return self.config or TrainConfig.of(**{name: getattr(self, name) for name in FLAT})
