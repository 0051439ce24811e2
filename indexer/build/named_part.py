"""The part that the options of a build name, and its checkpoint, without what loads a model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

from ghoststore.checkpoint.load import AnyCheckpoint, find_checkpoint
from ghoststore.corpus import part_word
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from ghoststore.store import Part, Store
from ghoststore.store.base.names import check_name, safe_name
from ghoststore.store.base.object_path import location
from ghoststore.store.spans.soundness import refuse_damaged, refuse_damaged_spans


def checkpoint_of(options: BuildOptions, progress: Progress | None) -> AnyCheckpoint:
    """The checkpoint that ``options`` name."""
    return find_checkpoint(options.model, base=options.base, adapter=options.adapter, progress=progress)


def part_name(options: BuildOptions) -> str:
    """The name of the part, given or made of those of checkpoint and corpus. CheckpointError, whatever the name, for a
    checkpoint that is none.
    """
    checkpoint = checkpoint_of(options, options.progress)
    return check_name(options.name) if options.name else safe_name(checkpoint.name, part_word(options.data))


def existing_part(
    store: str | Path, name: str, progress: Progress, checked: Callable[[int], Collection[int]] | None = None
) -> Part | None:
    """The part called ``name``, or None. CorruptError naming what is damaged: every committed span is read, which is
    little beside what a build computes; with ``checked`` those that it names, see :func:`open_inputs`.
    """
    if not (location(store) / "zarr.json").exists():
        return None
    opened_store = Store.open(store)
    if name not in opened_store.part_names():
        return None
    part = opened_store.damaged_part(name)
    refuse_damaged(part)
    chosen = set(range(part.layout.spans) if checked is None else checked(part.layout.spans))
    spans = [span for span in part.spans if span in chosen]
    if spans:
        with closing(progress.task(f"checking {part.name}", len(spans), unit="spans")) as task:
            refuse_damaged_spans(part, spans, task)
    return part
