"""Options that several commands share, with the same names, defaults and help."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.settings.fields import Fields
from ghoststore.settings.option import about, option, options

Metric = Literal["cosine", "dot"]
METRICS: tuple[Metric, ...] = ("dot", "cosine")
Overlong = Literal["truncate", "window", "skip", "error"]
Reduction = Literal["mean", "sum"]
StepWeight = Literal["unit", "learning-rate", "loss-fall"]
STEP_WEIGHT_SYMBOLS: dict[StepWeight, str] = {"unit": "unit", "learning-rate": "η", "loss-fall": "fall"}
"""The factor of a step's scores, as headings and pictures show it."""
VECTOR_DTYPES = ("float32", "float16", "bfloat16", "int8", "onebit")
"""Of the vectors in a store."""
FLOATS = ("float32", "bfloat16", "float16")


class InMemory(Protocol):
    """A model or a tokenizer of transformers in memory."""

    @property
    def save_pretrained(self) -> Any: ...


Data: TypeAlias = str | Path | Sequence[Path] | Sequence[str] | Sequence[Mapping[str, object]] | Sized | Iterable[Any]
"""A path or several; or texts, dictionaries, or a table in memory (`datasets.Dataset`, pandas, Arrow). For a build also
a stream (`datasets.IterableDataset`).
"""
Checkpoint: TypeAlias = str | Path | InMemory
"""A folder in transformers' format, a hub id or nanoGPT's file; or a loaded model."""
AdapterUse = Literal["only", "merge", "ignore"]
TokenizerSource: TypeAlias = str | Path | InMemory
"""A folder or a hub id; or a loaded tokenizer."""


BASE = "Folder of the model that the checkpoint, an adapter, belongs to (default: the one that it names)."
ADAPTER = (
    "Of a checkpoint that is a LoRA adapter (default: only). only: gradients of the adapter's parameters; merge: it is "
    "merged into its base, whose gradients are taken; ignore: the model beside it in its folder."
)


def in_memory(given: object) -> bool:
    """Whether ``given`` is an object in memory, and not a path, several paths, a name or None."""
    return given is not None and not isinstance(given, str | Path) and not is_paths(given)


def is_paths(given: object) -> bool:
    """Whether ``given`` is a list of paths: `pathlib` objects, since strings in a list are texts."""
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(path, Path) for path in given)


def is_stream(given: object) -> bool:
    """Whether ``given`` gives rows each time it is iterated over, and has no length: `datasets.IterableDataset`, and
    objects of the user's own. An iterator, which is used up, is none.
    """
    return (
        hasattr(given, "__iter__")
        and not hasattr(given, "__next__")
        and not hasattr(given, "__len__")
        and not isinstance(given, Mapping)
    )


def is_stdin(data: Data | None) -> bool:
    """Whether ``data`` is standard input, which can be read only once."""
    return not in_memory(data) and str(data) == "-"


DOMAINS = "Only samples of this domain; repeatable."
FIRST_SAMPLES = "Only the first samples of the corpus."
STORE = "The store: a directory, or in object storage (s3://BUCKET/PREFIX, gs://, az://)."
FIRST_VAL_SAMPLES = "Only the first samples of the val set."
LOSS_REDUCTION = "A sample's loss over its own targets."
OVERLONG = "What to do with longer samples; window: one row for each window."


@options
class ProgressOption:
    """The option for the object that receives progress."""

    progress: Progress | None = option(
        None, "Receives the progress of the work, see `ghoststore.progress`.", "Output", python_only=True
    )


@options
class StoreOption:
    """The option for the store."""

    store: str | Path = field(metadata=about(STORE, "Input"))


@options
class DeviceOption:
    """The option for the device to compute on."""

    device: str = option("auto", "cpu, cuda, cuda:N, or auto.", "Advanced")


@options
class EngineOptions:
    """The options for who does the work."""

    engine: Literal["ray"] | None = option(
        None, "ray: the work is done on a Ray cluster, or by Ray on this machine.", "Advanced"
    )
    ray_address: str | None = option(
        None, "Address of the cluster (default: RAY_ADDRESS, or Ray on this machine).", "Advanced", metavar="ADDRESS"
    )

    def check_engine(self) -> None:
        """UsageError for options of Ray without Ray."""
        if self.engine is None and self.ray_address is not None:
            raise UsageError("`ray_address` belongs to `engine=ray`")


