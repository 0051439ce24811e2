"""``ghoststore.build``: a checkpoint and a corpus to a part of a store."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ghoststore.corpus import Fields
from ghoststore.progress import Progress, Silent
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.info import describe
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.spans.writer import writing
from indexer.build.corpus_plan import other_places
from indexer.build.inputs import open_inputs
from indexer.build.job import BuildJob, plan_job
from indexer.build.report import BuildReport
from indexer.build.settings import BuildSettings
from indexer.build.spans import compute_spans
from indexer.encode.losses import Reduction
from indexer.encode.tokens import Overlong


def build(
    *,
    checkpoint: str | Path,
    data: str | Path,
    store: str | Path,
    name: str | None = None,
    tokenizer: str | Path | None = None,
    projection: ProjectionConfig | None = None,
    fields: Fields | None = None,
    proj_dtype: str = "float32",
    loss_reduction: Reduction = "mean",
    max_length: int | None = None,
    overlong: Overlong = "truncate",
    max_samples: int | None = None,
    batch_tokens: int | None = None,
    span_rows: int | None = None,
    store_text: bool = False,
    device: str = "auto",
    model_dtype: str = "float32",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    optimizer_state: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
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
    settings = BuildSettings(
        projection=projection,
        fields=fields,
        checkpoint=checkpoint,
        data=data,
        store=store,
        name=name,
        tokenizer=tokenizer,
        proj_dtype=proj_dtype,
        loss_reduction=loss_reduction,
        max_length=max_length,
        overlong=overlong,
        max_samples=max_samples,
        batch_tokens=batch_tokens,
        span_rows=span_rows,
        store_text=store_text,
        device=device,
        model_dtype=model_dtype,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        optimizer_state=optimizer_state,
        dry_run=dry_run,
    )
    return _build(settings, progress or Silent())


def _build(settings: BuildSettings, progress: Progress) -> BuildReport:
    begun = time.perf_counter()
    with open_inputs(settings, progress) as inputs:
        job = plan_job(inputs, progress)
        report = BuildReport.of(job)
        if settings.dry_run:
            return report
        part = _open_part(Store.create(settings.store), job, progress)
        with writing(part):
            part = Part(part.path)  # as it stands now that nobody else writes it
            seconds = compute_spans(part, job, progress)
        built = describe(Part(part.path))
        return replace(
            report,
            tokens=built.tokens,
            resumed_rows=part.rows,
            statuses=built.statuses,
            seconds={"total": time.perf_counter() - begun, **seconds},
        )


def _open_part(store: Store, job: BuildJob, progress: Progress) -> Part:
    """The part, new or there already. MismatchError if it is of another build."""
    path = store.part_path(job.inputs.part_name)
    part = create_part(path, job.manifest, job.plan.table, job.fixed())
    refuse_differences(part.manifest, job.manifest, f"part {part.name!r} of {store.path}")
    if not np.array_equal(span_table(part), job.plan.table):
        raise other_places(part, job.plan.table, job.manifest["source"], store.path)
    for section in ("software", "compute"):
        if part.manifest[section] != job.manifest[section] and not part.complete:
            progress.note(
                f"continuing with other {section} than the part was begun with: bits of new rows may differ from those "
                f"of an uninterrupted build (was {part.manifest[section]}, is {job.manifest[section]})"
            )
    return part
