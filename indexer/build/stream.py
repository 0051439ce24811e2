"""Building from a stream: each row is read once, in order, and how many there are is known at the end.

``docs/design/0026-streaming-corpora.md`` has the rules.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import numpy as np

from ghoststore.corpus import MAX_DOMAINS, Position, Sample, Scan
from ghoststore.corpus.repeated import RepeatedIds, repeated_words
from ghoststore.corpus.scan import Fingerprint
from ghoststore.corpus.stream import Block, Once, go_on, joined
from ghoststore.errors import BusyError, CorpusError, CorruptError, MismatchError
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from ghoststore.store import Part, Store
from ghoststore.store.base.manifest import OPEN, UNSEEN, as_begun, open_rows, refuse_differences
from ghoststore.store.base.own import remember
from ghoststore.store.info import describe
from ghoststore.store.part.kept import KeptField
from ghoststore.store.part.layout import STREAM
from ghoststore.store.part.part import SPAN_TABLE, create_part, span_table
from ghoststore.store.part.stream import (
    StreamEntry,
    end_stream,
    keep_states,
    kept_states,
    read_entry,
    stream_table,
    strings_of_span,
)
from ghoststore.store.spans.writer import BackgroundWriter, SpanData, write_span, writing
from indexer.build.corpus_plan import COLUMNS, CorpusPlan, LearningSample, SpanDigest
from indexer.build.estimate import report_of
from indexer.build.inputs import BuildInputs, open_inputs
from indexer.build.job import BuildJob, chosen_layers, job_of, layout_of
from indexer.build.kept_fields import KeptScan, refuse_misfits
from indexer.build.like import kept_like
from indexer.build.report import BUILDING, BuildReport
from indexer.build.spans import read_ahead, row_encoder, sealed_span
from indexer.encode.tokens import Row, rows_of

STATES_KEPT = 3
"""That behind the span before the last committed one, from which the build goes on, and those of spans that are being
written."""


def build_stream(options: BuildOptions, progress: Progress) -> BuildReport:
    """``ghoststore.build`` of a corpus that is read once, in order."""
    started = time.perf_counter()
    with ExitStack() as stack:
        inputs = stack.enter_context(open_inputs(options, progress))
        if (existing := inputs.existing) is not None and existing.layout.stream == OPEN:
            stack.enter_context(writing(existing))
            inputs = replace(inputs, existing=Part(existing.path))  # with what its last writer had decided
        samples = _Samples(inputs, progress)
        job = _planned(replace(inputs, head=samples), samples, progress)
        store = Store.create(options.store)
        part = create_part(store.part_path(inputs.part_name), job.manifest, None, job.fixed())
        refuse_differences(as_begun(part.recorded), job.manifest, f"part {part.name!r} of {store.path}")
        if part.complete:
            samples.refuse_another(part)
        if problem := remember(part.manifest, job.manifest["source"], part.path):
            progress.note(problem)
        if existing is None:
            stack.enter_context(writing(part))
            part = Part(part.path)
            if part.spans:
                raise BusyError(f"part {part.name!r} of {store.path} was begun by another process: run the build again")
        resumed, seconds = part.rows, {"compute": 0.0, "corpus": 0.0, "write": 0.0}
        if not part.complete:
            seconds = _compute(part, job, samples, progress)
            part = Part(part.path)
        if part.layout.stream == OPEN:
            _end(part, inputs, progress)
        built = Part(part.path)
        described = describe(built)
        return replace(
            report_of(replace(job, layout=built.layout)),
            tokens=described.tokens,
            resumed_rows=resumed,
            rows_built=built.rows - resumed,
            statuses=described.statuses,
            head=built.manifest["corpus"]["head"]["samples"],
            manifest=built.manifest,
            seconds={"total": time.perf_counter() - started, "learning": job.learning_seconds, **seconds},
        )


class _Samples:
    """The samples of a stream: those at its head, which are held until the projection is learned, and the others.

    Where a part exists, it goes on behind its committed spans, after it has made sure that the stream is the same.
    """

    def __init__(self, inputs: BuildInputs, progress: Progress) -> None:
        self._inputs, self._progress = inputs, progress
        self._options = inputs.options
        self._held: list[Block] = []
        """Blocks of one sample, not yet in a span."""
        self._again: list[Sample] = []
        """Samples of the last committed span, read again."""
        self._once: Once | None = None
        part = inputs.existing
        if part is not None:
            _refuse_gaps(part)
        self.goes_on = part is not None and bool(part.spans)
        if part is None or not part.spans:
            self._once = Once(inputs.corpus, skip=self._options.skip_samples, most=self._options.max_samples)
        elif not part.complete:
            self._once = self._found_again(part)

    def __iter__(self) -> Iterator[Sample]:
        """The samples at the head, for the check of the model; where the build goes on, those of the last span."""
        if self.goes_on:
            yield from self._again
            return
        place = 0
        while self._reach(place + 1):
            yield from self._held[place].samples
            place += 1

    def _reach(self, count: int) -> bool:
        """Hold ``count`` samples. Returns whether there are so many."""
        while len(self._held) < count and self._once is not None and not self._once.ended:
            self._held.append(self._once.take(1))
        return len(self._held) >= count

    def head(self, count: int) -> list[Sample]:
        """The first ``count`` samples, or all if there are fewer."""
        self._reach(count)
        return [sample for block in self._held[:count] for sample in block.samples]

    def spans(self, size: int) -> Iterator[Block]:
        """What is not committed, in blocks of ``size`` samples."""
        held, self._held = deque(self._held), []
        assert self._once is not None
        while held or not self._once.ended:
            inside = [held.popleft() for _ in range(min(size, len(held)))]
            if len(inside) < size and not self._once.ended:
                inside.append(self._once.take(size - len(inside)))
            yield joined(inside)

    def _found_again(self, part: Part) -> Once:
        """What follows the committed spans of ``part``. MismatchError if the stream is no longer that one."""
        corpus, last, size = self._inputs.corpus, part.seen_last, part.layout.span_rows
        assert last is not None
        most = self._options.max_samples
        left = None if most is None else most - (len(part.spans) - 1) * size
        state = kept_states(part).get(part.spans[-1] - 1)
        if go_on(corpus, last.start[0], state):
            once = Once(corpus, most=left, start=_position(last.start))
            if self._is_span(once, size, last):
                return once
            why = "its state does not lead back to the rows that came before (a shuffle buffer is not in it)"
            if corpus.stream_form is None:
                raise self._changed(part, part.spans[-1])
        else:
            why = "it has no state to go on with"
        go_on(corpus, 0, None)
        if len(part.spans) > 1:
            rows = f"its first {part.rows:,} rows are read again, and not computed again"
            self._progress.note(f"{corpus.source}: {why}: {rows}")
        once = Once(corpus, skip=self._options.skip_samples, most=most)
        for span in part.spans:
            if not self._is_span(once, size, read_entry(part, span)):
                raise self._changed(part, span)
        return once

    def refuse_another(self, part: Part) -> None:
        """MismatchError unless the stream begins with the first span of ``part``, which has all rows: no more is read,
        and one row ahead.
        """
        once = Once(self._inputs.corpus, skip=self._options.skip_samples, most=self._options.max_samples)
        first = [] if once.ended else once.take(part.layout.span_of(0)[1]).samples
        if _digest(first) != span_table(part)[0][-1]:
            raise self._changed(part, 0)

    def _is_span(self, once: Once, size: int, entry: StreamEntry) -> bool:
        """Whether the next samples are those of the committed span with this ``entry``."""
        if once.ended:
            return False
        block = once.take(size)
        self._again = block.samples
        same = len(block.samples) == size and block.next is not None
        return same and _digest(block.samples) == entry.digest

    def _changed(self, part: Part, span: int) -> MismatchError:
        rows = "rows {:,} to {:,}".format(*part.layout.span_of(span))
        return MismatchError(
            f"{self._inputs.corpus.source} is not the stream that part {part.name!r} of {self._options.store} was "
            f"begun with: {rows} (span {span}) are others now. Give the stream as it was (the same files, order and "
            "seed), or another `name` for a new part"
        )


def _refuse_gaps(part: Part) -> None:
    """CorruptError for a part that lacks spans of those that were committed once, as one whose copy was cut off."""
    if part.complete or (part.layout.stream == OPEN and part.spans == list(range(len(part.spans)))):
        return
    raise CorruptError(
        f"part {part.name!r} of {part.path.parent.parent} has {len(part.spans):,} spans, and not all that its stream "
        "had already: a build cannot go back to those. If a tool that copied it was cut off, let it go on; else "
        "remove the part (`ghoststore rm`) and build it again"
    )


def _position(place: tuple[int, int, int]) -> Position:
    source_row, file, offset = place
    return Position(source_row=source_row, file=file, offset=offset)


def _digest(samples: list[Sample]) -> int:
    digest = SpanDigest()
    for sample in samples:
        digest.add(sample)
    return digest.value()


def _planned(inputs: BuildInputs, samples: _Samples, progress: Progress) -> BuildJob:
    """The build, after the projection was learned from samples at the head of the stream."""
    plan, padding = chosen_layers(inputs, progress)
    size = layout_of(inputs, plan, sys.maxsize).span_rows
    learns = plan.calibrated and inputs.like is None
    learning, existing = LearningSample(plan.config.calibration_samples) if plan.calibrated else None, inputs.existing
    if existing is not None and samples.goes_on:
        head, fields = existing.manifest["corpus"]["head"], existing.layout.fields
    else:
        seen = samples.head(max(size, plan.config.calibration_samples if learns else 0))
        if not seen:
            raise CorpusError(
                f"{inputs.corpus.source}: has no rows beyond the first {inputs.options.skip_samples:,}, which "
                "`skip_samples` leaves out"
            )
        head, fields = _seen(inputs, seen, learning)
    layout = layout_of(inputs, plan, sys.maxsize, fields if inputs.like is None else kept_like(inputs.like, fields))
    corpus_plan = CorpusPlan(
        scan=Scan(rows=UNSEEN["samples"], fingerprint=UNSEEN["fingerprint"], domains=UNSEEN["domains"], text_bytes=0),
        rows=0,
        tokens=None,
        table=np.zeros((0, len(COLUMNS)), dtype=np.int64),
        before=np.zeros(0, dtype=np.int64),
        repeated_ids=UNSEEN["repeated_ids"],
        fields=fields,
        head=head,
    )
    layout = replace(layout, rows=open_rows(layout.span_rows), stream=OPEN)
    return job_of(inputs, plan, corpus_plan, layout, learning, progress, padding=padding)


def _seen(
    inputs: BuildInputs, seen: list[Sample], learning: LearningSample | None
) -> tuple[dict[str, object], tuple[KeptField, ...]]:
    """(what the manifest says of the samples at the head, the kept fields as they have them). ``learning`` sees them
    all.
    """
    fingerprint, kept = Fingerprint(), KeptScan(inputs.corpus)
    for sample in seen:
        fingerprint.add(sample.canonical())
        kept.see(sample)
        if learning is not None:
            learning.see(sample)
    none = f"none of the {len(seen):,} rows at the head of the stream, which settle the types of columns, has"
    return {"samples": len(seen), "fingerprint": fingerprint.text()}, kept.fields(none)


@dataclass(frozen=True, slots=True)
class _Span:
    """A span that is read and tokenized."""

    number: int
    rows: list[Row]
    entry: StreamEntry
    state: str | None


def _spans(part: Part, job: BuildJob, samples: _Samples) -> Iterator[_Span]:
    """What is not committed, read and tokenized."""
    inputs, size, last = job.inputs, part.layout.span_rows, part.seen_last
    fingerprint = Fingerprint(size, "" if last is None else last.fingerprint)
    domains = dict.fromkeys(() if last is None else last.domains)
    for number, block in enumerate(samples.spans(size), start=len(part.spans)):
        for sample in block.samples:
            inputs.tokenizer.check(sample)
            refuse_misfits(inputs.corpus.source, part.layout.fields, sample)
            fingerprint.add(sample.canonical())
            if sample.domain is not None and sample.domain not in domains:
                domains[sample.domain] = None
                if len(domains) > MAX_DOMAINS:
                    raise CorpusError(
                        f"{sample}: more than {MAX_DOMAINS:,} distinct domains (the last: {sample.domain!r:.80}): is "
                        "the field of `fields.domain` an id?"
                    )
        first, following = block.samples[0], block.next
        entry = StreamEntry(
            rows=number * size + len(block.samples),
            fingerprint=fingerprint.text(),
            digest=_digest(block.samples),
            start=(first.source_row, first.file, first.offset),
            domains=tuple(domains),
            next=None if following is None else (following.source_row, following.file, following.offset),
        )
        yield _Span(number, list(rows_of(block.samples, inputs.tokenizer, inputs.tokens)), entry, block.state)


def _compute(part: Part, job: BuildJob, samples: _Samples, progress: Progress) -> dict[str, float]:
    """Compute and commit what the stream still gives. Returns seconds by kind of work."""
    seconds = {"compute": 0.0, "corpus": 0.0}
    states, by_span = kept_states(part), dict[int, dict[int, str]]()

    def write(part: Part, data: SpanData) -> None:
        """Commit a span, after the state behind it was kept beside those of the two before it."""
        if kept := by_span.pop(data.span):
            keep_states(part, kept)
        write_span(part, data)

    task = progress.task(BUILDING, job.inputs.options.max_samples, done=part.rows)
    with closing(task), row_encoder(job) as encoder, BackgroundWriter(part, write) as writer:
        waited = time.perf_counter()
        for span in read_ahead(_spans(part, job, samples)):
            started = time.perf_counter()
            seconds["corpus"] += started - waited
            entry = span.entry
            if span.state is not None:
                states[span.number] = span.state
            states = {number: state for number, state in states.items() if number > span.number - STATES_KEPT}
            by_span[span.number] = states
            part.grow(entry.rows)  # the last span may be shorter
            arrays = sealed_span(encoder, span.rows, part, job.inputs.batch_tokens, task, entry.domains)
            arrays[STREAM] = np.array([entry.to_text()], dtype=object)
            waited = time.perf_counter()
            seconds["compute"] += waited - started
            writer.put(SpanData(span.number, arrays))
    return {**seconds, "write": writer.seconds}


def _end(part: Part, inputs: BuildInputs, progress: Progress) -> None:
    """Make an ordinary part of ``part``, whose stream ended. A note counts ids that several samples share."""
    ids = None if inputs.corpus.resolved.id is None else RepeatedIds()
    for span in part.spans if ids is not None else ():
        for name in strings_of_span(part, "sample_id", span):
            assert ids is not None
            ids.add(str(name))
    repeated = None if ids is None else ids.count()
    if words := repeated_words(repeated):
        progress.note(f"{inputs.corpus.source}: {words}")
    end_stream(part, {"repeated_ids": repeated}, {SPAN_TABLE: stream_table(part)})
