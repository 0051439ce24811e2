"""Options of the commands that measure: fidelity, plot-error, full-gradients, evaluate, doctor, demo."""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ghoststore.settings.option import about, option, options
from ghoststore.settings.projection import LEARNED_OPTIONS, ProjectionConfig
from ghoststore.settings.question import PartsOptions, RebuiltOptions, ValSetOption
from ghoststore.settings.shared import (
    FIRST_SAMPLES,
    FIRST_VAL_SAMPLES,
    FLOATS,
    LOSS_REDUCTION,
    AdapterOptions,
    Checkpoint,
    CheckpointOptions,
    CorpusOptions,
    Data,
    DeviceOption,
    EngineOptions,
    FieldsOption,
    LayersOptions,
    LengthOptions,
    MetricOption,
    ProgressOption,
    Reduction,
    StoreOption,
    WeightOption,
)

if TYPE_CHECKING:
    import torch

Parameters = Literal["all", "projected"]
METHODS = ("dot", "cosine", "preconditioned-dot", "preconditioned-cosine", "bm25", "tf-idf", "random")
"""The methods that are evaluated by default."""
LEXICAL = 0.1
"""The weight of words that is evaluated by default, and that `query` recommends (`benchmarks/results/hybrid.md`)."""


@options
class DrawOptions(RebuiltOptions, FieldsOption, MetricOption, StoreOption):
    """Options of commands that draw rows and val samples at random."""

    val_set: Data | None = option(None, "Draw the val samples here (default: among the part's own rows).", "Input")
    rows: int = option(200, "Rows that are ranked, drawn at random.", "Scoring")
    val_samples: int = option(20, "Val samples they are ranked for.", "Scoring")
    seed: int = option(0, "Seed of the draws.", "Advanced")


@options
class FidelityOptions(ProgressOption, LayersOptions, DrawOptions):
    """Options of ``ghoststore fidelity``."""

    part: str | None = option(None, "Part to measure (default: the only one).", "Input")


@options
class PlotErrorOptions(ProgressOption, DrawOptions):
    """Options of ``ghoststore plot-error``."""

    out: str | Path = field(
        metadata=about("New .png, .pdf or .svg; numbers go to a .json beside it.", "Output", metavar="FILE")
    )
    part: str | Sequence[str] | None = option(
        None,
        "A point of the curve; repeatable (default: every part; all of one checkpoint, corpus and choice of layers).",
        "Input",
        repeated=True,
    )
    reference: str = option(
        "full_layers",
        "full_layers: exact gradients of the projected layers; full: of all parameters; rank=N: the part built with a "
        "rank total of N; naive_proj_layers=N: a dense projection of the layers' exact gradients to N numbers.",
        "Scoring",
        metavar="WHAT",
    )


@options
class FullGradientsOptions(ProgressOption, LengthOptions, CorpusOptions, CheckpointOptions):
    """Options of ``ghoststore full-gradients``."""

    out: str | Path = field(metadata=about("New folder, or one to continue.", "Output", metavar="FOLDER"))
    parameters: Parameters = option("all", "Of the whole model, or of the layers that a build projects.", "Projection")
    proj_layers: Sequence[str] = option(
        (), "Layers of `parameters=projected` (default: mlp,attn), as of build.", "Projection"
    )
    exclude_layers: Sequence[str] = option((), "Layers to leave out of `proj_layers`.", "Projection")
    include_embeddings: bool = option(False, "The embedding layers, too.", "Projection")
    max_samples: int = option(64, FIRST_SAMPLES, "Input")
    dtype: str = option("float32", "Numbers in the files.", "Output", choices=FLOATS)
    dry_run: bool = option(False, "Print rows, numbers, bytes and memory; write nothing.", "Output")


