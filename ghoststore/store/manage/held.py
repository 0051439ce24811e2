"""Finds a part or run, and keeps writers out of it while it is renamed, removed or collected."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ghoststore.errors import BusyError, UsageError
from ghoststore.settings.store import OneOptions
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.writers import FOLDER, busy, living, refuse_second
from ghoststore.store.part.indexes import FOLDER as INDEX
from ghoststore.store.part.indexes import index_words
from ghoststore.store.store import Store


def folder_of(store: Store, options: OneOptions, name: str | None = None) -> Path:
    """The path of the part or run of ``options``, or its path under another ``name``."""
    return (store.run_path if options.part is None else store.part_path)(options.name if name is None else name)


def words_of(options: OneOptions, name: str | None = None) -> str:
    """The part or run of ``options`` as messages name it, under another ``name`` if one is given."""
    return f"{'run' if options.part is None else 'part'} {(options.name if name is None else name)!r}"


def existing(store: Store, options: OneOptions) -> Path:
    """The folder of the part or run of ``options``, damaged or not. UsageError if there is none."""
    path = folder_of(store, options)
    if not path.is_dir():
        names = store.part_names() if options.run is None else store.run_names()
        raise UsageError(f"{store.path} has no {words_of(options)}; it has: {', '.join(names) or 'none'}")
    return path


@contextmanager
def held_whole(path: Path, what: str) -> Iterator[None]:
    """Keep writers out of a part or run, and of each of its indexes. BusyError while one is at work on any."""
    with ExitStack() as stack:
        stack.enter_context(held(path, what))
        for records in sorted(path.glob(f"{INDEX}/*/{FOLDER}")):
            stack.enter_context(held(records.parent, index_words(path.name, records.parent.name)))
        yield


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Keep writers out of the folder of a part, a run or an index. BusyError while one is at work.

    It takes the lock that writers take, but makes no record of a writer, which would be renamed with the folder. In an
    object store nobody is kept out.
    """
    if isinstance(path, ObjectPath):
        yield
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise BusyError(busy(what, None, [])) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy(what, None, living(path))) from None
        except OSError:  # a file system without locks: only the records of writers tell
            pass
        refuse_second(living(path), what, None)
        yield
    finally:
        os.close(handle)
