"""Options of the commands that show or maintain a store: info, verify, repair, index, scores and others."""

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

from ghoststore.errors import UsageError
from ghoststore.settings.option import about, option, options
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import (
    DOMAINS,
    BehindOption,
    MetricOption,
    ProgressOption,
    StoreOption,
    WeightOption,
    WhereOption,
)

Dimension = int | Literal["none", "auto"]
Value = Literal["cumulative", "mean", "sum", "last"]
Unit = Literal["sample", "window"]


@options
class InfoOptions:
    """Options of ``ghoststore info``."""

    store: str | Path = field(
        kw_only=False, metadata=about("The store to look at: a directory, or in object storage.", "Input")
    )
    part: str | None = option(None, "Only this part.", "Input")
    run: str | None = option(None, "Only this training run.", "Input")


@options
class VerifyOptions(ProgressOption, InfoOptions):
    """Options of ``ghoststore verify``."""


@options
class RepairOptions(ProgressOption, RebuiltOptions, InfoOptions):
    """Options of ``ghoststore repair``."""

    drop_damaged: bool = option(
        False, "Take damaged steps out of a training run, so that the others open: they are lost.", "Output"
    )


@options
class GcOptions(ProgressOption, InfoOptions):
    """Options of ``ghoststore gc``."""

    caches: bool = option(False, "Also remove caches of a part that rows committed later made stale.", "Output")
    dry_run: bool = option(False, "List what would be removed; remove nothing.", "Output")


@options
class OneOptions(InfoOptions):
    """The options that name one part or one training run."""

    store: str | Path = field(
        kw_only=False, metadata=about("The store that has it: a directory, or in object storage.", "Input")
    )
    part: str | None = option(None, "The part.", "Input")
    run: str | None = option(None, "Or the training run.", "Input")

    def __post_init__(self) -> None:
        if (self.part is None) == (self.run is None):
            raise UsageError("give `part` or `run`: one of them, and not both")

    @property
    def name(self) -> str:
        """The name of the part or of the run."""
        return str(self.run if self.part is None else self.part)


@options
class RemoveOptions(OneOptions):
    """Options of ``ghoststore rm``."""


@options
class RenameOptions(OneOptions):
    """Options of ``ghoststore mv``."""

    to_name: str = field(metadata=about("Its new name.", "Output"))


@options
class CopyOptions(ProgressOption, OneOptions):
    """Options of ``ghoststore cp``."""

    to_store: str | Path | None = option(None, "The store to copy it to (default: the same one).", "Output")
    to_name: str | None = option(None, "Name of the copy (default: the same name).", "Output")


@options
class ExportOptions(ProgressOption, BehindOption, WhereOption, StoreOption):
    """Options of ``ghoststore export``."""

    part: str | None = option(None, "Part to export (default: the only one).", "Input")
    run: str | None = option(None, "Or the training run, whose gradients are exported.", "Input")
    out: str | Path = field(
        metadata=about("A new .safetensors, .npy or .parquet file; datasets: a new folder.", "Output", metavar="PATH")
    )
    format: Literal["vectors", "embedding-atlas", "datasets"] = option(
        "vectors",
        "embedding-atlas: .parquet of texts on a map, with each row's neighbors; datasets: save_to_disk folder with "
        "texts and vectors.",
        "Output",
    )
    dtype: Literal["float32", "stored"] = option(
        "float32", "Numbers of the vectors; stored: as the store has them, with their scales.", "Output"
    )
    unusable: bool = option(False, "Also rows without a vector: zeros, with their status.", "Output")
    max_rows: int | None = option(None, "embedding-atlas: a random N of the rows.", "Output", metavar="N")
    neighbors: int = option(15, "embedding-atlas: nearest rows of each row, by cosine.", "Output", metavar="K")
    seed: int = option(0, "embedding-atlas: seed of the map and of the random rows.", "Output")

    def __post_init__(self) -> None:
        of_atlas = {"max_rows": self.max_rows is not None, "neighbors": self.neighbors != 15, "seed": self.seed != 0}
        for name, given in of_atlas.items():
            if given and self.format != "embedding-atlas":
                raise UsageError(f"`{name}` belongs to `format=embedding-atlas`")
        if self.format == "vectors" and self.data is not None:
            raise UsageError("`data` is for texts, which `format=embedding-atlas` and `format=datasets` write")
        if self.format != "vectors" and self.run is not None:
            raise UsageError(f"`format={self.format}` takes a part; of a run, `out` a .parquet file has all but texts")
        if self.format == "embedding-atlas" and (self.unusable or self.dtype != "float32"):
            raise UsageError(
                "`format=embedding-atlas` writes no vectors, so neither `dtype` nor `unusable` means anything to it"
            )
        if self.neighbors < 1:
            raise UsageError(f"`neighbors` must be at least 1, not {self.neighbors}")
        if self.max_rows is not None and self.max_rows < 1:
            raise UsageError(f"`max_rows` must be at least 1, not {self.max_rows}")