@options
class EvaluateOptions(
    ProgressOption, EngineOptions, RebuiltOptions, FieldsOption, WeightOption, PartsOptions, ValSetOption, StoreOption
):
    """Options of ``ghoststore evaluate``."""

    out: str | Path = field(
        metadata=about("Folder for the results of the trainings; resumes there.", "Output", metavar="FOLDER")
    )
    part: str | Sequence[str] | None = option(
        None,
        "Part of the store (default: the only one). Repeated: builds of the same rows at successive checkpoints, whose "
        "scores are summed.",
        "Input",
        repeated=True,
    )
    run: str | None = option(None, "Evaluate the values of this training run as well.", "Input")
    methods: Sequence[str] = option(
        METHODS,
        f"{', '.join(METHODS)}; repeatable (default: all of these). Slow, only if named: "
        "exact-dot, exact-cosine, exact-layers-dot, exact-layers-cosine.",
        "Scoring",
        flag="--method",
        repeated=True,
    )
    tests: Sequence[str] = option(
        ("lds",), "lds (default), removal, tail-patch; repeatable.", "Scoring", flag="--test", repeated=True
    )
    drop: float = option(0.1, "removal: share of samples left out.", "Advanced")
    top_k: int = option(16, "tail-patch: samples of a step.", "Advanced")
    repeats: int = option(3, "removal, tail-patch: random sets to compare with.", "Advanced")
    halves: int = option(20, "Models to train, each on a random half.", "Model")
    max_steps: int = option(200, "Steps of each training.", "Model")
    batch_size: int = option(16, "Samples of a step.", "Model")
    learning_rate: float = option(3e-3, "Peak learning rate.", "Model")
    seed: int = option(0, "Seed of halves, weights and order.", "Advanced")
    damping: float | None = option(None, "Damping of the preconditioned methods (default: 0.1).", "Scoring")
    lexical: float | None = option(
        None,
        "Each method of the part's vectors once more, blended with BM25 as by `ghoststore query --lexical W` (default: "
        f"the one by which `query` ranks, at {LEXICAL}; 0: none).",
        "Scoring",
        metavar="W",
    )
    max_val_samples: int | None = option(None, FIRST_VAL_SAMPLES, "Input")
    workers: int | None = option(
        None, "Trainings at once (default: one a processor, at most 4; 1 on a GPU).", "Advanced"
    )

    def __post_init__(self) -> None:
        self.check_engine()


@options
class DoctorOptions(ProgressOption, AdapterOptions, DeviceOption, FieldsOption):
    """Options of ``ghoststore doctor``."""

    checkpoint: Checkpoint | None = option(
        None, "The model to examine: a folder in transformers' format, or a hub id.", "Model", required=True
    )
    model: "torch.nn.Module | None" = option(
        None, "Or a model in memory, with its tokenizer.", "Model", python_only=True
    )
    tokenizer: Any = option(None, "Folder of the model's tokenizer (default: the checkpoint's).", "Model")
    data: Data | None = option(None, "Corpus to draw a few samples from (default: built-in sentences).", "Input")
    projection: ProjectionConfig | None = option(
        None, "How a build would project gradients.", "Projection", group=ProjectionConfig, leave_out=LEARNED_OPTIONS
    )
    loss_reduction: Reduction = option("mean", LOSS_REDUCTION, "Scoring")
    model_dtype: str | None = option(
        None, "Numbers a build would compute with (default: float32).", "Model", choices=FLOATS
    )
    attn_implementation: str | None = option(
        None,
        "The attention kernel to examine (default: eager, sdpa and, on CUDA, flash_attention_2 if it is installed).",
        "Model",
    )
    max_length: int | None = option(
        None, "Longest sample (default: the model's positions, at most 128).", "Input", metavar="TOKENS"
    )
    samples: int = option(16, "Samples to look at, at least 3.", "Input")
    store: str | Path = option(".", "Folder whose disk is measured; nothing in it is changed.", "Output")


@options
class DemoOptions(ProgressOption):
    """Options of ``ghoststore demo``."""

    out: str | Path = option("ghoststore-demo", "A new folder for its files.", "Output")
    seed: int = option(0, "Seed of the training.", "Advanced")
    rows: int = option(2400, "Rows used, without the planted facts; at most 2400.", "Input")
    steps: int = option(700, "Training steps.", "Model")
    overwrite: bool = option(False, "Replace the folder if a demo made it.", "Output")
