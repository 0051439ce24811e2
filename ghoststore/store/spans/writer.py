"""Writing the spans of a part or a run, in the background, each committed only when it is on the disk."""

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
def writing(target: Spanned[Any]) -> Iterator[None]:
    """Hold a part or a run against other writers; BusyError if one is at work.

    What a writer before had decided is committed, and what else it left is removed: ``target`` was opened before that.
    """

    def files(span: int) -> list[str]:
        return target.layout.span_keys(span) if span < target.layout.spans else []

    refuse_links(target.path)
    with exclusive(target.path, f"{target.kind.name} {target.name!r}"):
        with storage_errors(str(target.path)):
            settle(target.path, files)  # before its staged files are taken for nobody's
            sweep(target.path)
        yield


@dataclass(frozen=True, slots=True)
class SpanData:
    """All rows (or steps) of one span: ``arrays`` by name, in stored dtypes."""

    span: int
    arrays: Mapping[str, NDArray[Any]]


def write_span(target: Spanned[Any], data: SpanData) -> None:
    """Write one span and commit it. One that another process committed meanwhile with the same content is as good;
    BusyError for another content.
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
        held = {"zarr.json": _buffer((target.path / spec.name / "zarr.json").read_bytes())}
        target.check_file(f"{spec.name}/zarr.json")
        # Empty chunks, too: what a record names must be there.
        array = zarr.open_array(MemoryStore(held), mode="r+").with_config({"write_empty_chunks": True})
        for key in target.layout.chunk_keys(spec, data.span):
            first = max(start, int(key.split("/")[2]) * spec.chunk_rows)
            last = min(stop, first + spec.chunk_rows)
            array[first:last] = values[first - start : last - start]
            yield key, held.pop(key.removeprefix(f"{spec.name}/")).as_numpy_array().data


def _buffer(data: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(data)


class BackgroundWriter:
    """Writes spans in a thread of its own while the next batch computes; at most one waits its turn.

    ``with BackgroundWriter(target) as writer: writer.put(span_data)``. An error of the thread is raised by the
    next :meth:`put`, :meth:`wait` or :meth:`check`, or at the end of the block.
    """

    def __init__(self, target: Spanned[Any], write: Callable[[Any, SpanData], None] = write_span) -> None:
        self.target = target
        self.seconds = 0.0
        """Time spent writing, in the background."""
        self.bytes = 0
        self._save = write
        self._queue: queue.Queue[SpanData | None] = queue.Queue(maxsize=1)
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
        """Hand a span over; blocks while one is being written and another waits."""
        self.check()
        self._queue.put(data)

    def wait(self) -> None:
        """Return when every span that was handed over is committed."""
        self._queue.join()
        self.check()

    def check(self) -> None:
        """Raise the error of the thread, if there was one: what was handed over since is not written."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is None:
                self._write(data)
            self._queue.task_done()

    def _write(self, data: SpanData) -> None:
        begun = time.perf_counter()
        try:
            self._save(self.target, data)
        except BaseException as error:  # noqa: BLE001 - carried to the caller, which raises it
            self._error = error
        self.seconds += time.perf_counter() - begun
        self.bytes += sum(v.nbytes for v in data.arrays.values() if isinstance(v, np.ndarray) and v.dtype != object)