@options
class Yes:
    """Of the command line alone: the option that answers a question with yes."""

    yes: bool = option(False, "Do not ask.", "Output", flag="--yes -y")


@options
class IndexOptions(ProgressOption, MetricOption, StoreOption):
    """Options of ``ghoststore index``."""

    part: str | Sequence[str] | None = option(
        None,
        "Part to index (default: the only one); repeatable: those that are ranked as one, as `query` takes them.",
        "Input",
        repeated=True,
    )
    factory: str | None = option(
        None, "FAISS's factory string, such as IVF4096,SQ8 (default: by rows and dimension).", "Model", metavar="STRING"
    )
    name: str | None = option(None, "Name of the index (default: metric and factory string).", "Output")
    dimension: Dimension = option(
        "auto",
        "Sketch vectors to D numbers for FAISS; auto: 1,024 for vectors of more than 2,048.",
        "Projection",
        metavar="D|none|auto",
    )
    # Recall at 10 of the worse kind of sample query. It is a little above 0.95, so that other queries reach 0.95.
    target_recall: float = option(
        0.97, "Tune the search until it finds this share of the exact ten best of sample queries.", "Scoring"
    )
    device: str = option("cpu", "cpu, cuda or cuda:N (with a faiss for GPUs).", "Advanced")
    rebuild: bool = option(False, "Build again even if a current index exists.", "Output")


@options
class ManageIndexes:
    """Of the command line alone: options for other work than building an index."""

    list_them: bool = option(False, "Show the existing indexes, build nothing.", "Output", flag="--list")
    remove: str | None = option(None, "Delete an index, build nothing.", "Output")


@options
class RunOption(StoreOption):
    """The option for a training run."""

    run: str | None = option(None, "Training run (default: the only one).", "Input")


@options
class ScoresOptions(ProgressOption, WeightOption, WhereOption, BehindOption, RunOption):
    """Options of ``ghoststore scores``."""

    top_k: int | None = option(None, "Samples with the highest values (default: 10).", "Output")
    bottom_k: int | None = option(None, "Samples with the lowest values (default: 0).", "Output")
    sample: str | None = option(None, "Instead: every time that this sample was trained on.", "Output", metavar="ID")
    by: Literal["domain"] | None = option(None, "Instead: a table of domains.", "Output")
    steps: str | slice | None = option(
        None,
        "Only steps from A up to, not including, B; from 0, either may be left out, and a negative one counts from "
        "the end of what is committed.",
        "Scoring",
        metavar="A:B",
    )
    value: Value = option(
        "cumulative",
        "cumulative: Σ `weight` × score. mean: that ÷ the times it was scored. sum: Σ score. last: the newest score.",
        "Scoring",
    )
    group: str | None = option(None, "Scores against this val group (`ghoststore train --val-groups`).", "Scoring")
    layers: Sequence[str] = option(
        (), "Scores of these layers alone (`ghoststore train --per-layer`): module paths or globs.", "Scoring"
    )
    exclude_layers: Sequence[str] = option((), "Scores without these layers.", "Scoring")
    unit: Unit = option(
        "sample", "Rank samples, the windows of a long one summed, or each window by itself.", "Scoring"
    )
    min_times: int | None = option(None, "Leave out samples that were scored less often.", "Scoring", metavar="N")
    candidates: bool = option(
        False, "Of a run that chose: count candidates that were not trained on, too, all alike.", "Scoring"
    )
    domains: Sequence[str] = option((), DOMAINS, "Input", flag="--domain", repeated=True)
    text: bool = option(True, "Look up texts in the corpus, if unchanged.", "Output")
    plot: str | Path | None = option(
        None, "Draw scores by domain over training to a new .png, .pdf or .svg file.", "Output", metavar="FILE"
    )


@options
class WatchOptions(BehindOption, RunOption):
    """Options of ``ghoststore watch``."""

    run: str | None = option(None, "Training run (default: the one that is written, or the newest).", "Input")
    interval: float = option(1.0, "Seconds between looks at the store.", "Advanced")
    once: bool = option(False, "Print one frame and end.", "Output")
    text: bool = option(True, "Show the texts of the best and worst samples.", "Output")
