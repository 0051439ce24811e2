"""A build that is resolved and its part, begun if it is not there: where all that build rows of it begin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np

from ghoststore.errors import MismatchError
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.base.own import remember
from ghoststore.store.base.writable import may_write
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.spans.writer import writing
from indexer.build.beginning import begin
from indexer.build.corpus_plan import other_places
from indexer.build.growth import command_for_new_rows, refuse_grown
from indexer.build.inputs import LoadedModel, open_inputs
from indexer.build.job import BuildJob, plan_job
from indexer.build.named_part import part_name


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
            load = LoadedModel.of
            waiting = begin(Store.create(options.store), name, progress, lambda: ahead.append(load(options, progress)))
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
