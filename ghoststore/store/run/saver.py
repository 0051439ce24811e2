"""What makes save intervals of a run durable: chunks where an interval is a span, else the journal of its span, which
becomes chunks when it is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ghoststore.errors import CorruptError
from ghoststore.store.base.disk import storage_errors
from ghoststore.store.run.journal import (
    Journal,
    append_entry,
    cut,
    journal_path,
    opened,
    problems_of,
    read_arrays,
    read_journals,
    remove,
)
from ghoststore.store.run.ranges import Steps, count, inside, merged, without
from ghoststore.store.run.skipped import write_skipped
from ghoststore.store.spans.commits import commit_path
from ghoststore.store.spans.soundness import refuse_damaged_spans
from ghoststore.store.spans.withdrawn import withdraw
from ghoststore.store.spans.writer import SpanData, write_span

if TYPE_CHECKING:
    from ghoststore.store.run.run import Run


class Saver:
    """The one writer of a run's spans and journals; its thread's alone while that works.

    Memory: a span, while it is committed.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._layout = run.layout
        self._journals: dict[int, Journal] = {}
        self._skipped: list[Steps] = []

    def begin(self) -> None:
        """Take up what is there: the unfinished end of a journal is removed, one that is full becomes chunks, and one
        whose span is committed, and sound, goes. CorruptError if one is damaged, or its span is; StorageError if the
        disk refuses.
        """
        run, self._journals = self._run, {}
        with storage_errors(str(run.path)):
            for span, journal in read_journals(run).items():
                if commit_path(run.path, span).exists():
                    refuse_damaged_spans(run, [span])  # the journal would mend it
                    remove(journal)
                    continue
                for problem in problems_of(journal):  # whole: nothing is linked to an entry that is damaged
                    raise journal.damaged(problem)
                cut(journal)
                self._journals[span] = journal
        run.reload()
        self._skipped = list(run.skipped)
        for span in list(self._journals):
            self._commit_if_full(span)

    def save(self, target: Run, data: SpanData) -> None:
        """Commit one save interval (its number stands where that of a span does). StorageError if the disk refuses."""
        layout, number = self._layout, data.span
        start, stop = layout.interval_of(number)
        if layout.interval == layout.span_steps:
            write_span(target, data)
            self._come(start, stop)
            return
        span = start // layout.span_steps
        with storage_errors(f"steps {start} to {stop} of {target.path}"):
            journal = self._journals.setdefault(span, Journal(path=journal_path(target.path, span), span=span))
            if start in journal.starts:
                return
            append_entry(target, journal, start, data.arrays)
        self._come(start, stop)
        self._commit_if_full(span)

    def skip(self, ranges: Sequence[Steps]) -> None:
        """Say that the steps of ``ranges``, whole save intervals, will not come."""
        if self._layout.save_steps is None or not ranges:
            return
        self._say(merged([*self._skipped, *ranges]))
        for span in [span for span in self._journals if self._layout.span_of(span)[1] <= ranges[-1][1]]:
            self._commit_if_full(span, passed=True)

    def _come(self, start: int, stop: int) -> None:
        """Steps that were given up have come after all, after a training began anew."""
        if inside(self._skipped, (start, stop)):
            self._say(without(self._skipped, [(start, stop)]))

    def _say(self, skipped: list[Steps]) -> None:
        with storage_errors(str(self._run.path)):
            write_skipped(self._run.path, skipped)
        self._skipped = skipped

    def _commit_if_full(self, span: int, *, passed: bool = False) -> None:
        """Turn the journal of ``span`` into chunks and a record, once nothing more will come to it: its last interval
        is there, or it was ``passed``, and what lacks was given up.
        """
        run, journal, steps = self._run, self._journals[span], self._layout.span_of(span)
        if journal.length + count(inside(self._skipped, steps)) < steps[1] - steps[0]:
            return
        if not passed and not any(entry.stop == steps[1] for entry in journal.entries[-1:]):
            return  # steps that were given up may be coming after all, one interval after the other
        commit_journal(run, journal)
        del self._journals[span]


def commit_journal(run: Run, journal: Journal) -> None:
    """Make chunks and a record of a journal, and remove it. Steps that it lacks have no samples."""
    start, stop = run.layout.span_of(journal.span)
    specs = run.layout.arrays()
    arrays = {
        spec.name: np.full((spec.count(stop - start), *spec.columns), spec.fill, dtype=spec.dtype) for spec in specs
    }
    with storage_errors(str(journal.path)), opened(journal.path) as handle:
        for entry in journal.entries:
            read = read_arrays(handle, journal, entry, run.layout, arrays.keys())
            for spec in specs:
                place = slice(*spec.entries(entry.start - start, entry.stop - start))
                arrays[spec.name][place] = read[spec.name]
    write_span(run, SpanData(journal.span, arrays))
    # Only now: until the record is there, the journal is what was committed.
    with storage_errors(str(journal.path)):
        remove(journal)


def rebuild_from_journals(run: Run, spans: set[int]) -> list[int]:
    """Those of the damaged ``spans`` that were written again, from their journals: each was still there, and has every
    step of its span that was not given up. The caller is the run's one writer.
    """
    try:
        for spec in run.layout.arrays():
            run.check_file(f"{spec.name}/zarr.json")
    except CorruptError:
        return []  # nothing can be written
    journals, rebuilt = read_journals(run), list[int]()
    for span in sorted(spans & journals.keys()):
        journal = journals[span]
        lacking = without([run.layout.span_of(span)], merged([*journal.steps, *run.skipped]))
        if not lacking and not problems_of(journal):
            with storage_errors(str(run.path)):
                withdraw(run, span)  # a kill after this leaves a full journal: nothing is lost
            commit_journal(run, journal)
            rebuilt.append(span)
    return rebuilt
