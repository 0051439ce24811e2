"""``ghoststore.remove``: removes a part or a training run from its store."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from ghoststore.settings.keywords import takes
from ghoststore.settings.store import RemoveOptions
from ghoststore.store.base.disk import UNCHANGED, flush, storage_errors
from ghoststore.store.base.object_folders import remove_folder
from ghoststore.store.base.object_path import ObjectPath, local_cache
from ghoststore.store.base.writers import unfinished
from ghoststore.store.manage.held import existing, held_whole, words_of
from ghoststore.store.store import Store
from ghoststore.store.walk import size_of

LEFT_TO_DELETE = "The store has no {} any more: `ghoststore gc` deletes what is left of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveReport:
    """The result of ``remove``."""

    store: str
    part: str | None
    run: str | None
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore rm --json`` prints."""
        return asdict(self)


@takes(RemoveOptions)
def remove(options: RemoveOptions) -> RemoveReport:
    """Remove a part or a training run, damaged or not, with its indexes and caches.

    It disappears in one step. If the process is killed while it deletes, `ghoststore.gc` deletes the rest; in object
    storage the same `remove` does.

    UsageError if there is none, BusyError while a process writes it, StorageError if the disk refuses.
    """
    store = Store.open(options.store)
    path = existing(store, options)
    size = size_of(path)
    with storage_errors(str(path), UNCHANGED), held_whole(path, words_of(options)):
        if isinstance(path, ObjectPath):
            remove_folder(path)
            shutil.rmtree(local_cache(path), ignore_errors=True)
            return RemoveReport(store=str(options.store), part=options.part, run=options.run, bytes=size)
        # Rename it first: a half-deleted part would be a damaged one.
        gone = unfinished(path)
        os.rename(path, gone)
        with storage_errors(str(gone), LEFT_TO_DELETE.format(words_of(options))):
            flush(path.parent)
            if gone.is_symlink():  # a part may be a link as a whole: its target is not ours to delete
                gone.unlink()
            else:
                shutil.rmtree(gone)
    return RemoveReport(store=str(options.store), part=options.part, run=options.run, bytes=size)
