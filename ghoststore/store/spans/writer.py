"""Writing the spans of a part or a run, in the background, each committed only when it is on the disk."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ghoststore.errors import BusyError
from ghoststore.store.base.disk import exclusive, flush, storage_errors, sweep
from ghoststore.store.spans.commits import Commit, write_commit
from ghoststore.store.spans.group import Spanned


@contextmanager
def writing(target: Spanned[Any]) -> Iterator[None]:
    """Hold a part or a run against other writers on this machine; BusyError if one is at work."""
    with exclusive(target.path, f"{target.kind.name} {target.name!r}"):
        with storage_errors(str(target.path)):
            sweep(target.path)
        yield


@dataclass(frozen=True, slots=True)
class SpanData:
    """All rows (or steps) of one span: ``arrays`` by name, in stored dtypes."""

    span: int
    arrays: Mapping[str, NDArray[Any]]


def write_span(target: Spanned[Any], data: SpanData) -> None:
    """Write one span: chunks, flush, record. BusyError if another process committed it meanwhile."""
    layout = target.layout
    start, stop = layout.span_of(data.span)
    keys: list[str] = []
    with storage_errors(f"span {data.span} of {target.path}"):
        folders: set[Path] = set()
        for spec in layout.arrays():
            values = data.arrays[spec.name]
            assert len(values) == stop - start, spec.name
            # Empty chunks, too: what a record names must be there.
            array = zarr.open_array(target.path / spec.name, mode="r+").with_config({"write_empty_chunks": True})
            array[start:stop] = values
            for key in layout.chunk_keys(spec, data.span):
                path = target.path / key
                flush(path)
                folders.update(folder for folder in path.parents if folder.is_relative_to(target.path / spec.name))
                keys.append(key)
        # Bytes, then their names in the folders, then the record: after a crash no record names what is not there.
        for folder in folders:
            flush(folder)
        statuses, tokens = target.summarize(data.arrays)
        commit = Commit(span=data.span, start=start, stop=stop, statuses=statuses, tokens=tokens)
        if not write_commit(target.path, commit, keys):
            raise BusyError(f"span {data.span} of {target.path} was committed by another process")


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
