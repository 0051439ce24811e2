"""``ghoststore.verify``: every byte that was committed, checked against its record."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.progress import Silent, Task
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import VerifyOptions
from ghoststore.store.part.indexes import FOLDER, MANIFEST, index_folder, index_names, read_manifest
from ghoststore.store.part.part import Part
from ghoststore.store.spans.commits import commit_path, read_commit
from ghoststore.store.spans.group import Spanned
from ghoststore.store.store import Store

THREADS = 4
Checked: TypeAlias = tuple[str, int, str | None]
"""(file, its bytes, what is wrong with it or None)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is not as it was committed."""

    file: str
    """Its path in the part or run."""
    problem: str
    part: str | None = None
    run: str | None = None
    """The part or the run it belongs to, the other is None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What ``verify`` found: nothing is damaged if ``damage`` is empty."""

    store: str
    parts: list[str]
    runs: list[str]
    spans: int
    files: int
    bytes: int
    damage: list[Damage] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every byte is what was committed."""
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore verify --json`` prints."""
        return {**asdict(self), "sound": self.sound}


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Check every part and training run, or one of either: the manifest, the metadata of arrays, a run's row table,
    every commit record and every file it names (size, SHA-256), and the files of a part's indexes.

    All damage is listed, not just the first. A span without a record is not damage: it does not exist.
    Raises UsageError if there is no such store, part or run.
    """
    progress = options.progress or Silent()
    opened = Store.open(options.store)
    parts, runs = opened.chosen(options.part, options.run)
    damage: list[Damage] = []
    spans = files = size = 0
    for name, owner in [*((name, {"part": name}) for name in parts), *((name, {"run": name}) for name in runs)]:
        try:
            source: Spanned[Any] = opened.part(name) if "part" in owner else opened.run(name)
        except CorruptError as error:
            damage.append(Damage(**owner, file="zarr.json", problem=str(error)))
            continue
        task = progress.task(f"verifying {name}", len(source.spans), unit="spans")
        damage += [Damage(**owner, file=file, problem=problem) for file, problem in _check_metadata(source)]
        spans += len(source.spans)
        with closing(task):
            for key, count, problem in chain(_check_spans(source, task), _check_indexes(source)):
                files, size = files + 1, size + count
                if problem:
                    damage.append(Damage(**owner, file=key, problem=problem))
    return VerifyReport(
        store=str(options.store), parts=parts, runs=runs, spans=spans, files=files, bytes=size, damage=damage
    )


def _check_metadata(source: Spanned[Any]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) for every file that was written when the part or run was made."""
    for name in source.files:
        try:
            source.check_file(name)
        except CorruptError as error:
            yield name, str(error)


def _check_spans(source: Spanned[Any], task: Task) -> Iterator[Checked]:
    """What :func:`_check_span` says of every committed span."""
    with ThreadPoolExecutor(THREADS) as pool:
        for checked in pool.map(lambda span: list(_check_span(source.path, span)), source.spans):
            task.advance(1)
            yield from checked


def _check_span(folder: Path, span: int) -> Iterator[Checked]:
    """The record of ``span``, if it is damaged, and each file it names."""
    try:
        commit = read_commit(folder, span)
    except CorruptError as error:
        yield str(commit_path(folder, span).relative_to(folder)), 0, str(error)
        return
    for key, record in commit.files.items():
        path = folder / key
        # A record may come from anywhere: what lies outside is not read.
        if not path.resolve().is_relative_to(folder.resolve()):
            yield key, 0, f"the record of span {span} names a file outside the part or run"
            continue
        problem = record.damage(path)
        yield key, record.bytes, f"{problem} (span {span})" if problem else None


def _check_indexes(source: Spanned[Any]) -> Iterator[Checked]:
    """Each file of each index. A stale index is not damage."""
    if not isinstance(source, Part):
        return
    for name in index_names(source):
        try:
            manifest = read_manifest(source, name)
        except CorruptError as error:
            yield f"{FOLDER}/{name}/{MANIFEST}", 0, str(error)
            continue
        except (MismatchError, UsageError):
            continue  # of another version, which is refused when it is used; or just removed
        for kind, record in manifest.files.items():
            path = manifest.path_of(index_folder(source, name), kind)
            yield str(path.relative_to(source.path)), record.bytes, record.damage(path)
