"""``ghoststore.full_gradients``: exact gradients of a few samples, in full, as safetensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ghoststore.checkpoint.load import (
    DTYPES,
    Checkpoint,
    find_checkpoint,
    load_model,
    load_tokenizer,
    resolve_device,
)
from ghoststore.checkpoint.same_model import checkpoint_section
from ghoststore.corpus import Corpus, Fields, Sample, SampleScan, absolute, open_corpus
from ghoststore.errors import CorpusError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.software import versions_of
from ghoststore.store.base.manifest import Manifest
from indexer.encode.losses import Reduction
from indexer.encode.tokens import Overlong, Row, Tokenizer, TokenSettings, embedding_rows, longest_row, rows_of
from indexer.projection.selection import select_blocks
from query.exact.files import stored_manifest
from query.exact.gradients import ExactGradients
from query.exact.job import FullGradientsReport as FullGradientsReport
from query.exact.job import GradientsJob, RowsRead

Parameters = Literal["all", "projected"]
DEFAULT_SAMPLES = 64
DEFAULT_LAYERS = ("mlp", "attn")
FILE_BYTES = 256 << 20
"""Of a file's gradients, where a single one is not larger."""


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
    text_tokenizer = load_tokenizer(folder)
    with open_corpus(str(data), fields or Fields(), progress) as corpus:  # refused before a model is loaded
        model = load_model(found, dtype=model_dtype, device=device, attn_implementation=attn_implementation)
        settings = TokenSettings(max_length=longest_row(model, max_length), overlong=overlong)
        own = Tokenizer(text_tokenizer, vocabulary=embedding_rows(model), note=progress.note)
        read = _read(corpus, own, settings, max_samples)
        names = None
        if parameters == "projected":
            layers = tuple(proj_layers) or DEFAULT_LAYERS
            chosen = select_blocks(model, layers, exclude_layers, include_embeddings=include_embeddings)
            names = {name for block in chosen.blocks for name in block.parameters}
        exact = ExactGradients(model, names, reduction=loss_reduction)
        manifest: Manifest = {
            "checkpoint": checkpoint_section(found.fingerprint(), model),
            "tokenizer": own.identity,
            "corpus": {"fingerprint": read.fingerprint, "samples": read.samples, "fields": corpus.resolved.to_json()},
            "tokens": asdict(settings),
            "loss": {
                "definition": "next-token cross-entropy of each sample's own targets",
                "reduction": loss_reduction,
            },
            "parameters": [one.to_json() for one in exact.slices],
            "dtype": {"model": model_dtype, "stored": dtype},
            "rows": [_row_entry(row) for row in read.rows],
            "rows_per_file": max(1, FILE_BYTES // (exact.numbers * getattr(torch, dtype).itemsize)),
            "source": _source(found, tokenizer, corpus, str(data)),
            "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "safetensors"),
            "compute": {
                "device": torch.device(device).type,
                "threads": torch.get_num_threads(),
                "attn_implementation": getattr(model.config, "_attn_implementation", None),
            },
        }
        job = GradientsJob(exact, read, manifest, getattr(torch, dtype))
        if dry_run:
            stored = stored_manifest(out, manifest)
            return job.report(out, dry_run=True, resumed=0 if stored is None else len(stored["files"]))
        return job.write(out, progress, begun)


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


def _read(corpus: Corpus, tokenizer: Tokenizer, settings: TokenSettings, max_samples: int) -> RowsRead:
    scanning = SampleScan(corpus.samples(), max_rows=max_samples)
    samples: list[Sample] = []
    for sample in scanning:
        tokenizer.check(sample)
        samples.append(sample)
    scan = scanning.finish()
    if not samples:
        raise CorpusError(f"{corpus.source}: has no rows")
    return RowsRead(list(rows_of(samples, tokenizer, settings)), scan.rows, scan.fingerprint)


def _row_entry(row: Row) -> dict[str, Any]:
    return {
        "sample_id": row.sample.id,
        "source_row": row.sample.source_row,
        "window_start": row.window_start,
        "domain": row.sample.domain,
        "n_tokens": len(row.tokens),
    }


def _source(checkpoint: Checkpoint, tokenizer: str | Path | None, corpus: Corpus, data: str) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.folder.resolve()),
        "tokenizer": None if tokenizer is None else str(Path(tokenizer).resolve()),
        "data": "-" if data == "-" else absolute(corpus.source),
    }
