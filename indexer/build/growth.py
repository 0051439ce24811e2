"""A corpus that grew at its end: the command that builds its new rows as a part of their own."""

from __future__ import annotations

from ghoststore.errors import MismatchError
from ghoststore.settings.shared import in_memory
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
    rest = "" if part.complete else f"; part {part.name!r} is not complete: with `worker=1/1` this build completes it"
    raise MismatchError(
        f"{job.inputs.corpus.source} has grown since part {part.name!r} of {part.path.parent.parent} was built: the "
        f"{samples:,} samples of the part are unchanged, {now - samples:,} follow; nothing was changed{rest}. This "
        f"builds the new ones as a part of their own:\n  {_command(part, job)}\n"
        f"Both are ranked as one by `ghoststore query --part {part.name} --part {_name(part)} …`. Or give another "
        "`name` to build all rows anew"
    )


def _name(part: Part) -> str:
    corpus = part.manifest["corpus"]
    begun = part.name.rpartition("-from-")[0] if corpus.get("skip_samples") else ""
    return safe_name(begun or part.name, f"from-{corpus.get('skip_samples', 0) + corpus['samples']}")


def _command(part: Part, job: BuildJob) -> str:
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
        max_samples=None if options.max_samples is None else job.plan.scan.rows - corpus["samples"],
        **given,
    )
