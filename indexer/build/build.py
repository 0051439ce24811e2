"""``ghoststore.build``: make a part of a store from a checkpoint and a corpus."""

from __future__ import annotations

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
from ghoststore.store.base.writable import may_write
from ghoststore.store.info import describe
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.spans.writer import writing
from indexer.build.corpus_plan import other_places
from indexer.build.estimate import estimated_seconds
from indexer.build.inputs import open_inputs
from indexer.build.job import BuildJob, plan_job
from indexer.build.report import BuildReport
from indexer.build.spans import compute_spans


@takes(BuildOptions)
def build(options: BuildOptions) -> BuildReport:
    """Compute the projected gradient of every sample of ``data`` at ``checkpoint``, and write it to a part of
    ``store``.

    ``checkpoint`` is a folder in transformers' format or a hub id. ``data`` is any form of corpus, see
    ``docs/corpus.md``. ``max_length`` is in tokens (default: the model's positions, at most 1024). ``batch_tokens`` is
    the number of padded tokens of a batch (default: 2,048 on a CPU, 16,384 on CUDA). Texts from standard input
    (``data="-"``) are kept in the store. ``name`` is the name of the part (default: made of the names of checkpoint and
    corpus).

    ``optimizer_state`` names a training checkpoint of ``ghoststore train`` or transformers' Trainer. Adam's second
    moment from it, factored into a row and a column, scales both sides of the projection. The inner product of two
    vectors is then ⟨g, V^-½ g'⟩: the effect of an Adam step on one sample on the loss of the other.

    If the part exists and is of the same build, it is continued: only spans without a commit record are computed. The
    result is byte-identical to that of an uninterrupted build.

    Raises CheckpointError, CorpusError, LayerError or UsageError for inputs that cannot be used, MismatchError if the
    part exists and is of another build, CorruptError (before anything is computed) if a file of what is committed is
    damaged, BusyError if another process builds it, StorageError if the disk refuses. Committed spans stay
    committed.
    """
    progress = options.progress or Silent()
    started = time.perf_counter()
    with open_inputs(options, progress) as inputs:
        job = plan_job(inputs, progress)
        report = BuildReport.of(job)
        if options.dry_run:
            return replace(report, seconds=estimated_seconds(job))
        part = _open_part(Store.create(options.store), job, progress)
        if problem := remember(part.manifest, job.manifest["source"], part.path):
            progress.note(problem)
        # A complete part in a folder without write access is only read: there is nothing to write.
        with writing(part) if not part.complete or may_write(part.path) else nullcontext():
            part = Part(part.path)  # opened again: another process may have written until the lock was ours
            seconds = compute_spans(part, job, progress)
        built = describe(Part(part.path))
        return replace(
            report,
            tokens=built.tokens,
            resumed_rows=part.rows,
            statuses=built.statuses,
            seconds={"total": time.perf_counter() - started, "learning": job.learning_seconds, **seconds},
        )


def _open_part(store: Store, job: BuildJob, progress: Progress) -> Part:
    """The part of ``job``, created if it does not exist. MismatchError if it is of another build."""
    path = store.part_path(job.inputs.part_name)
    part = create_part(path, job.manifest, job.plan.table, job.fixed())
    refuse_other_build(part, job, progress)
    return part


def refuse_other_build(part: Part, job: BuildJob, progress: Progress) -> None:
    """MismatchError if ``job`` would not compute the rows of ``part``. A note says so if their last bits may differ."""
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