@options
class FieldsOption:
    """The options that name the fields of rows."""

    fields: Fields | None = option(None, "How rows are read: names of their fields.", "Input", group=Fields)


@options
class CorpusOptions(FieldsOption):
    """The options for a corpus."""

    data: Data = field(
        metadata=about(
            "Corpus: a file (jsonl, json, csv, parquet, …; gz, zst), folder, quoted pattern, s3://…, or -; repeatable.",
            "Input",
            repeated=True,
            metavar="PATH",
        )
    )


@options
class BehindOption:
    """The option for the corpus that stored rows were made of."""

    data: Data | None = option(
        None,
        "The corpus the rows were made of, for their texts and tokens (default: where your own command read it).",
        "Input",
        repeated=True,
        metavar="PATH",
    )


@options
class LengthOptions:
    """The options for the length of rows."""

    max_length: int | None = option(
        None, "Longest row (default: the model's positions, at most 1024).", "Input", metavar="TOKENS"
    )
    overlong: Overlong = option("truncate", OVERLONG, "Input")


@options
class AdapterOptions:
    """The options for a checkpoint that is an adapter."""

    base: str | Path | None = option(None, BASE, "Model", metavar="MODEL")
    adapter: AdapterUse | None = option(None, ADAPTER, "Model")


CHECKPOINT = "Folder (or s3://…) in transformers' format, of a model or a LoRA adapter; a hub id; or nanoGPT's ckpt.pt."


@options
class ModelOptions(AdapterOptions, DeviceOption):
    """The options for a model that computes gradients, but for its checkpoint."""

    tokenizer: TokenizerSource | None = option(
        None, "Folder (or s3://…) of the tokenizer (default: the checkpoint's).", "Model"
    )
    model_dtype: str = option("float32", "Numbers the model computes with.", "Model", choices=FLOATS)
    attn_implementation: str | None = option(
        None, "Attention kernel: sdpa, eager, … (default: transformers').", "Advanced"
    )
    loss_reduction: Reduction = option("mean", LOSS_REDUCTION, "Scoring")


@options
class CheckpointOptions(ModelOptions):
    """The options for a checkpoint at which gradients are computed."""

    checkpoint: Checkpoint = field(metadata=about(CHECKPOINT, "Model"))


@options
class RankingOptions:
    """The options that say what of a ranking to show."""

    top_k: int = option(10, "Rows with the highest scores.", "Output")
    bottom_k: int = option(0, "Rows with the lowest scores.", "Output")
    text: bool = option(True, "Show texts, where the corpus is unchanged.", "Output")


@options
class LayersOptions:
    """The options that restrict scores to some layers."""

    layers: Sequence[str] = option((), "Score these layers only (parts of plain blocks).", "Scoring")
    exclude_layers: Sequence[str] = option((), "Score without these layers.", "Scoring")


@options
class WhereOption:
    """The option for a condition on rows."""

    where: str | None = option(
        None,
        "Only rows that match this SQL condition on their columns (id, domain, n_tokens, loss, source_row, …, and kept "
        "fields): \"domain = 'math' AND n_tokens > 50\".",
        "Scoring",
        metavar="SQL",
    )


@options
class MetricOption:
    """The option for the metric of scores."""

    metric: Metric | None = option(
        None,
        "The score (default: dot for parts whose gradients were preconditioned or scaled at build, cosine for plain "
        "ones). By dot above 0: the row helps.",
        "Scoring",
    )


@options
class WeightOption:
    """What the steps of a run count with."""

    weight: StepWeight = option(
        "unit",
        "What a score of a training run counts with in a sum over steps. unit: each step is scaled to a mean |score| "
        "of 1; loss-fall: that, times the fall of the training loss at the step; learning-rate: that of the step.",
        "Scoring",
    )


@options
class AsJson:
    """Of the command line alone: options for output as JSON."""

    as_json: bool = option(False, "Print one JSON document instead of a table.", "Output", flag="--json")
    log_json: bool = option(False, "Tell progress, notes and errors on stderr as one JSON object a line.", "Output")


@options
class Printing(AsJson):
    """Of the command line alone: options of commands that show progress."""

    quiet: bool = option(False, "No progress bars; errors and notes only.", "Output", flag="--quiet -q")


@options
class ResultFile:
    """Of the command line alone: the option for the file that a result is written to."""

    out: str | None = option(
        None, "Write results to a new .json, .jsonl, .csv or .parquet file.", "Output", metavar="FILE"
    )
