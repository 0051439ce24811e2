"""``ghoststore.full_gradients``: the exact, unprojected gradients of a few samples, as safetensors files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ghoststore.checkpoint.adapter import has_adapter, is_adapter_path
from ghoststore.checkpoint.load import (
    AnyCheckpoint,
    find_checkpoint,
    find_tokenizer,
    load_model,
    load_tokenizer,
    recorded_tokenizer,
    resolve_device,
)
from ghoststore.checkpoint.same_model import checkpoint_section
from ghoststore.corpus import Corpus, Fields, Sample, SampleScan, open_corpus
from ghoststore.errors import CorpusError, UsageError
from ghoststore.progress import Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.measure import FullGradientsOptions
from ghoststore.settings.shared import TokenizerSource, is_stdin
from ghoststore.software import versions_of
from ghoststore.store.base.manifest import Manifest
from indexer.encode.pairs import loss_definition, tokenizer_for
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, longest_row, rows_of
from indexer.projection.selection import default_layers, select_blocks
from query.exact.files import date_in, stored_manifest
from query.exact.gradients import ExactGradients
from query.exact.job import FullGradientsReport as FullGradientsReport
from query.exact.job import GradientsJob, RowsRead

FILE_BYTES = 256 << 20
"""Bytes of gradients in a file, unless a single gradient is larger."""


@takes(FullGradientsOptions)
def full_gradients(options: FullGradientsOptions) -> FullGradientsReport:
    """Write the gradient of the own loss of each of the first ``max_samples`` samples, unprojected, to the folder
    ``out``.

    Each row goes through the model alone, and plain autograd gives its gradient. ``parameters`` is ``all`` (of an
    adapter: its own), or ``projected``: the parameters of the layers that ``proj_layers`` (default: mlp, attn),
    ``exclude_layers`` and ``include_embeddings`` select, as in ``ghoststore build``. Tied parameters count once.
    ``dtype`` is that of the numbers in the files. A file holds about 256 MiB of gradients; ``manifest.json`` says where
    each row and each parameter is. After an interruption, the same call checks the files that exist and writes the
    missing ones, with the same bytes.

    Raises CheckpointError, CorpusError, LayerError or UsageError for inputs that cannot be used or need more memory
    than the machine has, MismatchError if ``out`` holds the gradients of another request, CorruptError if one of its
    files is damaged, StorageError if the disk is too small or refuses.
    """
    progress, started, out = options.progress or Silent(), time.perf_counter(), Path(options.out)
    _refuse(
        options.parameters, options.proj_layers, options.exclude_layers, options.include_embeddings, options.max_samples
    )
    if options.dry_run and is_stdin(options.data):
        raise UsageError("`dry_run` cannot read standard input: the corpus would be used up; give a file")
    checkpoint = find_checkpoint(options.checkpoint, base=options.base, adapter=options.adapter, progress=progress)
    device = resolve_device(options.device, options.checkpoint)
    given = options.tokenizer
    folder = checkpoint.tokenizer_folder if given is None else find_tokenizer(given, progress)
    text_tokenizer = load_tokenizer(folder)
    with open_corpus(options.data, options.fields or Fields(), progress) as corpus:  # refused before a model is loaded
        model = load_model(
            checkpoint,
            dtype=options.model_dtype,
            device=device,
            attn_implementation=options.attn_implementation,
            encoder_decoder=True,
            progress=progress,
        )
        tokenizer = tokenizer_for(
            model,
            text_tokenizer,
            note=progress.note,
            takes_ids=given is not None,
            template_date=corpus.template_date or date_in(out),
        )
        settings = TokenSettings(
            max_length=longest_row(model, options.max_length),
            overlong=options.overlong,
            template_date=tokenizer.template_date,
        )
        corpus.cut_stream(settings.max_length)
        read = _read(corpus, tokenizer, settings, options.max_samples)
        names = _parameters(options, model)
        exact = ExactGradients(model, names, reduction=options.loss_reduction)
        manifest: Manifest = {
            "checkpoint": checkpoint_section(checkpoint.identity(), model),
            "tokenizer": tokenizer.identity,
            "corpus": {"fingerprint": read.fingerprint, "samples": read.samples, "fields": corpus.resolved.to_json()},
            "tokens": asdict(settings),
            "loss": {"definition": loss_definition(model), "reduction": options.loss_reduction},
            "parameters": [parameter_slice.to_json() for parameter_slice in exact.slices],
            "dtype": {"model": options.model_dtype, "stored": options.dtype},
            "rows": [_row_entry(row) for row in read.rows],
            "rows_per_file": max(1, FILE_BYTES // (exact.numbers * getattr(torch, options.dtype).itemsize)),
            "source": _source(checkpoint, options.tokenizer, corpus),
            "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "safetensors"),
            "compute": {
                "device": torch.device(device).type,
                "threads": torch.get_num_threads(),
                "attn_implementation": getattr(model.config, "_attn_implementation", None),
            },
        }
        job = GradientsJob(exact, read, manifest, getattr(torch, options.dtype))
        if options.dry_run:
            stored = stored_manifest(out, manifest)
            return job.report(out, dry_run=True, resumed=0 if stored is None else len(stored["files"]))
        return job.write(out, progress, started)


def _parameters(options: FullGradientsOptions, model: Any) -> set[str] | None:
    """The names of the parameters whose gradients are written; None for all."""
    if options.parameters == "projected":
        layers = tuple(options.proj_layers) or default_layers(model)
        chosen = select_blocks(model, layers, options.exclude_layers, include_embeddings=options.include_embeddings)
        return {name for block in chosen.blocks for name in block.parameters}
    if has_adapter(model):
        return {name for name, _ in model.named_parameters() if is_adapter_path(name.split("."))}
    return None


def _refuse(
    parameters: str, proj_layers: Sequence[str], exclude: Sequence[str], embeddings: bool, max_samples: int
) -> None:
    projection_options = {"proj_layers": proj_layers, "exclude_layers": exclude, "include_embeddings": embeddings}
    for name, value in projection_options.items():
        if parameters == "all" and value:
            raise UsageError(f"`{name}` belongs to `parameters=projected`")
    if max_samples < 1:
        raise UsageError(f"`max_samples` must be at least 1, not {max_samples}")


def _read(corpus: Corpus, tokenizer: Tokenizer, settings: TokenSettings, max_samples: int) -> RowsRead:
    sample_scan = SampleScan(corpus.samples(), max_rows=max_samples)
    samples: list[Sample] = []
    for sample in sample_scan:
        tokenizer.check(sample)
        samples.append(sample)
    scan = sample_scan.finish()
    if not samples:
        raise CorpusError(f"{corpus.source}: has no rows")
    return RowsRead(list(rows_of(samples, tokenizer, settings)), scan.rows, scan.fingerprint)


def _row_entry(row: Row) -> dict[str, Any]:
    return {
        "sample_id": row.sample.id,
        "source_row": row.sample.source_row,
        "window_start": row.window_start,
        "domain": row.sample.domain,
        "n_tokens": row.n_tokens,
    }


def _source(checkpoint: AnyCheckpoint, tokenizer: TokenizerSource | None, corpus: Corpus) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.recorded,
        "tokenizer": recorded_tokenizer(tokenizer),
        "data": corpus.recorded,
    }
