"""Options that several commands share, with the same names, defaults and help."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ghoststore.progress import Progress
from ghoststore.settings.option import about, option

if TYPE_CHECKING:
    from ghoststore.corpus import Fields

Metric = Literal["cosine", "dot"]
Overlong = Literal["truncate", "window", "skip", "error"]
Reduction = Literal["mean", "sum"]
FLOATS = ("float32", "bfloat16", "float16")


DOMAINS = "Only samples of this domain; repeatable."
FIRST_SAMPLES = "Only the first samples of the corpus."
OVERLONG = "What becomes of longer samples; window: one row a window."


@dataclass(frozen=True, kw_only=True)
class ProgressOption:
    progress: Progress | None = option(
        None, "Is told of the work, see `ghoststore.progress`.", "Output", python_only=True
    )


@dataclass(frozen=True, kw_only=True)
class StoreOption:
    store: str | Path = field(metadata=about("The store: a directory.", "Input", metavar="PATH"))


@dataclass(frozen=True, kw_only=True)
class DeviceOption:
    device: str = option("auto", "cpu, cuda, cuda:N, or auto.", "Advanced")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldNames:
    """Names of the fields of a row; None is found on the first row by its conventional name."""

    text: str | None = option(
        None,
        "Field with the text (default: 'text', else prompt and completion, else messages).",
        "Input",
        flag="--text-field",
        metavar="NAME",
    )
    prompt: str | None = option(
        None, "Field with the prompt, which is no target.", "Input", flag="--prompt-field", metavar="NAME"
    )
    completion: str | None = option(
        None,
        "Field with the completion: the only targets of a row with a prompt.",
        "Input",
        flag="--completion-field",
        metavar="NAME",
    )
    messages: str | None = option(
        None,
        "Field with chat messages, which go through the tokenizer's chat template.",
        "Input",
        flag="--messages-field",
        metavar="NAME",
    )
    id: str | None = option(
        None,
        "Field with the id (default: 'id' where rows have it, else the row number).",
        "Input",
        flag="--id-field",
        metavar="NAME",
    )
    domain: str | None = option(
        None,
        "Field with the domain (default: 'domain' where rows have it).",
        "Input",
        flag="--domain-field",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class FieldsOption:
    fields: "Fields | None" = option(
        None, "How rows are read: names of their fields.", "Input", group=FieldNames, public="Fields"
    )


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(FieldsOption):
    data: str | Path = field(
        metadata=about(
            "Corpus: jsonl, gz, zst, parquet, csv, txt, token shards, a folder, or -.", "Input", metavar="PATH"
        )
    )


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    max_length: int | None = option(
        None, "Longest row (default: the model's positions, at most 1024).", "Input", metavar="TOKENS"
    )
    overlong: Overlong = option("truncate", OVERLONG, "Input")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(DeviceOption):
    """A checkpoint that gradients are taken at."""

    checkpoint: str | Path = field(
        metadata=about("Folder in transformers' format, or a hub id.", "Model", metavar="PATH")
    )
    tokenizer: str | Path | None = option(
        None, "Folder of the tokenizer (default: the checkpoint's).", "Model", metavar="PATH"
    )
    model_dtype: str = option("float32", "Numbers the model computes with.", "Model", choices=FLOATS)
    attn_implementation: str | None = option(
        None, "Attention kernel: sdpa, eager, … (default: transformers').", "Advanced", metavar="NAME"
    )
    loss_reduction: Reduction = option("mean", "A sample's loss over its own targets.", "Scoring")


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    top_k: int = option(10, "Rows with the highest scores.", "Output")
    bottom_k: int = option(0, "Rows with the lowest scores.", "Output")
    text: bool = option(True, "Show texts, where the corpus is unchanged.", "Output")


@dataclass(frozen=True, kw_only=True)
class LayersOptions:
    layers: Sequence[str] = option((), "Score these layers only (parts of plain blocks).", "Scoring")
    exclude_layers: Sequence[str] = option((), "Score without these layers.", "Scoring")


@dataclass(frozen=True, kw_only=True)
class MetricOption:
    metric: Metric = option("cosine", "The score.", "Scoring")


@dataclass(frozen=True, kw_only=True)
class Printing:
    """Of the command line alone: how what a function returns is printed."""

    as_json: bool = option(False, "Print one JSON document instead of a table.", "Output", flag="--json")
    quiet: bool = option(False, "No progress bars; errors and notes only.", "Output", flag="--quiet -q")


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """Of the command line alone: where what a function returns is written."""

    out: str | None = option(
        None, "Write results to a new .json, .jsonl, .csv or .parquet file.", "Output", metavar="FILE"
    )
