"""A corpus that grew at its end: the command that builds its new rows as a part of their own."""

from __future__ import annotations

from ghoststore.errors import MismatchError
from ghoststore.settings.shared import in_memory, is_stdin
from ghoststore.store import Part
from ghoststore.store.base.manifest import PART, differences
from ghoststore.store.base.names import safe_name
from ghoststore.store.base.own import is_own
from ghoststore.store.part.build_command import command_of
from indexer.build.job import BuildJob

GROWS = (
    *(f"corpus.{name}" for name in ("fingerprint", "samples", "max_samples", "domains", "kept_fingerprint")),
    "corpus.repeated_ids",
    *(f"storage.{name}" for name in ("rows", "span_rows", "chunk_rows")),
)
"""Entries of the manifest that are others where a corpus has more rows."""


def refuse_grown(part: Part, job: BuildJob) -> None:
    """MismatchError with the command for the new rows, if the corpus of ``job`` begins with the samples of ``part`` and
    goes on, and nothing else differs.
    """
    stored, wanted = part.manifest, job.manifest
    if job.plan.scan.known != stored["corpus"]["fingerprint"] or in_memory(job.inputs.options.data):
        return
    for section in PART.identity:
        for path, _, _ in differences(stored[section], wanted[section], section):
            if not any(f"{path}.".startswith(f"{name}.") for name in GROWS):
                return
    samples, now = stored["corpus"]["samples"], wanted["corpus"]["samples"]
    rest = ""
    if not part.complete:  # it is completed by the same build alone
        as_begun = stored["corpus"]["max_samples"]
        words = "without `max_samples`" if as_begun is None else f"with `max_samples={as_begun}`"
        rest = f"; part {part.name!r} is not complete: {words} this build completes it, which is to be done first"
    raise MismatchError(
        f"{job.inputs.corpus.source} has grown since part {part.name!r} of {part.path.parent.parent} was built: the "
        f"{samples:,} samples of the part are unchanged, {now - samples:,} follow; nothing was changed{rest}. This "
        f"builds the new ones as a part of their own:\n  {_command(part, job, now - samples)}\n"
        f"Both are ranked as one by `ghoststore query --part {part.name} --part {_name(part)} …`. Or give another "
        "`name` to build all rows anew"
    )


def command_for_new_rows(part: Part, job: BuildJob) -> str | None:
    """The command that builds what follows the samples of ``part``, which ``job`` has completed; None where nothing
    does, where no more is asked for, or where the corpus has no path.
    """
    options, samples = job.inputs.options, int(part.manifest["corpus"]["samples"])
    most = options.max_samples
    if not job.plan.goes_on or most == samples or in_memory(options.data) or is_stdin(options.data):
        return None
    return _command(part, job, None if most is None else most - samples)


def _name(part: Part) -> str:
    corpus = part.manifest["corpus"]
    begun = part.name.rpartition("-from-")[0] if corpus.get("skip_samples") else ""
    return safe_name(begun or part.name, f"from-{corpus.get('skip_samples', 0) + corpus['samples']}")


def _command(part: Part, job: BuildJob, samples: int | None) -> str:
    """The command for the ``samples`` that follow those of ``part``; without `max_samples` all, as then."""
    options, corpus, own = job.inputs.options, part.manifest["corpus"], is_own(part.manifest)
    # What is given counts where the part does not say it, or may not be believed.
    given = {
        name: value
        for name in ("checkpoint", "tokenizer", "base")
        if (value := getattr(options, name)) is not None
        and not in_memory(value)
        and not (own and part.manifest["source"].get(name) is not None)
    }
    return command_of(
        like=part.name,
        data=options.data,
        store=options.store,
        name=_name(part),
        skip_samples=corpus.get("skip_samples", 0) + corpus["samples"],
        max_samples=None if options.max_samples is None else samples,
        **given,
    )
