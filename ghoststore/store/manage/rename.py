"""``ghoststore.rename``: gives a part or a training run another name."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import RenameOptions
from ghoststore.store.base.disk import UNCHANGED, flush, storage_errors
from ghoststore.store.base.object_path import refuse_objects
from ghoststore.store.manage.held import existing, folder_of, held_whole, words_of
from ghoststore.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RenameReport:
    """The result of ``rename``."""

    store: str
    part: str | None
    run: str | None
    """The old name; the other of the two is None."""
    to_name: str

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore mv --json`` prints."""
        return asdict(self)


@takes(RenameOptions)
def rename(options: RenameOptions) -> RenameReport:
    """Give a part or a training run another name, in one step, with its indexes and caches.

    Nothing in a store refers to a part or run by its name. A build or training that continues needs the new ``name``.

    UsageError if there is none, or if the new name is taken; BusyError while a process writes it; StorageError if the
    disk refuses.
    """
    refuse_objects(
        options.store,
        "store",
        "renaming",
        "`ghoststore cp --to-name` makes a copy of another name, and `ghoststore rm` removes the one before",
    )
    store = Store.open(options.store)
    path, to = existing(store, options), folder_of(store, options, options.to_name)
    with storage_errors(str(to), UNCHANGED), held_whole(path, words_of(options)):
        if os.path.lexists(to):
            raise UsageError(f"{store.path} has a {words_of(options, options.to_name)} already; nothing was renamed")
        # A folder that appears in between is not replaced either: rename fails on one with files in it.
        os.rename(path, to)
        flush(path.parent)
    return RenameReport(store=str(options.store), part=options.part, run=options.run, to_name=options.to_name)
