"""``ghoststore.build``: a checkpoint and a corpus to a part of a store."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from ghoststore.progress import Progress, Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.keywords import takes
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.base.own import remember
from ghoststore.store.info import describe
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.spans.writer import writing
from indexer.build.corpus_plan import other_places
from indexer.build.inputs import open_inputs
from indexer.build.job import BuildJob, plan_job
from indexer.build.report import BuildReport
from indexer.build.spans import compute_spans


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
    MismatchError if the part that exists was built otherwise, CorruptError (before anything is computed) if it is
    damaged as far as records and sizes of files tell, BusyError if another process is building it,
    StorageError if the disk refuses. What was committed stays committed.
    """
    progress = options.progress or Silent()
    begun = time.perf_counter()
    with open_inputs(options, progress) as inputs:
        job = plan_job(inputs, progress)
        report = BuildReport.of(job)
        if options.dry_run:
            return report
        part = _open_part(Store.create(options.store), job, progress)
        if problem := remember(part.manifest, job.manifest["source"], part.path):
            progress.note(problem)
        # A complete part that cannot be written is read alone: nothing is to be written.
        with writing(part) if not part.complete or os.access(part.path, os.W_OK) else nullcontext():
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
    refuse_other_build(part, job, progress)
    return part


def refuse_other_build(part: Part, job: BuildJob, progress: Progress) -> None:
    """MismatchError if ``job`` would not compute the rows of ``part``; a note where it may compute other last bits."""
    store = part.path.parent.parent
    refuse_differences(part.manifest, job.manifest, f"part {part.name!r} of {store}")
    if not np.array_equal(span_table(part), job.plan.table):
        raise other_places(part, job.plan.table, job.manifest["source"], store)
    for section in ("software", "compute"):
        if part.manifest[section] != job.manifest[section] and not part.complete:
            progress.note(
                f"continuing with other {section} than the part was begun with: bits of new rows may differ from those "
                f"of an uninterrupted build (was {part.manifest[section]}, is {job.manifest[section]})"
            )
