"""``ghoststore.verify``: compares every file of a store with what was written, and lists other files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from ghoststore.errors import CorruptError, MismatchError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import VerifyOptions
from ghoststore.store.base.names import is_name
from ghoststore.store.base.opening import links_below
from ghoststore.store.base.writers import FOLDER as WRITERS
from ghoststore.store.base.writers import left_behind, living
from ghoststore.store.part.caches import cache_damage
from ghoststore.store.part.part import Part
from ghoststore.store.run.journal import journal_damage
from ghoststore.store.run.run import Run
from ghoststore.store.spans.group import Spanned, group_problem
from ghoststore.store.spans.soundness import (
    Checked,
    checked_spans,
    lost_spans,
    missing_records,
    unrecorded_damage,
    writers_problem,
)
from ghoststore.store.store import ROOT, ROOT_ATTRIBUTES, Store
from ghoststore.store.walk import Census, entries_below, is_unfinished, size_of

Owner: TypeAlias = dict[str, str]
"""``part`` or ``run`` with its name; empty for the store itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A file that is not as it was committed."""

    file: str
    """Its path in the part or run, or in the store if it belongs to neither."""
    problem: str
    part: str | None = None
    run: str | None = None
    """The part or the run that it belongs to; the other is None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file, or an unfinished folder, that is not part of the data."""

    file: str
    """As in :class:`Damage`."""
    bytes: int
    part: str | None = None
    run: str | None = None
    living: bool = False
    """For a leftover, whether a process that may be its writer is at work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The result of ``verify``. Nothing is damaged if ``damage`` is empty."""

    store: str
    parts: list[str]
    runs: list[str]
    spans: int
    files: int
    bytes: int
    damage: list[Damage] = field(default_factory=list)
    leftovers: list[StoredFile] = field(default_factory=list)
    """Unfinished files and records of writers. They are no damage; `ghoststore gc` removes those of dead writers."""
    unknown: list[StoredFile] = field(default_factory=list)
    """Files that ghoststore did not write. They are no damage, and nothing touches them."""

    @property
    def sound(self) -> bool:
        """Whether every byte is what was committed."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore verify --json`` prints."""
        return {**asdict(self), "sound": self.sound}


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Check every file of a store, or of one part or training run.

    These are the metadata of groups and arrays, a run's row table, every commit record and every file that it names
    (size, SHA-256), and the caches of a part: indexes, second moments, measured fidelity.

    All damage is listed, not just the first; a file that cannot be read is one entry. A span whose chunks are in place
    without a record is damage: its record was lost. A span with neither has not been built. Unknown files and
    unfinished files of writers are listed apart.

    Raises UsageError if there is no such store, part or run, MismatchError for another format version.
    """
    store = Store.examined(options.store)
    parts, runs = store.chosen(options.part, options.run)
    examination = Examination(store, options.progress or Silent())
    if options.part is None and options.run is None:
        examination.check_store()
    for name in parts:
        examination.check({"part": name})
    for name in runs:
        examination.check({"run": name})
    return examination.report(parts, runs)


class Examination:
    """Collects the results of a verification."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self._store, self._progress = store, progress
        self._damage: list[Damage] = []
        self._leftovers: list[StoredFile] = []
        self._unknown: list[StoredFile] = []
        self._other_version: MismatchError | None = None
        self._spans = self._files = self._bytes = 0

    def report(self, parts: list[str], runs: list[str]) -> VerifyReport:
        """The whole report. MismatchError if nothing is damaged, but something has another format version."""
        if self._other_version is not None and not self._damage:
            raise self._other_version
        return VerifyReport(
            store=str(self._store.path),
            parts=parts,
            runs=runs,
            spans=self._spans,
            files=self._files,
            bytes=self._bytes,
            damage=self._damage,
            leftovers=self._leftovers,
            unknown=self._unknown,
        )

    def check_store(self) -> None:
        """Check the store's own groups, and list other files beside parts and runs."""
        folder = self._store.path
        for name, attributes in ((ROOT, ROOT_ATTRIBUTES), (f"parts/{ROOT}", {}), (f"runs/{ROOT}", {})):
            self._files += 1
            self._note({}, name, group_problem((folder / name).parent, attributes))
        for group in ("", "parts", "runs"):
            known = {ROOT, "parts", "runs"} if not group else {ROOT}
            for name, path, problem in entries_below(folder / group, deep=False):
                if problem is not None:
                    self._note({}, group or ".", problem)
                elif is_unfinished(name):
                    self._add_leftover({}, f"{group}/{name}".lstrip("/"), path, not left_behind(path, set()))
                elif name not in known and not (group and path.is_dir() and is_name(name)):
                    self._unknown.append(StoredFile(file=f"{group}/{name}".lstrip("/"), bytes=size_of(path)))

    def check(self, owner: Owner) -> None:
        """Check one part or run."""
        try:
            source = self._open(owner)
        except (CorruptError, OSError) as error:
            self._note(owner, ROOT, str(error))
            return
        except MismatchError as error:
            self._other_version = error
            return
        with closing(self._progress.task(f"verifying {source.name}", len(source.spans), unit="spans")) as task:
            self._spans += len(source.spans)
            caches = list(cache_damage(source)) if isinstance(source, Part) else []
            checked = checked_spans(source, source.spans, task)
            for name, size, problem in chain(_check_metadata(source), checked, caches):
                self._files, self._bytes = self._files + 1, self._bytes + size
                self._note(owner, name, problem)
            lost = (damage for span in lost_spans(source) for damage in unrecorded_damage(source, span))
            for name, problem in chain(missing_records(source), lost):
                self._note(owner, name, problem)
            self._note(owner, WRITERS, writers_problem(source.path))
            if isinstance(source, Run):
                self._check_journals(source, owner)
            reported = {damage.file for damage in self._damage}
            for link in links_below(source.path):
                if (name := str(link.relative_to(source.path))) not in reported:
                    self._note(owner, name, "a link, and inside a part or run none is followed")
            self._list_others(owner, source, {name for name, _, _ in caches})

    def _check_journals(self, run: Run, owner: Owner) -> None:
        """Check the journals: steps of spans that are not full yet. Missing steps are damage."""
        known = {damage.file for damage in self._damage if damage.run == run.name}
        for journal in run.journals.values():
            self._files, self._bytes = self._files + 1, self._bytes + journal.end
        for file, problem in journal_damage(run):
            if file not in known or not problem.endswith("are missing"):  # a lost record is reported already
                self._note(owner, file, problem)

    def _open(self, owner: Owner) -> Spanned[Any]:
        part = "part" in owner
        return self._store.damaged_part(owner["part"]) if part else self._store.damaged_run(owner["run"])

    def _list_others(self, owner: Owner, source: Spanned[Any], caches: set[str]) -> None:
        """List leftovers and unknown files in the folder of a part or run."""
        census, at_work = Census(source, caches), {writer.id for writer in living(source.path)}
        for name, path, problem in entries_below(source.path):
            if problem is not None:
                self._note(owner, name, problem)
                continue
            kind = census.kind_of(name)
            if kind == "leftover":
                self._add_leftover(owner, name, path, bool(at_work) and not left_behind(path, at_work))
            elif kind == "unknown":
                self._unknown.append(StoredFile(file=name, bytes=size_of(path), living=False, **owner))

    def _add_leftover(self, owner: Owner, name: str, path: Path, alive: bool) -> None:
        try:
            if path.is_dir() and not any(path.iterdir()):
                return
        except FileNotFoundError:  # its owner has just removed it
            return
        self._leftovers.append(StoredFile(file=name, bytes=size_of(path), living=alive, **owner))

    def _note(self, owner: Owner, name: str, problem: str | None) -> None:
        if problem is not None:
            self._damage.append(Damage(file=name, problem=problem, **owner))


def _check_metadata(source: Spanned[Any]) -> Iterator[Checked]:
    """Check every file that was written when the part or run was made."""
    for name in source.files:
        try:
            source.check_file(name)
        except CorruptError as error:
            yield name, 0, str(error)
        else:
            yield name, size_of(source.path / name), None
