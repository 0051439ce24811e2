"""Writes the spans of a part or a run in the background. Each is committed only when it is on the disk."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from ghoststore.errors import BusyError
from ghoststore.store.base.disk import exclusive, storage_errors, sweep
from ghoststore.store.base.opening import refuse_links
from ghoststore.store.spans.commits import Commit
from ghoststore.store.spans.committing import commit_span, settle
from ghoststore.store.spans.group import Spanned


@contextmanager
def writing(target: Spanned[Any], parameter: str | None = "name", *, shared: bool = False) -> Iterator[None]:
    """Keep other writers out of a part or a run while the block runs. BusyError if there is one.

    With ``shared`` other shared writers are let be: the commit of a span needs no lock, see
    :mod:`ghoststore.store.spans.committing`.

    ``parameter`` names the parameter by which to choose another target, None if there is none. Spans that an earlier
    writer had decided are committed, and its leftovers removed; ``target``, opened before, does not see them.
    """

    def files(span: int) -> list[str]:
        return target.layout.span_keys(span) if span < target.layout.spans else []

    refuse_links(target.path)
    with exclusive(target.path, f"{target.kind.name} {target.name!r}", parameter, shared=shared):
        with storage_errors(str(target.path)):
            settle(target.path, files)  # before sweep() would remove their staged files
            sweep(target.path)
        yield


@dataclass(frozen=True, slots=True)
class SpanData:
    """All rows (or steps) of one span: ``arrays`` by name, in stored dtypes."""

    span: int
    arrays: Mapping[str, NDArray[Any]]


def write_span(target: Spanned[Any], data: SpanData) -> None:
    """Write one span and commit it.

    If another process committed the span meanwhile, the same content is accepted, and another is a BusyError.
    """
    start, stop = target.layout.span_of(data.span)
    with storage_errors(f"span {data.span} of {target.path}"):
        statuses, tokens = target.summarize(data.arrays)
        commit = Commit(span=data.span, start=start, stop=stop, statuses=statuses, tokens=tokens)
        if not commit_span(target.path, commit, _encoded(target, data)):
            raise BusyError(
                f"span {data.span} of {target.path} was committed by another process, with other content; what it "
                "wrote stands. Run again when it has ended"
            )


def _encoded(target: Spanned[Any], data: SpanData) -> Iterator[tuple[str, memoryview]]:
    """(path, bytes) of each chunk of a span, as Zarr encodes them: one in memory at a time."""
    for spec in target.layout.arrays():
        start, stop = spec.entries(*target.layout.span_of(data.span))
        values = data.arrays[spec.name]
        assert len(values) == stop - start, spec.name
        files = {"zarr.json": _buffer(target.array_metadata(spec.name))}
        # Empty chunks are written, too: the record names them.
        array = zarr.open_array(MemoryStore(files), mode="r+").with_config({"write_empty_chunks": True})
        for key in target.layout.chunk_keys(spec, data.span):
            first = max(start, int(key.split("/")[2]) * spec.chunk_rows)
            last = min(stop, first + spec.chunk_rows)
            array[first:last] = values[first - start : last - start]
            yield key, files.pop(key.removeprefix(f"{spec.name}/")).as_numpy_array().data


def _buffer(data: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(data)


class BackgroundWriter:
    """Writes spans in a thread of its own while the caller computes the next; at most one waits.

    ``with BackgroundWriter(target) as writer: writer.put(span_data)``. An error of the thread is raised by the
    next :meth:`put`, :meth:`wait` or :meth:`check`, or at the end of the block; ``failed`` is called at once, by the
    thread.
    """

    def __init__(
        self,
        target: Spanned[Any],
        write: Callable[[Any, SpanData], None] = write_span,
        failed: Callable[[], None] | None = None,
    ) -> None:
        self.target = target
        self.seconds = 0.0
        """Seconds spent writing in the background."""
        self.bytes = 0
        self._save, self._failed = write, failed
        self._queue: queue.Queue[SpanData | Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ghoststore-writer", daemon=True)

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self.check()

    def put(self, data: SpanData) -> None:
        """Hand over a span. Blocks while one is being written and another waits."""
        self.check()
        self._queue.put(data)

    def then(self, call: Callable[[], None]) -> None:
        """Have the thread call ``call`` when every span that was handed over is committed, or never."""
        self.check()
        self._queue.put(call)

    def wait(self) -> None:
        """Return when every span that was handed over is committed."""
        self._queue.join()
        self.check()

    def check(self) -> None:
        """Raise the error of the thread, if there was one. Spans handed over since are not written."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is None:
                if isinstance(data, SpanData):
                    self._write(data)
                else:
                    data()
            self._queue.task_done()

    def _write(self, data: SpanData) -> None:
        started = time.perf_counter()
        try:
            self._save(self.target, data)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, which raises it
            self._error = error
            if self._failed is not None:
                self._failed()
        self.seconds += time.perf_counter() - started
        self.bytes += sum(v.nbytes for v in data.arrays.values() if isinstance(v, np.ndarray) and v.dtype != object)
