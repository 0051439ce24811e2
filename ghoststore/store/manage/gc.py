"""``ghoststore.gc``: removes what no record names, the leftovers of dead writers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ghoststore.errors import BusyError, CorruptError, MismatchError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import GcOptions
from ghoststore.store.base.disk import exclusive, storage_errors
from ghoststore.store.base.opening import refuse_links
from ghoststore.store.base.writers import FOLDER as WRITERS
from ghoststore.store.base.writers import left_behind, remove_dead, writers
from ghoststore.store.manage.held import held
from ghoststore.store.part.caches import FOLDERS, caches, drop
from ghoststore.store.part.indexes import FOLDER as INDEX
from ghoststore.store.part.part import OF_UNION, Part
from ghoststore.store.run.journal import journal_spans
from ghoststore.store.run.run import Run
from ghoststore.store.spans.commits import commit_path
from ghoststore.store.spans.group import Spanned
from ghoststore.store.spans.soundness import refuse_damaged, refuse_damaged_spans, undecided
from ghoststore.store.spans.withdrawn import FOLDER as WITHDRAWN
from ghoststore.store.spans.withdrawn import FOREIGN, withdrawn_folder, withdrawn_spans
from ghoststore.store.store import Store
from ghoststore.store.verify import Owner, StoredFile
from ghoststore.store.walk import JOURNAL, Census, entries_below, is_unfinished, size_of

_DECIDED = re.compile(r"commits/\.([0-9]{8})(?:\.[0-9]+)?\.(?:intent|recorded)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A part or run that was left alone, and why."""

    why: str
    part: str | None = None
    run: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    """The result of ``gc``: what was removed, or would be."""

    store: str
    dry_run: bool
    removed: list[StoredFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all that was removed."""
        return sum(file.bytes for file in self.removed)

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore gc --json`` prints."""
        return {**asdict(self), "bytes": self.bytes}


@takes(GcOptions)
def gc(options: GcOptions) -> GcReport:
    """Remove from a store, or from one part or run, what no record names.

    These are unfinished files of dead writers, their records, the files of a finished repair, and folders of parts and
    runs whose creation or removal was interrupted. What a living writer may own stays. So does everything in a damaged
    part or run: a repair may need its leftovers. Files that ghoststore did not write are never touched
    (`ghoststore.verify` lists them). ``caches`` also removes stale indexes, second moments and measurements.

    Raises UsageError if there is no such store, part or run, StorageError if the disk refuses.
    """
    store = Store.open(options.store)
    parts, runs = store.chosen(options.part, options.run)
    collection = _Collection(store, options.dry_run, options.caches, options.progress or Silent())
    if options.part is None and options.run is None:
        collection.collect_store()
    for name in parts:
        collection.collect(store.damaged_part, {"part": name})
    for name in runs:
        collection.collect(store.damaged_run, {"run": name})
    return GcReport(
        store=str(options.store), dry_run=options.dry_run, removed=collection.removed, skipped=collection.skipped
    )


class _Collection:
    def __init__(self, store: Store, dry_run: bool, stale_caches: bool, progress: Progress) -> None:
        self._store, self._dry_run, self._stale_caches, self._progress = store, dry_run, stale_caches, progress
        self.removed: list[StoredFile] = []
        self.skipped: list[Skipped] = []

    def collect_store(self) -> None:
        """Remove leftovers beside parts and runs."""
        for group in ("", "parts", "runs"):
            for name, path, _ in entries_below(self._store.path / group, deep=False):
                if is_unfinished(name) and left_behind(path, set()):
                    self._remove({}, f"{group}/{name}".lstrip("/"), path)

    def collect(self, open_source: Any, owner: Owner) -> None:
        """Remove leftovers in a part or run."""
        with ExitStack() as stack:
            try:
                source: Spanned[Any] = open_source(*owner.values())
                refuse_links(source.path)
                refuse_damaged(source)
                what = f"{source.kind.name} {source.name!r}"
                # Listed now: holding the folder as a writer removes them.
                dead = [(f"{WRITERS}/{record.name}", size_of(record)) for record in _dead(source.path)]
                # As a writer, with a record: it keeps out writers of other machines, which do not see the lock.
                hold = held(source.path, what) if self._dry_run else exclusive(source.path, what, None)
                stack.enter_context(hold)
                source = open_source(*owner.values())  # again, now that no process writes
                refuse_damaged_spans(source, self._mendable(source))
            except (CorruptError, MismatchError, BusyError) as error:
                self.skipped.append(Skipped(why=str(error), **owner))
                return
            self.removed += [StoredFile(file=name, bytes=size, living=False, **owner) for name, size in dead]
            if self._stale_caches and isinstance(source, Part):
                self._drop_stale(source, owner)
            for name, path in self._leftovers(source, owner):
                self._remove(owner, name, path)

    def _mendable(self, source: Spanned[Any]) -> set[int]:
        """Committed spans that a leftover could mend. They are read whole before it is removed."""
        journals = journal_spans(source.path) if isinstance(source, Run) and source.layout.save_steps else []
        return {*journals, *withdrawn_spans(source)}.intersection(source.spans)

    def _leftovers(self, source: Spanned[Any], owner: Owner) -> Iterator[tuple[str, Path]]:
        """(path in ``source``, path) of what may be removed while no process writes ``source``."""
        of_part = isinstance(source, Part)
        part_caches = caches(source) if isinstance(source, Part) else []
        census = Census(source, {name for cache in part_caches for name in (cache.record, *cache.files)})
        decided = sorted(undecided(source.path).intersection(range(source.layout.spans)).difference(source.spans))
        if decided:
            why = f"span {decided[0]} is decided and not committed: whoever writes next finishes it with what is there"
            self.skipped.append(Skipped(why=why, **owner))
        for name, path, _ in list(entries_below(source.path)):
            if name == WITHDRAWN:
                for span in withdrawn_spans(source):
                    # A span of a part without a record is still to be built again by a repair.
                    if span in source.spans or not of_part:
                        yield f"{WITHDRAWN}/{span:08d}", withdrawn_folder(source, span)
                if (path / FOREIGN).is_dir():
                    yield f"{WITHDRAWN}/{FOREIGN}", path / FOREIGN
            elif (
                name == WRITERS
                or census.kind_of(name) != "leftover"
                or (decided and name.partition("/")[0] not in FOLDERS)
            ):
                continue
            elif path.name == WRITERS:
                yield from ((f"{name}/{record.name}", record) for record in _dead(path.parent))
            elif name.startswith(f"{INDEX}/"):
                if _is_free(path.parent):
                    yield name, path
            elif match := _DECIDED.fullmatch(name):
                # An intent is void if there is a record, which is looked for after the intent.
                if int(match[1]) >= source.layout.spans or commit_path(source.path, int(match[1])).exists():
                    yield name, path
            # So is the journal of a span with a record.
            elif JOURNAL.fullmatch(name) or left_behind(path, set()):
                yield name, path

    def _drop_stale(self, part: Part, owner: Owner) -> None:
        now = part.fingerprint()
        for cache in caches(part):
            # One part cannot tell whether a cache of several is stale.
            if cache.covers is None or cache.covers == now or OF_UNION.fullmatch(cache.name):
                continue
            size = sum(size_of(part.path / name) for name in (cache.record, *cache.files))
            self.removed.append(StoredFile(file=cache.record, bytes=size, living=False, **owner))
            if not self._dry_run:
                with storage_errors(str(part.path / cache.record)):
                    drop(part, cache)

    def _remove(self, owner: Owner, name: str, path: Path) -> None:
        self.removed.append(StoredFile(file=name, bytes=size_of(path), living=False, **owner))
        if self._dry_run:
            return
        with storage_errors(str(path)), suppress(FileNotFoundError):
            if path.name == WRITERS:  # record by record: a writer may come meanwhile
                remove_dead(path.parent)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        with suppress(OSError):  # removes the parent only if it is empty now
            if path.parent.name in (WITHDRAWN, WRITERS) or path.parent.parent.name == INDEX:
                path.parent.rmdir()


def _dead(folder: Path) -> list[Path]:
    """Records of dead writers in ``folder``."""
    return [folder / WRITERS / f"{writer.id}.json" for writer in writers(folder) if not writer.alive]


def _is_free(folder: Path) -> bool:
    """Whether no process writes in ``folder``."""
    try:
        with held(folder, str(folder)):
            return True
    except BusyError:
        return False
