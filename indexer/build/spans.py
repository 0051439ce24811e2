"""Computing the spans of a part in a pipeline: one thread reads and tokenizes the next span, the main thread computes,
and another thread writes and commits the last one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
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
    part: Part,
    job: BuildJob,
    progress: Progress,
    only: Collection[int] | None = None,
    verb: str = BUILDING,
    *,
    kept: KeptEncoder | None = None,
) -> dict[str, float]:
    """Compute and commit every span without a record; with ``only``, only those of them. Returns seconds by kind of
    work. ``verb`` begins the line of progress; ``kept`` is an encoder that outlives the call.
    """
    missing = sorted(set(range(part.layout.spans) if only is None else only) - set(part.spans))
    seconds = {"compute": 0.0, "corpus": 0.0, "write": 0.0}
    if not missing:
        return seconds
    if only is None:
        task = progress.task(verb, part.layout.rows, done=part.rows)
    else:
        task = progress.task(verb, sum(stop - start for start, stop in map(part.layout.span_of, missing)))
    inputs, sizes = job.inputs, [stop - start for start, stop in map(part.layout.span_of, range(part.layout.spans))]
    spans = rows_of_spans(inputs.corpus, inputs.tokenizer, inputs.tokens, job.plan, sizes, missing)
    with closing(task), ExitStack() as stack, BackgroundWriter(part) as writer:
        encoder = (kept or stack.enter_context(KeptEncoder(job))).get()
        waited = time.perf_counter()
        for span, rows in read_ahead(spans):
            started = time.perf_counter()
            seconds["corpus"] += started - waited
            arrays = sealed_span(encoder, rows, part, job.inputs.batch_tokens, task)
            waited = time.perf_counter()
            seconds["compute"] += waited - started
            writer.put(SpanData(span, arrays))
    return {**seconds, "write": writer.seconds}


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


def read_ahead(spans: Iterator[T]) -> Iterator[T]:
    """``spans``, each read and tokenized by a thread while the caller computes the one before."""
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
