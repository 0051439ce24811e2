"""Options of ``ghoststore build`` and ``ghoststore tokenize``."""

import re
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

from ghoststore.errors import UsageError
from ghoststore.settings.option import about, check_at_least, option, options
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.shared import (
    CHECKPOINT,
    DOMAINS,
    FIRST_SAMPLES,
    VECTOR_DTYPES,
    Checkpoint,
    CorpusOptions,
    EngineOptions,
    LengthOptions,
    ModelOptions,
    ProgressOption,
    StoreOption,
    TokenizerSource,
    in_memory,
    is_stdin,
    is_stream,
)

AUTO = "auto"
"""The worker that a launcher's variables name."""


def worker_of(text: str) -> tuple[int, int]:
    """(I, N) of "I/N". UsageError unless 1 ≤ I ≤ N."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(
            f"`worker` is I/N, worker I of N from 1 to N, or {AUTO} under torchrun and SLURM; not {text!r:.40}"
        )
    return number, count


@options
class BuildOptions(ProgressOption, EngineOptions, LengthOptions, CorpusOptions, StoreOption, ModelOptions):
    """Options of ``ghoststore build``."""

    checkpoint: Checkpoint | None = option(None, f"{CHECKPOINT} With `like` that of the part.", "Model")
    like: str | None = option(
        None,
        "A part of the store: build other rows like it, with its checkpoint, tokenizer, projection and settings. The "
        "parts can then be ranked as one.",
        "Input",
        metavar="PART",
    )
    name: str | None = option(None, "Name of the part (default: checkpoint and corpus).", "Output")
    projection: ProjectionConfig | None = option(
        None, "How gradients are projected.", "Projection", group=ProjectionConfig
    )
    proj_dtype: str = option(
        "onebit",
        "Numbers in the store: onebit, signs, ranks best for its bytes; int8 is searched several times as fast.",
        "Projection",
        choices=VECTOR_DTYPES,
    )
    stream: bool = option(
        False,
        "Read the corpus once, in order, also one that is larger than the disk: files, or a dataset of the hub "
        "(org/name:split), which is not downloaded.",
        "Input",
    )
    max_samples: int | None = option(None, FIRST_SAMPLES, "Input")
    skip_samples: int = option(0, "Leave out so many samples at the beginning of the corpus.", "Input")
    batch_tokens: int | None = option(
        None, "Padded tokens of a batch (default: 2048 on a CPU, 16384 on CUDA).", "Advanced"
    )
    span_rows: int | None = option(None, "Rows committed together (default: about 8 MiB of vectors).", "Advanced")
    store_text: bool | None = option(
        None,
        "Keep the texts in the store (default: of a corpus that cannot be read again: standard input, data in memory, "
        "a stream of the hub).",
        "Output",
    )
    keep_fields: Sequence[str] = option(
        (),
        "Keep these fields of the samples as columns of the part, for conditions (`ghoststore query --where`).",
        "Output",
        metavar="FIELDS",
    )
    skip_unsupported: bool = option(
        False,
        "Leave out layers of which no exact gradient can be had, by name, in the place of an error.",
        "Projection",
    )
    gradient_checkpointing: bool = option(False, "Less memory for about a third more time.", "Advanced")
    optimizer_state: str | Path | None = option(
        None,
        "A training checkpoint (of `ghoststore train` or transformers' Trainer) whose second moment of Adam scales the "
        "gradients: scores then tell what a step of Adam does.",
        "Projection",
    )
    worker: str | None = option(
        None,
        "Build only the share of worker I of N, beside the others, here or elsewhere; auto: as torchrun or SLURM say.",
        "Advanced",
        metavar="I/N",
    )
    workers: int | None = option(
        None,
        "Build by so many processes of this machine, one a GPU where there are GPUs; or by so many of Ray's actors.",
        "Advanced",
        metavar="N",
    )
    num_gpus: float | None = option(
        None, "GPUs of each of Ray's actors (default: 1 where the cluster has GPUs).", "Advanced"
    )
    devices: Sequence[str] = option(
        (), "Devices of the workers, in turn: 0,1 are GPUs (default: every GPU).", "Advanced", metavar="DEVICES"
    )
    dry_run: bool = option(False, "Print rows, tokens, D, bytes and memory; build nothing.", "Output")

    def __post_init__(self) -> None:
        check_at_least(1, batch_tokens=self.batch_tokens, max_samples=self.max_samples, workers=self.workers)
        check_at_least(0, skip_samples=self.skip_samples)
        self.check_engine()
        if self.engine is None and self.num_gpus is not None:
            raise UsageError("`num_gpus` belongs to `engine=ray`")
        if self.engine is not None and (self.worker is not None or self.devices):
            raise UsageError("`engine=ray` places workers itself: leave out `worker` and `devices`")
        if self.worker is not None and self.worker != AUTO:
            worker_of(self.worker)
        if self.worker is not None and self.workers is not None:
            raise UsageError("`worker` is one of several that are started elsewhere, `workers` starts them: give one")
        if self.devices and self.workers is None:
            raise UsageError("`devices` are those of `workers`: give that, too, or `device` for a build by one process")
        if self.streams:
            self._check_stream()
        elif hasattr(self.data, "__next__"):
            raise UsageError(
                f"data of the type {type(self.data).__name__} can be read only once, and a build that was cut off "
                "begins to read again: give what gives rows each time it is iterated over, such as "
                "datasets.IterableDataset.from_generator(function); or a list of the rows"
            )
        if self.several and any(map(in_memory, (self.data, self.checkpoint, self.tokenizer))):
            raise UsageError(
                "several workers each open the checkpoint, the tokenizer and the corpus: save what is in memory, and "
                "give paths"
            )
        if self.several and self.stdin:
            raise UsageError("standard input can be read only once, not by several workers: give a file")
        if self.dry_run and self.stdin:
            raise UsageError("`dry_run` cannot read standard input: the corpus would be used up; give a file")

    def _check_stream(self) -> None:
        """UsageError for what a corpus that is read once, in order, does not allow."""
        if self.several:
            raise UsageError(
                "a stream is read once, in order, by one process: leave out `worker`, `workers` and `engine`; or build "
                "a part of each of its shards, all but one `like` the first, which are ranked as one"
            )
        if self.stdin:
            raise UsageError(
                "`stream` goes on where it was cut off, and standard input cannot be read again: leave `stream` out "
                "(standard input is copied to a temporary file), or give files"
            )
        if self.dry_run:
            raise UsageError(
                "`dry_run` counts rows and tokens, and a stream is read once: give its first rows, in a file, without "
                "`stream`"
            )
        if self.overlong == "window":
            raise UsageError(
                "`overlong=window` makes several rows of a sample, and of a stream each sample is one row: give "
                "`overlong=truncate` or `overlong=skip`"
            )

    @property
    def streams(self) -> bool:
        """Whether the corpus is read once, in order."""
        return self.stream or is_stream(self.data)

    @property
    def model(self) -> Checkpoint:
        """The checkpoint: given, or once `like` is resolved."""
        assert self.checkpoint is not None
        return self.checkpoint

    @property
    def several(self) -> bool:
        """Whether several processes build."""
        return any(given is not None for given in (self.worker, self.workers, self.engine))

    @property
    def stdin(self) -> bool:
        """Whether the corpus comes from standard input, which can be read only once."""
        return is_stdin(self.data)


@options
class TokenizeOptions(ProgressOption, EngineOptions, CorpusOptions):
    """Options of ``ghoststore tokenize``."""

    tokenizer: TokenizerSource = field(metadata=about("Folder with a saved tokenizer, or a hub id.", "Model"))
    out: str | Path = field(metadata=about("Folder of the shards: a new one, or one to continue.", "Output"))
    domains: Sequence[str] = option((), DOMAINS, "Input", flag="--domain", repeated=True)
    max_samples: int | None = option(None, "Only the first samples (of those domains).", "Input")
    shard_samples: int | None = option(None, "Samples committed together (default: 4096).", "Advanced")
    workers: int | None = option(
        None,
        "Processes (default: one for every 16 MiB of text, at most one a core). The result is the same.",
        "Advanced",
        metavar="N",
    )

    def __post_init__(self) -> None:
        self.check_engine()
        if self.engine is not None and (in_memory(self.data) or is_stdin(self.data)):
            raise UsageError("`engine=ray`: its actors each open the corpus: give a file")
