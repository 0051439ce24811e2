"""Computing the spans of a part in a pipeline: one thread reads and tokenizes the next span, the main thread computes,
and another thread writes and commits the last one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Progress, Task
from ghoststore.store import Part
from ghoststore.store.part.kept import stored_fields
from ghoststore.store.part.sealing import seal_vectors
from ghoststore.store.spans.writer import BackgroundWriter, SpanData
from indexer.build.corpus_plan import rows_of_spans, sample_columns
from indexer.build.job import BuildJob
from indexer.build.report import BUILDING
from indexer.encode.encoder import RowEncoder, encode_rows
from indexer.encode.tokens import Row

T = TypeVar("T")


class KeptEncoder:
    """What encodes the rows of a build, made when it is first asked for and kept to the end of the block.

    Making one costs: its first batch is checked against autograd. A worker that gets its spans list by list keeps one.
    """

    def __init__(self, job: BuildJob) -> None:
        self._job = job
        self._made: RowEncoder | None = None
        self._stack = ExitStack()

    def __enter__(self) -> KeptEncoder:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def get(self) -> RowEncoder:
        """It."""
        if self._made is None:
            self._made = self._stack.enter_context(row_encoder(self._job))
        return self._made


def compute_spans(
    part: Part, job: BuildJob, progress: Progress, only: Collection[int] | None = None, verb: str = BUILDING
) -> dict[str, float]:
    """Compute and commit every span without a record; with ``only``, only those of them. Returns seconds by kind of
    work. ``verb`` begins the line of progress.
    """
    missing = _missing(part, range(part.layout.spans) if only is None else only)
    seconds = {"compute": 0.0, "corpus": 0.0, "write": 0.0}
    if not missing:
        return seconds
    if only is None:
        task = progress.task(verb, part.layout.rows, done=part.rows)
    else:
        task = progress.task(verb, sum(_sizes(part, missing)))
    with closing(task), KeptEncoder(job) as kept, BackgroundWriter(part) as writer:
        encoder = kept.get()
        waited = time.perf_counter()
        for span, rows in read_ahead(_rows_of(part, job, missing)):
            started = time.perf_counter()
            seconds["corpus"] += started - waited
            arrays = sealed_span(encoder, rows, part, job.inputs.batch_tokens, task)
            waited = time.perf_counter()
            seconds["compute"] += waited - started
            writer.put(SpanData(span, arrays))
    return {**seconds, "write": writer.seconds}


def compute_lists(
    part: Part,
    job: BuildJob,
    progress: Progress,
    lists: Iterator[Sequence[int]],
    *,
    kept: KeptEncoder,
    done: Callable[[], None],
    wake: Callable[[], None],
) -> None:
    """Compute and commit the spans of each of ``lists``, one after the other, those with a record aside; ``done`` is
    called, by another thread, when all of a list are committed.

    A list is asked for, and read and tokenized, while the one before is computed and written. ``lists`` may wait for
    the next; ``wake``, which any thread may call, must end that: none is wanted any more. Each list has a bar of
    progress.
    """

    def read() -> Iterator[tuple[Task, int, Sequence[Row] | None]]:
        for spans in lists:
            missing = _missing(Part(part.path), spans)
            task = progress.task(BUILDING, sum(_sizes(part, missing)))
            for span, rows in _rows_of(part, job, missing):
                yield task, span, rows
            yield task, -1, None

    with BackgroundWriter(part, failed=wake) as writer:
        for task, span, rows in read_ahead(read(), wake):
            if rows is not None:
                writer.put(SpanData(span, sealed_span(kept.get(), rows, part, job.inputs.batch_tokens, task)))
            else:
                task.close()
                writer.then(done)


def _missing(part: Part, spans: Iterable[int]) -> list[int]:
    """Those of ``spans`` that are not committed, ascending."""
    return sorted(set(spans) - set(part.spans))


def _sizes(part: Part, spans: Iterable[int]) -> list[int]:
    """Rows of each."""
    return [stop - start for start, stop in map(part.layout.span_of, spans)]


def _rows_of(part: Part, job: BuildJob, spans: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
    inputs, sizes = job.inputs, _sizes(part, range(part.layout.spans))
    return rows_of_spans(inputs.corpus, inputs.tokenizer, inputs.tokens, job.plan, sizes, spans)


def row_encoder(job: BuildJob) -> RowEncoder:
    """What encodes the rows of a build."""
    assert job.projection is not None
    options = job.inputs.options
    return RowEncoder(
        job.inputs.model,
        job.projection,
        reduction=options.loss_reduction,
        checkpointing=options.gradient_checkpointing,
        padding=job.padding,
    )


def read_ahead(spans: Iterator[T], wake: Callable[[], None] | None = None) -> Iterator[T]:
    """``spans``, each read and tokenized by a thread while the caller computes the one before. Where they may be waited
    for, ``wake`` ends that: it is called if the caller wants no more.
    """
    # One span in the queue is enough, because reading is faster than computing; more would only take memory.
    ready: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: T | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in spans:
                put(item)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - passed to the caller, which raises it
            put(error)

    thread = threading.Thread(target=read, name="ghoststore-tokenizer", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        if wake is not None:
            wake()
        thread.join()


def sealed_span(
    encoder: RowEncoder,
    rows: Sequence[Row],
    part: Part,
    batch_tokens: int,
    task: Task,
    domains: Sequence[str] | None = None,
) -> dict[str, NDArray[Any]]:
    """The arrays of a span of ``rows``. ``domains`` are those of the rows, by default those of the part."""
    arrays = span_arrays(rows, part, domains)
    encoded = encode_rows(encoder, rows, batch_tokens, task)
    arrays["loss"] = encoded.losses.numpy()
    seal_vectors(arrays, encoded.vectors.numpy(), part)
    return arrays


def span_arrays(rows: Sequence[Row], part: Part, domains: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a span, except ``loss`` and those of its vectors."""
    status = np.array([row.status for row in rows], dtype=np.uint8)
    kept = stored_fields(part.layout.fields, [row.sample.kept for row in rows])
    arrays = {**sample_columns(rows, part.domains if domains is None else domains), "status": status, **kept}
    if part.layout.store_text:
        arrays["text"] = np.array([row.sample.preview() for row in rows], dtype=object)
    return arrays
