"""Saves the intervals of a run: as chunks if an interval is a span, else in the journal of its span.

A journal becomes chunks when it is full.
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
    journal_path,
    problems_of,
    read_arrays,
    read_journals,
)
from ghoststore.store.run.journal_files import cut, opened, remove
from ghoststore.store.run.ranges import Steps, count, inside, merged, without
from ghoststore.store.run.skipped import write_skipped
from ghoststore.store.spans.commits import commit_path
from ghoststore.store.spans.soundness import refuse_damaged_spans
from ghoststore.store.spans.withdrawn import withdraw
from ghoststore.store.spans.writer import SpanData, write_span

if TYPE_CHECKING:
    from ghoststore.store.run.run import Run


class Saver:
    """The one writer of a run's spans and journals. While the background thread works, only that may use it.

    Memory: one span, while it is committed.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._layout = run.layout
        self._journals: dict[int, Journal] = {}
        self._skipped: list[Steps] = []

    def begin(self) -> None:
        """Continue with the journals of the run.

        The unfinished end of a journal is removed. A full journal becomes chunks. A journal whose span is committed and
        sound is removed. CorruptError if a journal or its span is damaged; StorageError if the disk refuses.
        """
        run, self._journals = self._run, {}
        with storage_errors(str(run.path)):
            for span, journal in read_journals(run).items():
                if commit_path(run.path, span).exists():
                    refuse_damaged_spans(run, [span])  # the journal would mend it
                    remove(journal.path)
                    continue
                for problem in problems_of(journal):  # read whole: no entry may be linked to a damaged one
                    raise journal.damaged(problem)
                cut(journal.path, journal.end)
                self._journals[span] = journal
        run.reload()
        self._skipped = list(run.skipped)
        for span in list(self._journals):
            self._commit_if_full(span)

    def save(self, target: Run, data: SpanData) -> None:
        """Commit one save interval; ``data.span`` is its number. StorageError if the disk refuses."""
        layout, number = self._layout, data.span
        start, stop = layout.interval_of(number)
        if layout.interval == layout.span_steps:
            write_span(target, data)
            self._unskip(start, stop)
            return
        span = start // layout.span_steps
        with storage_errors(f"steps {start} to {stop} of {target.path}"):
            journal = self._journals.setdefault(span, Journal(path=journal_path(target.path, span), span=span))
            if start in journal.starts:
                return
            append_entry(target, journal, start, data.arrays)
        self._unskip(start, stop)
        self._commit_if_full(span)

    def skip(self, ranges: Sequence[Steps]) -> None:
        """Give up the steps of ``ranges``, which are whole save intervals."""
        if self._layout.save_steps is None or not ranges:
            return
        self._write_skipped(merged([*self._skipped, *ranges]))
        for span in [span for span in self._journals if self._layout.span_of(span)[1] <= ranges[-1][1]]:
            self._commit_if_full(span, passed=True)

    def _unskip(self, start: int, stop: int) -> None:
        """Take steps off the list of skipped ones: a training that was restarted has made them after all."""
        if inside(self._skipped, (start, stop)):
            self._write_skipped(without(self._skipped, [(start, stop)]))

    def _write_skipped(self, skipped: list[Steps]) -> None:
        with storage_errors(str(self._run.path)):
            write_skipped(self._run.path, skipped)
        self._skipped = skipped

    def _commit_if_full(self, span: int, *, passed: bool = False) -> None:
        """Turn the journal of ``span`` into chunks and a record, if no more steps will come.

        That is so if its last interval is saved, or the training has ``passed`` it, and missing steps were given up.
        """
        run, journal, steps = self._run, self._journals[span], self._layout.span_of(span)
        if journal.length + count(inside(self._skipped, steps)) < steps[1] - steps[0]:
            return
        if not passed and not any(entry.stop == steps[1] for entry in journal.entries[-1:]):
            return  # steps that were given up may still come, interval by interval
        commit_journal(run, journal)
        del self._journals[span]


def commit_journal(run: Run, journal: Journal) -> None:
    """Make chunks and a record of a journal, and remove it. Steps that it lacks get no samples."""
    start, stop = run.layout.span_of(journal.span)
    specs = run.layout.arrays()
    arrays = {
        spec.name: np.full((spec.count(stop - start), *spec.columns), spec.fill, dtype=spec.dtype) for spec in specs
    }
    with storage_errors(str(journal.path)), opened(journal.path) as handle:
        for entry in journal.entries:
            saved = read_arrays(handle, journal, entry, run.layout, arrays.keys())
            for spec in specs:
                entries = slice(*spec.entries(entry.start - start, entry.stop - start))
                arrays[spec.name][entries] = saved[spec.name]
    write_span(run, SpanData(journal.span, arrays))
    # Only now: until the record exists, the journal is the committed data.
    with storage_errors(str(journal.path)):
        remove(journal.path)


def rebuild_from_journals(run: Run, spans: set[int]) -> list[int]:
    """Write damaged ``spans`` again from their journals, if these exist and lack only steps that were given up.

    Returns the spans that were written. The caller must be the run's one writer.
    """
    try:
        for spec in run.layout.arrays():
            run.check_file(f"{spec.name}/zarr.json")
    except CorruptError:
        return []  # spans cannot be written
    journals, rebuilt = read_journals(run), list[int]()
    for span in sorted(spans & journals.keys()):
        journal = journals[span]
        lacking = without([run.layout.span_of(span)], merged([*journal.steps, *run.skipped]))
        if not lacking and not problems_of(journal):
            with storage_errors(str(run.path)):
                withdraw(run, span)  # a kill after this leaves a full journal, so nothing is lost
            commit_journal(run, journal)
            rebuilt.append(span)
    return rebuilt
