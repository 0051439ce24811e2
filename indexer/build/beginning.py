"""Which of several workers begins a part: it plans it, learns the projection and makes it, and the others wait.

A claim saves work and guards nothing: a part appears whole, and of two that come to be made the first stands.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError, GhostStoreError, StorageError
from ghoststore.processes import is_gone, this_process
from ghoststore.progress import Progress
from ghoststore.store import Store
from ghoststore.store.base.disk import exclusive, storage_errors
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.writers import FORGOTTEN_SECONDS, TOUCH_SECONDS, living, make_folder, own_id, touched

PAUSE, PAUSE_OF_OBJECTS = 0.2, 1.0
"""Seconds between two looks whether the part is there."""


def begin(store: Store, name: str, progress: Progress, meanwhile: Callable[[], None]) -> ExitStack:
    """Wait until the part ``name`` exists, or until this process may begin it. Close what is returned once it exists.
    ``meanwhile`` is called if there is something to wait for.

    The claim lies beside the part, called as what is unfinished is.
    """
    part = store.part_path(name)
    place = part.with_name(f".{name}.begin.tmp")
    claim: _Folder | _Object = _Object(place) if isinstance(place, ObjectPath) else _Folder(place)
    said = waited = False
    while not part.exists():
        stack = ExitStack()
        try:
            stack.enter_context(claim.taken(name))
        except BusyError:
            other = claim.other()
            if not said and other:
                progress.note(f"waiting for the worker that begins part {name!r}: {other}")
                said = True
            if waited:
                time.sleep(claim.pause)
            else:
                waited = True
                meanwhile()
            continue
        if not part.exists():
            return stack
        stack.close()
    return ExitStack()


class _Folder:
    """A folder with the record of a living writer in it, see :mod:`ghoststore.store.base.writers`."""

    pause = PAUSE

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Hold it while the block runs. BusyError if another process does."""
        with storage_errors(str(self._folder)):
            make_folder(self._folder)
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(exclusive(self._folder, f"part {name!r}", None))
                except StorageError as error:
                    # Not by whether it is there: a third one may have made it again by now.
                    if not isinstance(error.__cause__, FileNotFoundError):
                        raise
                    raise BusyError("its last owner has just removed it") from None
                with touched(self._folder):
                    yield
        finally:
            with suppress(OSError):
                self._folder.rmdir()  # unless the record of another is in it

    def other(self) -> str | None:
        """Who holds it."""
        return next(map(str, living(self._folder)), None)


class _Object:
    """An object that its owner writes again from time to time. One that has not changed for ten minutes, by the clock
    of the process that waits, or whose owner ended on this machine, is removed.
    """

    pause = PAUSE_OF_OBJECTS

    def __init__(self, path: ObjectPath) -> None:
        self._path = path
        self._seen = b""
        self._since = time.monotonic()

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Hold it while the block runs. BusyError if another process does."""
        value = {**this_process(), "id": own_id()}
        with storage_errors(str(self._path)):
            if not self._path.create(json.dumps(value).encode()):
                raise BusyError(f"another process begins part {name!r}")
        stop = threading.Event()

        def touch() -> None:
            times = 0
            while not stop.wait(TOUCH_SECONDS):
                times += 1
                with suppress(OSError, GhostStoreError):  # the work itself meets any error of the store
                    self._path.write_bytes(json.dumps({**value, "times": times}).encode())

        thread = threading.Thread(target=touch, name="ghoststore-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()  # so that it does not write again what is removed now
            with suppress(OSError, GhostStoreError):
                self._path.unlink(missing_ok=True)

    def other(self) -> str | None:
        """Who holds it; None if nobody does any more."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        if data != self._seen:
            self._seen, self._since = data, time.monotonic()
        owner: dict[str, Any] = {}
        with suppress(ValueError):
            owner = json.loads(data)
        ended = {"host", "boot", "processes", "pid", "start"} <= owner.keys() and is_gone(owner)
        if ended or time.monotonic() - self._since >= FORGOTTEN_SECONDS:
            with storage_errors(str(self._path)):
                self._path.unlink(missing_ok=True)
            return None
        return f"process {owner.get('pid')} on {owner.get('host')}"
