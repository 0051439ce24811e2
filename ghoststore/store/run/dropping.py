"""What is damaged in a run's journals, taken out, so that the rest opens: its steps cannot be computed again."""

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
    opened,
    problems_of,
    read_arrays,
)
from ghoststore.store.run.ranges import Steps, inside, merged, without
from ghoststore.store.run.run import Run
from ghoststore.store.run.skipped import SKIPPED, write_skipped


def drop_damaged_steps(run: Run) -> list[tuple[str, Steps]]:
    """Take damaged entries out of the journals of ``run``, and say of every step that is missing below the last one
    that is there that it will not come. (File, steps) of what was given up. The caller is the run's one writer.
    """
    lost: list[tuple[str, Steps]] = []
    for journal in run.journals.values():
        if problems_of(journal):
            file = str(journal.path.relative_to(run.path))
            lost += [(file, steps) for steps in _without_damaged(run, journal)]
    now = Run(run.path)
    present = merged([*map(now.layout.span_of, now.spans), *(s for j in now.journals.values() for s in j.steps)])
    missing = without([(0, present[-1][1] if present else 0)], present)
    if now.layout.save_steps is None or (run.skipped_problem is None and not without(missing, now.skipped)):
        return lost
    # Given up inside spans that are committed, where that is still known.
    known = [steps for span in now.spans for steps in inside(now.skipped, now.layout.span_of(span))]
    write_skipped(now.path, merged([*missing, *known]))
    others = without(without(missing, now.skipped), merged(steps for _, steps in lost))
    return [*lost, *((SKIPPED, steps) for steps in others)]


def _without_damaged(run: Run, journal: Journal) -> list[Steps]:
    """Write a journal anew with the entries that hold, those behind the first damage, too; the steps of the others,
    and of what may have stood at the end.
    """
    path = unfinished(journal.path)
    anew, lost = Journal(path=path, span=journal.span), list[Steps]()
    names = {spec.name for spec in run.layout.arrays()}
    with opened(journal.path) as handle:
        entries = [*journal.entries, *_entries_behind(run, journal, handle)]
        for entry in sorted(entries, key=lambda entry: entry.start):
            if intact(handle, entry):
                append_entry(run, anew, entry.start, read_arrays(handle, journal, entry, run.layout, names))
            else:
                lost.append((entry.start, entry.stop))
        end = max((entry.place + entry.size for entry in entries), default=0)
        behind = -(-(os.fstat(handle).st_size - end) // entry_size(run.layout, run.layout.interval))
    if behind > 0:
        begin, stop = run.layout.span_of(journal.span)
        begin = max([begin, *(entry.stop for entry in entries)])
        lost.append((begin, min(stop, begin + behind * run.layout.interval)))
    if anew.entries:
        os.replace(path, journal_path(run.path, journal.span))
    else:
        journal.path.unlink()
    flush(journal.path.parent)
    return [steps for steps in lost if steps[0] < steps[1]]


def _entries_behind(run: Run, journal: Journal, handle: int) -> Iterator[Entry]:
    """Entries behind the first damage in ``journal`` that hold by themselves.

    Where one begins follows from the layout: all but that of the run's last interval are of one size. One that is not
    linked to an intact one before it, or is first and not linked to the run, is of another journal: it and all that
    follows are left. OSError where the disk refuses to read.
    """
    layout, size = run.layout, os.fstat(handle).st_size
    taken = set(journal.starts)
    link: bytes | None = first_link(run, journal.span)
    if journal.entries:
        link = _link_to(handle, journal.entries[-1])
    for place in range(journal.end, size, entry_size(layout, layout.interval)):
        fields, expected, link = header_at(handle, place), link, None
        if fields is None:
            continue
        _, start, stop, length, *_, previous, _ = fields
        if expected not in (None, previous):
            return
        of_span = start // layout.span_steps == journal.span and start not in taken
        if not of_span or start % layout.interval or stop != min(start + layout.interval, layout.steps):
            continue
        if length != entry_size(layout, stop - start) or not is_finished(handle, place, length, size):
            continue
        taken.add(start)
        entry = entry_of(handle, place, fields)
        link = _link_to(handle, entry)
        yield entry


def _link_to(handle: int, entry: Entry) -> bytes | None:
    """What the entry behind ``entry`` must be linked to; None where that is not known, for it is damaged."""
    return entry.digest if intact(handle, entry) else None
