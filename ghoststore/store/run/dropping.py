"""Drops damaged entries of a run's journals, so that the rest can be read. No one can compute their steps again."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ghoststore.store.base.disk import flush
from ghoststore.store.base.writers import unfinished
from ghoststore.store.run.journal import (
    Entry,
    Journal,
    append_entry,
    entry_of,
    entry_size,
    first_link,
    header_at,
    intact,
    is_finished,
    journal_path,
    problems_of,
    read_arrays,
)
from ghoststore.store.run.journal_files import JournalBytes, opened
from ghoststore.store.run.ranges import Steps, inside, merged, without
from ghoststore.store.run.run import Run
from ghoststore.store.run.skipped import SKIPPED, write_skipped


def drop_damaged_steps(run: Run) -> list[tuple[str, Steps]]:
    """Drop damaged entries of the journals of ``run``, and give up every missing step before the last present one.

    Returns (file, steps) of what was given up. The caller must be the run's one writer.
    """
    lost: list[tuple[str, Steps]] = []
    for journal in run.journals.values():
        if problems_of(journal):
            file = str(journal.path.relative_to(run.path))
            lost += [(file, steps) for steps in _without_damaged(run, journal)]
    current = Run(run.path)
    present = merged(
        [*map(current.layout.span_of, current.spans), *(s for j in current.journals.values() for s in j.steps)]
    )
    missing = without([(0, present[-1][1] if present else 0)], present)
    if current.layout.save_steps is None or (run.skipped_problem is None and not without(missing, current.skipped)):
        return lost
    # Steps that were given up inside committed spans stay in the list, if it can be read.
    recorded = [steps for span in current.spans for steps in inside(current.skipped, current.layout.span_of(span))]
    write_skipped(current.path, merged([*missing, *recorded]))
    newly_missing = without(without(missing, current.skipped), merged(steps for _, steps in lost))
    return [*lost, *((SKIPPED, steps) for steps in newly_missing)]


def _without_damaged(run: Run, journal: Journal) -> list[Steps]:
    """Write a journal again with its intact entries, also those after the first damage.

    Returns the steps of the damaged entries, and those that the damaged end may have had.
    """
    path = unfinished(journal.path)
    rewritten, lost = Journal(path=path, span=journal.span), list[Steps]()
    names = {spec.name for spec in run.layout.arrays()}
    with opened(journal.path) as handle:
        entries = [*journal.entries, *_later_entries(run, journal, handle)]
        for entry in sorted(entries, key=lambda entry: entry.start):
            if intact(handle, entry):
                append_entry(run, rewritten, entry.start, read_arrays(handle, journal, entry, run.layout, names))
            else:
                lost.append((entry.start, entry.stop))
        end = max((entry.offset + entry.size for entry in entries), default=0)
        damaged_entries = -(-(handle.size - end) // entry_size(run.layout, run.layout.interval))
    if damaged_entries > 0:
        begin, stop = run.layout.span_of(journal.span)
        begin = max([begin, *(entry.stop for entry in entries)])
        lost.append((begin, min(stop, begin + damaged_entries * run.layout.interval)))
    if rewritten.entries:
        os.replace(path, journal_path(run.path, journal.span))
    else:
        journal.path.unlink()
    flush(journal.path.parent)
    return [steps for steps in lost if steps[0] < steps[1]]


def _later_entries(run: Run, journal: Journal, handle: JournalBytes) -> Iterator[Entry]:
    """Intact entries of ``journal`` after the first damage.

    The layout tells where an entry begins: all have the same size, except that of the run's last interval. An entry is
    of another journal if it is not linked to the intact entry before it, or, as the first, to the run: it and all that
    follow are not taken. OSError if the disk refuses to read.
    """
    layout, size = run.layout, handle.size
    starts = set(journal.starts)
    link: bytes | None = first_link(run, journal.span)
    if journal.entries:
        link = _link_to(handle, journal.entries[-1])
    for offset in range(journal.end, size, entry_size(layout, layout.interval)):
        fields, expected, link = header_at(handle, offset), link, None
        if fields is None:
            continue
        _, start, stop, length, *_, previous, _ = fields
        if expected not in (None, previous):
            return
        of_span = start // layout.span_steps == journal.span and start not in starts
        if not of_span or start % layout.interval or stop != min(start + layout.interval, layout.steps):
            continue
        if length != entry_size(layout, stop - start) or not is_finished(handle, offset, length, size):
            continue
        starts.add(start)
        entry = entry_of(handle, offset, fields)
        link = _link_to(handle, entry)
        yield entry


def _link_to(handle: JournalBytes, entry: Entry) -> bytes | None:
    """The link that the entry after ``entry`` must have; None if ``entry`` is damaged, so that it is not known."""
    return entry.digest if intact(handle, entry) else None
