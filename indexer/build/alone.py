"""A build by this process: of a whole part, or of its share beside others."""

from __future__ import annotations

import time
from dataclasses import replace

from ghoststore.progress import Progress
from ghoststore.settings.build import AUTO, BuildOptions
from ghoststore.store import Part
from ghoststore.store.info import describe
from indexer.build.estimate import estimated_seconds, report_of
from indexer.build.growth import command_for_new_rows
from indexer.build.inputs import open_inputs
from indexer.build.job import BuildJob, plan_job
from indexer.build.opened import opened
from indexer.build.report import BuildReport
from indexer.build.share import Share, device_of
from indexer.build.spans import compute_spans


def build_alone(options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` by this process; a dry run, whoever would build."""
    share = Share.given(options.worker)
    if options.worker == AUTO:
        options = replace(options, device=device_of(options.device))
    started = time.perf_counter()
    if options.dry_run:
        with open_inputs(options, progress) as inputs:
            job = plan_job(inputs, progress)
            report = replace(report_of(job), seconds=estimated_seconds(job))
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
            report_of(job),
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
