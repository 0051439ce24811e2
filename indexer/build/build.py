"""``ghoststore.build``: make a part of a store from a checkpoint and a corpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np

from ghoststore.errors import MismatchError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.build import AUTO, BuildOptions
from ghoststore.settings.keywords import takes
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.base.own import remember
from ghoststore.store.base.writable import may_write
from ghoststore.store.info import describe
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.spans.writer import writing
from indexer.build.beginning import begin
from indexer.build.corpus_plan import other_places
from indexer.build.estimate import estimated_seconds
from indexer.build.growth import command_for_new_rows, refuse_grown
from indexer.build.inputs import LoadedModel, open_inputs, part_name
from indexer.build.job import BuildJob, plan_job
from indexer.build.like import resolved
from indexer.build.report import BuildReport
from indexer.build.share import Share, device_of
from indexer.build.spans import compute_spans
from indexer.build.stream import build_stream
from indexer.build.workers import build_side_by_side


@takes(BuildOptions)
def build(options: BuildOptions) -> BuildReport:
    """Compute the projected gradient of every sample of ``data`` at ``checkpoint``, and write it to a part of
    ``store``.

    ``checkpoint`` is a folder in transformers' format or a hub id. ``data`` is any form of corpus, see
    ``docs/corpus.md``. With ``stream`` it is read once, in order; so is, without being told, a
    `datasets.IterableDataset`, or another object without a length that is iterated over anew, see ``docs/streams.md``.
    ``max_length`` is in tokens (default: the model's positions, at most 1024). ``batch_tokens`` is the number of padded
    tokens of a batch (default: 2,048 on a CPU, 16,384 on CUDA). Texts of what cannot be read again, such as standard
    input (``data="-"``), are kept in the store. ``name`` is the name of the part (default: made of the names of
    checkpoint and corpus).

    ``optimizer_state`` names a training checkpoint of ``ghoststore train`` or transformers' Trainer. Adam's second
    moment from it, factored into a row and a column, scales both sides of the projection. The inner product of two
    vectors is then ⟨g, V^-½ g'⟩: the effect of an Adam step on one sample on the loss of the other.

    ``like`` names a part of the store: what is not given (checkpoint, lengths, projection, …) is taken from it, and so
    is what its projection learned. The parts can then be ranked as one. ``skip_samples`` leaves out the first samples.

    If the part exists and is of the same build, it is continued: only spans without a commit record are computed. The
    result is byte-identical to that of an uninterrupted build. Of a corpus that grew at its end meanwhile it has the
    samples that it was begun with; the report has the command for the others.

    ``workers`` processes of this machine build side by side; with ``worker="2/8"`` this process builds the second of
    eight shares beside others, on this machine or others that see the same store; with ``engine="ray"`` actors of a Ray
    cluster build (see ``docs/scale.md``). Whoever comes first plans the part and learns the projection, once; the
    others wait for that.

    Raises CheckpointError, CorpusError, LayerError or UsageError for inputs that cannot be used, MismatchError if the
    part exists and is of another build, CorruptError (before anything is computed) if a file of what is committed is
    damaged, BusyError if another process builds it, WorkerError if a process of ``workers`` dies again and again,
    StorageError if the disk refuses. Committed spans stay committed.
    """
    progress = options.progress or Silent()
    options = resolved(options)
    if not options.dry_run and options.engine == "ray":
        from indexer.build.on_ray import build_on_ray  # its actors call `opened`, below

        return build_on_ray(options, progress)
    if not options.dry_run and options.workers is not None:
        return build_side_by_side(options, progress)
    if options.streams:
        return build_stream(options, progress)
    share = Share.given(options.worker)
    if options.worker == AUTO:
        options = replace(options, device=device_of(options.device))
    started = time.perf_counter()
    if options.dry_run:
        with open_inputs(options, progress) as inputs:
            job = plan_job(inputs, progress)
            report = replace(BuildReport.of(job), seconds=estimated_seconds(job))
            if options.workers is not None:
                return _of_workers(report, job, options.workers)
            return report if share is None else _of_share(report, job, share)
    with opened(options, progress, None if share is None else share.of) as (job, part):
        chosen = range(part.layout.spans) if share is None else share.of(part.layout.spans)
        missing = sorted(set(chosen) - set(part.spans))
        seconds = compute_spans(part, job, progress, None if share is None else missing)
        completed = Part(part.path)
        built = describe(completed)
        return replace(
            BuildReport.of(job),
            tokens=built.tokens,
            resumed_rows=part.rows,
            rows_built=sum(stop - start for start, stop in map(part.layout.span_of, missing)),
            worker=None if share is None else str(share),
            new_rows=command_for_new_rows(completed, job) if completed.complete else None,
            statuses=built.statuses,
            seconds={"total": time.perf_counter() - started, "learning": job.learning_seconds, **seconds},
        )


def _of_share(report: BuildReport, job: BuildJob, share: Share) -> BuildReport:
    """The dry run's ``report`` for one of several workers: the rows that are missing of its share, and their time."""
    existing = job.inputs.existing
    missing = set(share.of(job.layout.spans)) - set(() if existing is None else existing.spans)
    rows = sum(stop - start for start, stop in map(job.layout.span_of, missing))
    left = report.rows - (0 if existing is None else existing.rows)
    seconds = dict(report.seconds)
    if "compute" in seconds:
        seconds["compute"] *= rows / left
    return replace(report, worker=str(share), rows_built=rows, seconds=seconds)


def _of_workers(report: BuildReport, job: BuildJob, workers: int) -> BuildReport:
    """The dry run's ``report`` for ``workers`` that take the missing spans in turn."""
    existing = job.inputs.existing
    missing = job.layout.spans - (0 if existing is None else len(existing.spans))
    busy = min(workers, missing)
    left = report.rows - (0 if existing is None else existing.rows)
    rows = min(left, -(-missing // busy) * job.layout.span_rows) if busy else 0
    return replace(report, workers=busy, rows_built=rows)


@contextmanager
def opened(
    options: BuildOptions, progress: Progress, share: Callable[[int], Collection[int]] | None = None
) -> Iterator[tuple[BuildJob, Part]]:
    """The resolved build and its part, made if there is none, which no other process may write meanwhile.

    With ``share``, which names this worker's spans by their number, other workers may: one of them begins the part.
    """
    with ExitStack() as stack:
        beginning = ExitStack()
        ahead: list[LoadedModel] = []  # the model is loaded while another learns the projection
        if share is not None:
            name = part_name(options)  # before the store is made: a checkpoint that is none is refused
            waiting = begin(Store.create(options.store), name, progress, lambda: ahead.append(LoadedModel.of(options)))
            beginning = stack.enter_context(waiting)
        inputs = stack.enter_context(open_inputs(options, progress, checked=share, ahead=ahead[0] if ahead else None))
        job = plan_job(inputs, progress, joining=share is not None)
        try:
            part = _open_part(Store.create(options.store), job, progress)
        except MismatchError:
            if share is None or inputs.existing is not None:
                raise
            part = None  # another made the part meanwhile, and may have learned other last bits: its own are taken
        if part is not None:
            beginning.close()
            if problem := remember(part.manifest, job.manifest["source"], part.path):
                progress.note(problem)
            if share is None and command_for_new_rows(part, job) is not None:
                progress.note(
                    f"{inputs.corpus.source} has grown since part {part.name!r} was begun: this build completes the "
                    f"{job.plan.scan.rows:,} samples of then, and names the command for those that follow"
                )
            # A complete part in a folder without write access is only read: there is nothing to write.
            if not part.complete or may_write(part.path):
                stack.enter_context(writing(part, shared=share is not None))
            yield job, Part(part.path)  # opened again: another process may have written until the lock was ours
            return
    with opened(options, progress, share) as job_and_part:
        yield job_and_part


def _open_part(store: Store, job: BuildJob, progress: Progress) -> Part:
    """The part of ``job``, created if it does not exist. MismatchError if it is of another build."""
    path = store.part_path(job.inputs.part_name)
    part = create_part(path, job.manifest, job.plan.table, job.fixed())
    refuse_other_build(part, job, progress)
    return part


def refuse_other_build(part: Part, job: BuildJob, progress: Progress) -> None:
    """MismatchError if ``job`` would not compute the rows of ``part``. A note says so if their last bits may differ."""
    store = part.path.parent.parent
    try:
        refuse_differences(part.manifest, job.manifest, f"part {part.name!r} of {store}")
    except MismatchError:
        refuse_grown(part, job)
        raise
    if not np.array_equal(span_table(part), job.plan.table):
        raise other_places(part, job.plan.table, job.manifest["source"], store)
    for section in ("software", "compute"):
        if part.manifest[section] != job.manifest[section] and not part.complete:
            progress.note(
                f"continuing with other {section} than the part was begun with: bits of new rows may differ from those "
                f"of an uninterrupted build (was {part.manifest[section]}, is {job.manifest[section]})"
            )
