"""``ghoststore.rename``: another name for a part or a training run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import RenameOptions
from ghoststore.store.base.disk import UNCHANGED, flush, storage_errors
from ghoststore.store.manage.held import existing, folder_of, held_whole, words_of
from ghoststore.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RenameReport:
    """What has a new name."""

    store: str
    part: str | None
    run: str | None
    """Its old name; the other is None."""
    to_name: str

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore mv --json`` prints."""
        return asdict(self)


@takes(RenameOptions)
def rename(options: RenameOptions) -> RenameReport:
    """Give a part or a training run another name, in one step. Indexes and caches go along, for nothing in a store
    refers to a part or run by its name; a build or training that goes on must be given the new one (``name``).

    UsageError if there is none, or one of the new name; BusyError while a process writes it; StorageError if the disk
    refuses.
    """
    store = Store.open(options.store)
    path, to = existing(store, options), folder_of(store, options, options.to_name)
    with storage_errors(str(to), UNCHANGED), held_whole(path, words_of(options)):
        if os.path.lexists(to):
            raise UsageError(f"{store.path} has a {words_of(options, options.to_name)} already; nothing was renamed")
        # A folder that appears in between is not replaced either: it has files in it.
        os.rename(path, to)
        flush(path.parent)
    return RenameReport(store=str(options.store), part=options.part, run=options.run, to_name=options.to_name)
