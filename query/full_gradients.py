"""``ghoststore.full_gradients``: exact gradients of a few samples, in full, as safetensors.

Legend: B rows of a file, P numbers of a gradient.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ghoststore.checkpoint import (
    DTYPES,
    Checkpoint,
    find_checkpoint,
    fingerprint_tokenizer,
    load_model,
    load_tokenizer,
    resolve_device,
)
from ghoststore.corpus import Corpus, Fields, Sample, absolute, open_corpus, scan_samples
from ghoststore.errors import CorpusError, StorageError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.software import versions_of
from ghoststore.store import Status
from ghoststore.store.manifest import Manifest
from indexer.losses import Reduction
from indexer.rows import Overlong, Row, Tokenizer, TokenSettings, longest_row, rows_of
from indexer.selection import select_blocks
from query.exact_gradients import ExactGradients
from query.gradient_files import GradientFiles, file_name, stored_manifest

Parameters = Literal["all", "projected"]
DEFAULT_SAMPLES = 64
DEFAULT_LAYERS = ("mlp", "attn")
FILE_BYTES = 256 << 20
"""Of a file's gradients, where a single one is not larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullGradientsReport:
    """What was written, or, after a dry run, would be."""

    out: str
    samples: int
    rows: int
    tokens: int
    numbers: int
    """Numbers of one gradient."""
    parameters: int
    """Parameters (tensors) they belong to."""
    dtype: str
    files: int
    resumed_files: int
    """Files that were there before this call."""
    bytes_on_disk: int
    """Of all gradients."""
    memory_bytes: int
    """Beside the model and its activations: one file's gradients twice, and one gradient in the model's dtype."""
    dry_run: bool
    statuses: dict[str, int] = field(default_factory=dict)
    """Rows by status. A row that cannot be used has a gradient of zeros."""
    seconds: float = 0.0
    manifest: Manifest = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore full-gradients --json`` prints."""
        return asdict(self)


def full_gradients(
    *,
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    parameters: Parameters = "all",
    proj_layers: Sequence[str] = (),
    exclude_layers: Sequence[str] = (),
    include_embeddings: bool = False,
    tokenizer: str | Path | None = None,
    fields: Fields | None = None,
    max_samples: int = DEFAULT_SAMPLES,
    max_length: int | None = None,
    overlong: Overlong = "truncate",
    loss_reduction: Reduction = "mean",
    dtype: str = "float32",
    device: str = "auto",
    model_dtype: str = "float32",
    attn_implementation: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> FullGradientsReport:
    """The gradient of each of the first ``max_samples`` samples' own loss, not projected, into the folder ``out``.

    Each row goes through the model alone, by plain autograd. ``parameters``: ``all``, or ``projected``, those of the
    layers that ``proj_layers`` (default: mlp, attn), ``exclude_layers`` and ``include_embeddings`` select, as
    ``ghoststore build`` does; tied ones count once. ``dtype`` is that of the written numbers. Files hold about 256 MiB
    of gradients; ``manifest.json`` says which row and which parameter stands where. The same call goes on where a
    killed one ended, to the same bytes, and checks what is there.

    Raises CheckpointError, CorpusError, LayerError or UsageError for inputs that cannot be used or need more memory
    than the machine has, MismatchError if ``out`` holds the gradients of another request, CorruptError if one of its
    files is damaged, StorageError where the disk is too small or refuses.
    """
    progress, begun, out = progress or Silent(), time.perf_counter(), Path(out)
    _refuse(parameters, proj_layers, exclude_layers, include_embeddings, max_samples, dtype)
    if dry_run and str(data) == "-":
        raise UsageError("--dry-run cannot read standard input: the corpus would be used up; give a file")
    found, device = find_checkpoint(checkpoint), resolve_device(device)
    folder = Path(tokenizer) if tokenizer is not None else found.folder
    own = Tokenizer(load_tokenizer(folder))
    with open_corpus(str(data), fields or Fields()) as corpus:
        _ = corpus.resolved  # a corpus that cannot be read is refused before a model is loaded
        model = load_model(found, dtype=model_dtype, device=device, attn_implementation=attn_implementation)
        settings = TokenSettings(max_length=longest_row(model, max_length), overlong=overlong)
        read = _read(corpus, own, settings, max_samples)
        names = None
        if parameters == "projected":
            layers = tuple(proj_layers) or DEFAULT_LAYERS
            chosen = select_blocks(model, layers, exclude_layers, include_embeddings=include_embeddings)
            names = {name for block in chosen.blocks for name in block.parameters}
        exact = ExactGradients(model, names, reduction=loss_reduction)
        manifest: Manifest = {
            "checkpoint": {"fingerprint": found.fingerprint(), "architecture": type(model).__name__},
            "tokenizer": {"fingerprint": fingerprint_tokenizer(own.tokenizer)},
            "corpus": {"fingerprint": read.fingerprint, "samples": read.samples, "fields": corpus.resolved.to_json()},
            "tokens": asdict(settings),
            "loss": {"definition": "next-token cross-entropy of each sample's own targets",
                     "reduction": loss_reduction},
            "parameters": [one.to_json() for one in exact.slices],
            "dtype": {"model": model_dtype, "stored": dtype},
            "rows": [_row_entry(row) for row in read.rows],
            "rows_per_file": max(1, FILE_BYTES // (exact.numbers * getattr(torch, dtype).itemsize)),
            "source": _source(found, tokenizer, corpus, str(data)),
            "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "safetensors"),
            "compute": {"device": torch.device(device).type, "threads": torch.get_num_threads(),
                        "attn_implementation": getattr(model.config, "_attn_implementation", None)},
        }  # fmt: skip
        job = _Job(exact, read, manifest, getattr(torch, dtype))
        if dry_run:
            stored = stored_manifest(out, manifest)
            return job.report(out, dry_run=True, resumed=0 if stored is None else len(stored["files"]))
        return job.write(out, progress, begun)


@dataclass(frozen=True, slots=True)
class _Read:
    """The rows in question."""

    rows: list[Row]
    samples: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Job:
    """A request, resolved: nothing is left to decide."""

    exact: ExactGradients
    read: _Read
    manifest: Manifest
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of one stored gradient."""
        return self.exact.numbers * self.dtype.itemsize

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first row, one past the last) of each file."""
        rows, size = len(self.read.rows), self.manifest["rows_per_file"]
        return [(start, min(start + size, rows)) for start in range(0, rows, size)]

    def report(self, out: Path, *, dry_run: bool, resumed: int, seconds: float = 0.0) -> FullGradientsReport:
        """What is known without the files."""
        widest = max(stop - start for start, stop in self.blocks)
        one = self.exact.numbers * next(iter(self.exact.parameters.values())).dtype.itemsize
        return FullGradientsReport(
            out=str(out), samples=self.read.samples, rows=len(self.read.rows),
            tokens=sum(len(row.tokens) for row in self.read.rows), numbers=self.exact.numbers,
            parameters=len(self.exact.parameters), dtype=self.manifest["dtype"]["stored"], files=len(self.blocks),
            resumed_files=resumed, bytes_on_disk=len(self.read.rows) * self.row_bytes,
            memory_bytes=2 * widest * self.row_bytes + one, dry_run=dry_run,
            statuses=dict(Counter(row.status.name.lower() for row in self.read.rows)), seconds=seconds,
            manifest=self.manifest,
        )  # fmt: skip

    def write(self, out: Path, progress: Progress, begun: float) -> FullGradientsReport:
        """Every file that is missing."""
        self._refuse_too_large(self.report(out, dry_run=False, resumed=0).memory_bytes)
        size = self.manifest["rows_per_file"]
        with GradientFiles.writing(out, self.manifest) as files:
            there = set(files.there)
            missing = [(start, stop) for start, stop in self.blocks if file_name(start, size) not in there]
            self._refuse_full_disk(out, sum(stop - start for start, stop in missing))
            rows = len(self.read.rows)
            todo = sum(stop - start for start, stop in missing)
            with closing(progress.task("exact gradients", rows, done=rows - todo)) as task:
                for start, stop in missing:
                    some = self.read.rows[start:stop]
                    files.write((start, stop), *self._gradients(some))
                    task.advance(stop - start, sum(len(row.tokens) for row in some))
            statuses = Counter(status for entry in files.manifest["files"].values() for status in entry["statuses"])
            report = self.report(out, dry_run=False, resumed=len(there), seconds=time.perf_counter() - begun)
            return replace(report, statuses=dict(statuses), manifest=files.manifest)

    def _gradients(self, rows: Sequence[Row]) -> tuple[Tensor, list[float | None], list[str]]:
        """(B, P) in the stored dtype, zeros for a row that cannot be used; losses (None without one) and statuses."""
        found = torch.zeros(len(rows), self.exact.numbers, dtype=self.dtype)
        losses: list[float | None] = [None] * len(rows)
        fates = [row.status for row in rows]
        for place, row in enumerate(rows):
            if not row.status.usable:
                continue
            gradient = self.exact(row)
            if not gradient.finite:
                fates[place] = Status.NOT_FINITE
                continue
            losses[place] = gradient.loss
            for one in self.exact.slices:
                found[place, one.start : one.stop] = gradient.parts[one.name].flatten()
            if not bool(torch.isfinite(found[place]).all()):
                fates[place] = Status.OUT_OF_RANGE
                found[place] = 0
        return found, losses, [fate.name.lower() for fate in fates]

    def _refuse_too_large(self, needed: int) -> None:
        there = physical_memory()
        if there is not None and needed > there:
            raise UsageError(
                f"gradients of {self.exact.numbers:,} numbers need {needed:,} bytes of memory beside the model; this "
                f"machine has {there:,}. Give --parameters projected with fewer --proj-layers, or --dtype bfloat16"
            )

    def _refuse_full_disk(self, out: Path, rows: int) -> None:
        needed, free = rows * self.row_bytes, shutil.disk_usage(out).free
        if needed > free:
            raise StorageError(
                f"cannot write {out}: {rows} gradients take {needed:,} bytes, {free:,} are free there; nothing was "
                "written. Give --out another disk, a smaller --max-samples, or --parameters projected"
            )


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _refuse(
    parameters: str, proj_layers: Sequence[str], exclude: Sequence[str], embeddings: bool, max_samples: int, dtype: str
) -> None:
    if parameters not in get_args(Parameters):
        raise UsageError(f"--parameters {parameters!r} is unknown; known: {', '.join(get_args(Parameters))}")
    given = {"--proj-layers": proj_layers, "--exclude-layers": exclude, "--include-embeddings": embeddings}
    for option, value in given.items():
        if parameters == "all" and value:
            raise UsageError(f"{option} belongs to --parameters projected")
    if max_samples < 1:
        raise UsageError(f"--max-samples must be at least 1, not {max_samples}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")


def _read(corpus: Corpus, tokenizer: Tokenizer, settings: TokenSettings, max_samples: int) -> _Read:
    samples: list[Sample] = []

    def see(sample: Sample) -> None:
        tokenizer.check(sample)
        samples.append(sample)

    scan = scan_samples(corpus.samples(), max_rows=max_samples, on_sample=see)
    if not samples:
        raise CorpusError(f"{corpus.source}: has no rows")
    return _Read(list(rows_of(samples, tokenizer, settings)), scan.rows, scan.fingerprint)


def _row_entry(row: Row) -> dict[str, Any]:
    return {
        "sample_id": row.sample.id,
        "source_row": row.sample.source_row,
        "window_start": row.window_start,
        "domain": row.sample.domain,
        "n_tokens": len(row.tokens),
    }


def _source(found: Checkpoint, tokenizer: str | Path | None, corpus: Corpus, data: str) -> dict[str, Any]:
    return {
        "checkpoint": str(found.folder.resolve()),
        "tokenizer": None if tokenizer is None else str(Path(tokenizer).resolve()),
        "data": "-" if data == "-" else absolute(corpus.source),
    }
