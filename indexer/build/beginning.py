"""Which of several workers begins a part: it plans it, learns the projection and makes it, and the others wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ghoststore.errors import BusyError, StorageError
from ghoststore.progress import Progress
from ghoststore.store import Store
from ghoststore.store.base.disk import exclusive, storage_errors
from ghoststore.store.base.writers import living, touched

PAUSE = 0.2
"""Seconds between two looks whether the part is there."""


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    try:
        with exclusive(folder, f"part {name!r}", None), touched(folder):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # unless the record of another is in it


def begin(store: Store, name: str, progress: Progress) -> ExitStack:
    """Wait until the part ``name`` exists, or until this process may begin it. Close what is returned once it exists.

    The claim is a folder beside the part, called as unfinished folders are: with the record of a living writer in it,
    see :mod:`ghoststore.store.base.writers`. It saves work and guards nothing: a part appears whole, and of two that
    come to be made the first stands.
    """
    part = store.part_path(name)
    folder = part.with_name(f".{name}.begin.tmp")
    said = False
    while not part.exists():
        with storage_errors(str(folder)):
            folder.mkdir(exist_ok=True)
        stack = ExitStack()
        try:
            stack.enter_context(_alone(folder, name))
        except StorageError:
            if folder.exists():
                raise
            continue  # its last owner has just removed it
        except BusyError:
            others = living(folder)
            if not said and others:
                progress.note(f"waiting for the worker that begins part {name!r}: {others[0]}")
                said = True
            time.sleep(PAUSE)
            continue
        if not part.exists():
            return stack
        stack.close()
    return ExitStack()
