"""``ghoststore.build``: a checkpoint and a corpus to a part of a store.

Three things run at once: a thread reads and tokenizes the next span, the main thread computes, a thread
writes and commits the last span.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.checkpoint.load import (
    find_checkpoint,
    load_model,
    load_tokenizer,
    resolve_device,
)
from ghoststore.checkpoint.same_model import checkpoint_section, refuse_incomplete
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.corpus import Corpus, Fields, absolute, open_corpus
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.keywords import takes
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.software import versions_of
from ghoststore.store import Manifest, Part, PartLayout, Store
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.base.names import check_name, safe_name
from ghoststore.store.info import describe
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.part.sealing import seal_vectors
from ghoststore.store.spans.reader import CRC_BYTES
from ghoststore.store.spans.writer import BackgroundWriter, SpanData, writing
from indexer.build.calibrate import SampleDraw, calibrate, learning_bytes
from indexer.build.corpus_plan import CorpusPlan, other_places, plan_corpus, rows_of_spans
from indexer.build.model_check import ROWS_LOOKED_AT, ModelCheck
from indexer.encode.encoder import RowEncoder, encode_rows
from indexer.encode.losses import Reduction
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, embedding_rows, longest_row, rows_of
from indexer.projection.adam import flat, learning_rate_of, read_scales, scales_digest
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from indexer.projection.selection import Selection, select_blocks
from indexer.projection.stored import calibrated_as

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
SHORTEST_PAIR = 4
"""Tokens of two rows of two tokens: with less for a batch, every row has one of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build did, or, after a dry run, would do."""

    store: str
    part: str
    rows: int
    """Rows of the part."""
    tokens: int | None
    """Tokens in all of them; None where they were not counted."""
    layers: int
    coverage: float
    """Share of the model's parameters that the projected layers hold."""
    dimension: int
    bytes_on_disk: int
    """Bytes of the part's chunks, texts and ids aside."""
    memory_bytes: int
    """Estimate of the build's own memory beside the model: matrices, span buffers or what learning takes, logits of a
    batch."""
    dry_run: bool
    resumed_rows: int = 0
    """Rows that were committed before this call."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Rows of the part by status."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time: total, compute, waiting for the corpus, writing (in the background)."""
    manifest: Manifest = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore build --json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A build, resolved: everything that is decided before the first gradient."""

    corpus: Corpus
    tokenizer: Tokenizer
    settings: TokenSettings
    projected: ProjectionPlan
    projection: Projection | None
    """None in a dry run of one that is learned."""
    plan: CorpusPlan
    layout: PartLayout
    selection: Selection
    manifest: Manifest
    model: Any
    reduction: Reduction
    checkpointing: bool
    padding: bool
    """Whether rows of different lengths share a batch."""
    fixed: dict[str, NDArray[Any]]
    """Arrays that the part keeps beside its rows."""


@takes(BuildOptions)
def build(options: BuildOptions) -> BuildReport:
    """Each sample's projected gradient at ``checkpoint``, for every sample of ``data``, into ``store``.

    Parameters have the names of the command's options. ``checkpoint`` is a folder in transformers' format
    or a hub id; ``data`` any form of corpus, see ``docs/corpus.md``. ``max_length`` is in tokens (default: the
    model's positions, at most 1024), ``batch_tokens`` the padded tokens of a batch (default 2,048 on a CPU,
    16,384 on CUDA). Texts of standard input (``data="-"``) are kept in the store. The part is called ``name``,
    by default after the checkpoint and the corpus.

    ``optimizer_state`` names a training checkpoint (of ``ghoststore train`` or transformers' Trainer) whose second
    moment of Adam, factored to row and column, scales both sides of the projection: products of two vectors are then
    ⟨g, V^-½ g'⟩, what a step of Adam on one sample does to the loss of the other.

    A part that exists already and is of the same build is continued: only spans without a commit record
    are computed, and the result is byte-identical to an uninterrupted build's.

    Raises CheckpointError, CorpusError, LayerError or UsageError for inputs that cannot be used,
    MismatchError if the part that exists was built otherwise, BusyError if another process is building it,
    StorageError if the disk refuses. What was committed stays committed.
    """
    progress = options.progress or Silent()
    begun = time.perf_counter()
    device = resolve_device(options.device)
    batch_tokens = (
        DEFAULT_BATCH_TOKENS[torch.device(device).type] if options.batch_tokens is None else options.batch_tokens
    )
    for option, value in (("--batch-tokens", batch_tokens), ("--max-samples", options.max_samples)):
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, not {value}")
    found = find_checkpoint(options.checkpoint)
    tokenizer_folder = Path(options.tokenizer) if options.tokenizer is not None else found.folder
    text_tokenizer = load_tokenizer(tokenizer_folder)
    part_name = (
        check_name(options.name)
        if options.name
        else safe_name(found.folder.resolve().name, corpus_name(str(options.data)))
    )
    if options.dry_run and str(options.data) == "-":
        raise UsageError("--dry-run cannot read standard input: the corpus would be used up; give a file")
    Store.refuse_others(Path(options.store))
    there = _existing(options.store, part_name)
    if there is not None:
        refuse_incomplete(there)
    with open_corpus(
        str(options.data), options.fields or Fields(), progress
    ) as corpus:  # refused before a model is loaded
        model = load_model(
            found, dtype=options.model_dtype, device=device, attn_implementation=options.attn_implementation
        )
        identity = {
            "checkpoint": checkpoint_section(found.fingerprint(), model, None if there is None else there.manifest),
            "tokenizer": tokenizer_identity(text_tokenizer),
        }
        config = (options.projection or ProjectionConfig()).for_build(
            optimizer_state=options.optimizer_state is not None
        )
        job = _plan(
            model,
            corpus,
            Tokenizer(text_tokenizer, vocabulary=embedding_rows(model), note=progress.note),
            config,
            TokenSettings(max_length=longest_row(model, options.max_length), overlong=options.overlong),
            _Storage(options.proj_dtype, options.span_rows, options.store_text or str(options.data) == "-"),
            max_samples=options.max_samples,
            count_tokens=options.dry_run,
            progress=progress,
            reduction=options.loss_reduction,
            checkpointing=options.gradient_checkpointing,
            optimizer_state=options.optimizer_state,
            batch_tokens=batch_tokens,
            dry_run=options.dry_run,
            there=there,
            identity=identity,
        )
        job.manifest.update(
            **identity,
            dtype={"model": options.model_dtype},
            batching={
                "batch_tokens": batch_tokens,
                "order": "longest first inside a span",
                "padding": job.padding,
            },
            source={
                "checkpoint": str(found.folder.resolve()),
                "tokenizer": str(tokenizer_folder.resolve()) if options.tokenizer is not None else None,
                "data": "-" if str(options.data) == "-" else absolute(corpus.source),
                "form": corpus.form,
                "optimizer_state": None
                if options.optimizer_state is None
                else str(Path(options.optimizer_state).resolve()),
                "learning_rate": learning_rate_of(found.folder),
            },
            compute={
                "device": torch.device(device).type,
                "attn_implementation": getattr(model.config, "_attn_implementation", None),
                "threads": torch.get_num_threads(),
                "gradient_checkpointing": options.gradient_checkpointing,
            },
            software=versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "zarr"),
        )
        report = BuildReport(
            store=str(options.store),
            part=part_name,
            rows=job.layout.rows,
            tokens=job.plan.tokens,
            layers=len(job.projected.layers),
            coverage=job.selection.coverage,
            dimension=job.layout.dimension,
            bytes_on_disk=_bytes_on_disk(job.layout),
            memory_bytes=_memory(job, batch_tokens),
            dry_run=options.dry_run,
            manifest=job.manifest,
        )
        if options.dry_run:
            return report
        part = _open_part(Store.create(options.store), part_name, job, progress)
        job.fixed.clear()  # on the disk now
        with writing(part):
            part = Part(part.path)
            resumed = part.rows
            seconds = _compute(part, job, progress)
        built = describe(Part(part.path))
        return replace(
            report,
            tokens=built.tokens,
            resumed_rows=resumed,
            statuses=built.statuses,
            seconds={"total": time.perf_counter() - begun, **seconds},
        )


class _Storage(NamedTuple):
    """How the user wants rows kept."""

    dtype: str
    span_rows: int | None
    store_text: bool


def _plan(
    model: Any,
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: ProjectionConfig,
    settings: TokenSettings,
    storage: _Storage,
    *,
    max_samples: int | None,
    count_tokens: bool,
    progress: Progress,
    reduction: Reduction,
    checkpointing: bool,
    optimizer_state: str | Path | None,
    batch_tokens: int,
    dry_run: bool,
    there: Part | None,
    identity: dict[str, Any],
) -> _Job:
    """Choose layers, scan the corpus, draw or learn matrices; the manifest sections that follow from these."""
    if optimizer_state is not None and config.preconditioned:
        raise UsageError(
            f"--optimizer-state and --proj-precondition {config.precondition} each give the gradients a metric of its "
            "own: choose one (--proj-precondition none)"
        )
    selection = select_blocks(model, config.layers, config.exclude_layers, include_embeddings=config.include_embeddings)
    plan = ProjectionPlan.of(selection, config)
    if there is not None:  # before any row of another model is looked at
        _refuse_other(there, plan, identity)
    padding = ModelCheck(
        model,
        plan,
        _first_usable(corpus, tokenizer, settings, max_samples),
        longest=settings.max_length,
        reduction=reduction,
        checkpointing=checkpointing,
        alone=batch_tokens < SHORTEST_PAIR,
    ).run()
    if not padding:
        progress.note(
            f"padding changes what {type(model).__name__} makes of a row: only rows of one length share a batch"
        )
    drawn_samples = SampleDraw(config.calibration_samples)

    def layout_of(rows: int) -> PartLayout:
        return PartLayout.choose(
            rows=rows,
            dimension=plan.dimension,
            groups=plan.group_count,
            dtype=storage.dtype,
            span_rows=storage.span_rows,
            store_text=storage.store_text,
        )

    corpus_plan = plan_corpus(
        corpus,
        tokenizer,
        settings,
        span_rows=layout_of(sys.maxsize).span_rows,
        max_samples=max_samples,
        tokenize=count_tokens,
        on_sample=drawn_samples.see if config.calibrated else None,
        progress=progress,
    )
    layout = layout_of(corpus_plan.rows)
    scales = None
    if optimizer_state is not None:
        scales = read_scales(optimizer_state, model, [layer.block for layer in plan.layers])
    if config.calibrated and there is not None:
        plan = calibrated_as(there, plan)
    elif config.calibrated and not dry_run:
        rows = list(rows_of(drawn_samples.samples, tokenizer, settings))
        plan = replace(
            plan,
            calibration=calibrate(
                model,
                plan,
                evenly(rows, config.calibration_samples),
                reduction=reduction,
                batch_tokens=batch_tokens,
                scales=scales,
                progress=progress,
                checkpointing=checkpointing,
                padding=padding,
            ),
        )
    known = plan.calibration is not None or not config.calibrated
    drawn = Projection(plan, scales) if known else None
    scan = corpus_plan.scan
    manifest: Manifest = {
        "corpus": {
            "fingerprint": scan.fingerprint,
            "samples": scan.rows,
            "max_samples": max_samples,
            "domains": scan.domains,
            "repeated_ids": corpus_plan.repeated_ids,
            "fields": corpus.resolved.to_json(),
        },
        "tokens": asdict(settings),
        "loss": {
            "definition": "next-token cross-entropy of each sample's own targets",
            "reduction": reduction,
        },
        "projection": {
            **plan.to_json(),
            "hash": None if drawn is None else drawn.hash,
            **({} if scales is None else {"optimizer_state": scales_digest(scales)}),
        },
        "layers": plan.layers_json(),
        "storage": {**asdict(layout), "groups": [list(group) for group in plan.groups] if known else None},
        "coverage": {"covered": selection.covered, "total": selection.total, "share": selection.coverage},
    }
    fixed = {} if scales is None else flat(scales)
    if plan.calibration is not None:
        fixed |= plan.calibration.arrays(plan.shapes)
    return _Job(
        corpus=corpus,
        tokenizer=tokenizer,
        settings=settings,
        projected=plan,
        projection=drawn,
        plan=corpus_plan,
        layout=layout,
        selection=selection,
        manifest=manifest,
        model=model,
        reduction=reduction,
        checkpointing=checkpointing,
        padding=padding,
        fixed=fixed,
    )


def _existing(store: str | Path, name: str) -> Part | None:
    """The part, if it is there already."""
    if not (Path(store) / "zarr.json").exists():
        return None
    opened = Store.open(store)
    return opened.part(name) if name in opened.part_names() else None


def _refuse_other(part: Part, plan: ProjectionPlan, identity: dict[str, Any]) -> None:
    """MismatchError if ``part`` was begun with another model or projection. What it learned comes later."""
    later = ("calibration", "hash", "optimizer_state")
    stored = {name: value for name, value in part.manifest["projection"].items() if name not in later}
    asked = {**part.manifest, "projection": plan.to_json(), "layers": plan.layers_json(), **identity}
    refuse_differences(
        {**part.manifest, "projection": stored}, asked, f"part {part.name!r} of {part.path.parent.parent}"
    )


def _first_usable(corpus: Corpus, tokenizer: Tokenizer, settings: TokenSettings, max_samples: int | None) -> list[Row]:
    """The first rows that will have a vector, however far they are from the beginning."""
    rows = rows_of(islice(corpus.samples(), max_samples), tokenizer, settings)
    return list(islice((row for row in rows if row.status.usable), ROWS_LOOKED_AT))


def evenly(rows: Sequence[Row], count: int) -> list[Row]:
    """At most ``count`` of ``rows``: long samples may have many windows."""
    return [rows[place * len(rows) // count] for place in range(count)] if len(rows) > count else list(rows)


def corpus_name(source: str) -> str:
    """A short name for the corpus at ``source``."""
    if source == "-":
        return "stdin"
    name = Path(source.rstrip("/")).name
    for suffix in (".gz", ".zst", ".jsonl", ".ndjson", ".parquet", ".csv", ".txt"):
        name = name.removesuffix(suffix)
    return name


def _bytes_on_disk(layout: PartLayout) -> int:
    total = 0
    for spec in layout.arrays():
        if spec.dtype is not str:
            total += (spec.chunk_bytes + CRC_BYTES) * -(-layout.rows // spec.chunk_rows)
    return total


def _memory(job: _Job, batch_tokens: int) -> int:
    matrices = sum(4 * (one.k_in * one.n_in + one.k_out * one.n_out) for one in job.projected.shapes)
    spans = 3 * job.layout.span_rows * job.layout.dimension * 4
    logits = batch_tokens * int(job.model.get_input_embeddings().num_embeddings * job.model.dtype.itemsize)
    return matrices + max(spans, learning_bytes(job.projected)) + logits


def _open_part(store: Store, name: str, job: _Job, progress: Progress) -> Part:
    """The part, new or there already. MismatchError if it is of another build."""
    path = store.part_path(name)
    part = create_part(path, job.manifest, job.plan.table, job.fixed)
    refuse_differences(part.manifest, job.manifest, f"part {name!r} of {store.path}")
    if not np.array_equal(span_table(part), job.plan.table):
        raise other_places(part, job.plan.table, job.manifest["source"], store.path)
    for section in ("software", "compute"):
        if part.manifest[section] != job.manifest[section] and not part.complete:
            progress.note(
                f"continuing with other {section} than the part was begun with: bits of new rows may differ from those "
                f"of an uninterrupted build (was {part.manifest[section]}, is {job.manifest[section]})"
            )
    return part


@dataclass(frozen=True, slots=True)
class _SpanRows:
    span: int
    rows: list[Row]


def _read_ahead(job: _Job, layout: PartLayout, spans: Sequence[int]) -> Iterator[_SpanRows]:
    """The rows of ``spans``, read and tokenized by a thread while the caller computes."""
    sizes = [stop - start for start, stop in map(layout.span_of, range(layout.spans))]
    ready: queue.Queue[_SpanRows | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: _SpanRows | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for span, rows in rows_of_spans(job.corpus, job.tokenizer, job.settings, job.plan, sizes, spans):
                put(_SpanRows(span, rows))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, which raises it
            put(error)

    thread = threading.Thread(target=read, name="ghoststore-tokenizer", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def _compute(part: Part, job: _Job, progress: Progress) -> dict[str, float]:
    """Build every span that has no record yet. Returns seconds by kind of work."""
    done = set(part.spans)
    missing = [span for span in range(part.layout.spans) if span not in done]
    seconds = {"compute": 0.0, "corpus": 0.0, "write": 0.0}
    if not missing:
        return seconds
    task = progress.task("building", part.layout.rows, done=part.rows)
    batch_tokens = int(part.manifest["batching"]["batch_tokens"])
    assert job.projection is not None
    try:
        with (
            RowEncoder(
                job.model,
                job.projection,
                reduction=job.reduction,
                checkpointing=job.checkpointing,
                padding=job.padding,
            ) as encoder,
            BackgroundWriter(part) as writer,
        ):
            waited = time.perf_counter()
            for work in _read_ahead(job, part.layout, missing):
                begun = time.perf_counter()
                seconds["corpus"] += begun - waited
                arrays = span_arrays(work.rows, part)
                encoded = encode_rows(encoder, work.rows, batch_tokens, task)
                arrays["loss"] = encoded.losses.numpy()
                seal_vectors(arrays, encoded.vectors.numpy(), part)
                waited = time.perf_counter()
                seconds["compute"] += waited - begun
                writer.put(SpanData(work.span, arrays))
        seconds["write"] = writer.seconds
    finally:
        task.close()
    return seconds


def span_arrays(rows: Sequence[Row], part: Part) -> dict[str, NDArray[Any]]:
    """Every array of a span but ``loss`` and those of its vectors."""
    codes = {domain: code for code, domain in enumerate(part.domains)}
    arrays: dict[str, NDArray[Any]] = {
        "n_tokens": np.array([len(row.tokens) for row in rows], dtype=np.int32),
        "status": np.array([row.status for row in rows], dtype=np.uint8),
        "sample_id": np.array([row.sample.id for row in rows], dtype=object),
        "domain": np.array(
            [-1 if row.sample.domain is None else codes[row.sample.domain] for row in rows], dtype=np.int16
        ),
        "source_row": np.array([row.sample.source_row for row in rows], dtype=np.int64),
        "source_file": np.array([row.sample.file for row in rows], dtype=np.int32),
        "source_offset": np.array([row.sample.offset for row in rows], dtype=np.int64),
        "source_digest": np.array([row.sample.digest() for row in rows], dtype=np.uint64),
        "window_start": np.array([row.window_start for row in rows], dtype=np.int32),
    }
    if part.layout.store_text:
        arrays["text"] = np.array([row.sample.preview() for row in rows], dtype=object)
    return arrays
