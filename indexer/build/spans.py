"""Computing the spans of a part in a pipeline: one thread reads and tokenizes the next span, the main thread computes,
and another thread writes and commits the last one.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.progress import Progress
from ghoststore.store import Part
from ghoststore.store.part.kept import stored_fields
from ghoststore.store.part.sealing import seal_vectors
from ghoststore.store.spans.writer import BackgroundWriter, SpanData
from indexer.build.corpus_plan import rows_of_spans, sample_columns
from indexer.build.job import BuildJob
from indexer.build.report import BUILDING
from indexer.encode.encoder import RowEncoder, encode_rows
from indexer.encode.tokens import Row


def compute_spans(
    part: Part, job: BuildJob, progress: Progress, only: Collection[int] | None = None, verb: str = BUILDING
) -> dict[str, float]:
    """Compute and commit every span without a record; with ``only``, only those of them. Returns seconds by kind of
    work. ``verb`` begins the line of progress.
    """
    missing = sorted(set(range(part.layout.spans) if only is None else only) - set(part.spans))
    seconds = {"compute": 0.0, "corpus": 0.0, "write": 0.0}
    if not missing:
        return seconds
    assert job.projection is not None
    options = job.inputs.options
    encoder = RowEncoder(
        job.inputs.model,
        job.projection,
        reduction=options.loss_reduction,
        checkpointing=options.gradient_checkpointing,
        padding=job.padding,
    )
    if only is None:
        task = progress.task(verb, part.layout.rows, done=part.rows)
    else:
        task = progress.task(verb, sum(stop - start for start, stop in map(part.layout.span_of, missing)))
    with closing(task), encoder, BackgroundWriter(part) as writer:
        waited = time.perf_counter()
        for span, rows in _read_ahead(job, part, missing):
            started = time.perf_counter()
            seconds["corpus"] += started - waited
            arrays = span_arrays(rows, part)
            encoded = encode_rows(encoder, rows, job.inputs.batch_tokens, task)
            arrays["loss"] = encoded.losses.numpy()
            seal_vectors(arrays, encoded.vectors.numpy(), part)
            waited = time.perf_counter()
            seconds["compute"] += waited - started
            writer.put(SpanData(span, arrays))
    return {**seconds, "write": writer.seconds}


def _read_ahead(job: BuildJob, part: Part, spans: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
    """(span, its rows) for each of ``spans``, read and tokenized by a thread while the caller computes."""
    inputs, layout = job.inputs, part.layout
    sizes = [stop - start for start, stop in map(layout.span_of, range(layout.spans))]
    # One span in the queue is enough, because reading is faster than computing; more would only take memory.
    ready: queue.Queue[tuple[int, list[Row]] | BaseException | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def put(item: tuple[int, list[Row]] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for item in rows_of_spans(inputs.corpus, inputs.tokenizer, inputs.tokens, job.plan, sizes, spans):
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


def span_arrays(rows: Sequence[Row], part: Part) -> dict[str, NDArray[Any]]:
    """The arrays of a span, except ``loss`` and those of its vectors."""
    status = np.array([row.status for row in rows], dtype=np.uint8)
    kept = stored_fields(part.layout.fields, [row.sample.kept for row in rows])
    arrays = {**sample_columns(rows, part.domains), "status": status, **kept}
    if part.layout.store_text:
        arrays["text"] = np.array([row.sample.preview() for row in rows], dtype=object)
    return arrays
