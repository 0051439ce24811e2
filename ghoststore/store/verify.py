"""``ghoststore.verify``: every byte that was committed, checked against its record."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.progress import Silent, Task
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import VerifyOptions
from ghoststore.store.base.records import FileRecord, read_commit
from ghoststore.store.part.indexes import FOLDER, MANIFEST, damage_of, index_folder, index_names, read_manifest
from ghoststore.store.part.part import Part
from ghoststore.store.spans.group import Spanned
from ghoststore.store.store import Store

THREADS = 4


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
    for name, of in [*((name, {"part": name}) for name in parts), *((name, {"run": name}) for name in runs)]:
        try:
            found: Spanned[Any] = opened.part(name) if "part" in of else opened.run(name)
        except CorruptError as error:
            damage.append(Damage(**of, file="zarr.json", problem=str(error)))
            continue
        task = progress.task(f"verifying {name}", len(found.spans), unit="spans")
        damage += [Damage(**of, file=file, problem=problem) for file, problem in _check_metadata(found)]
        spans += len(found.spans)
        with closing(task):
            for key, count, problem in chain(_check_spans(found, task), _check_indexes(found)):
                files, size = files + 1, size + count
                if problem:
                    damage.append(Damage(**of, file=key, problem=problem))
    return VerifyReport(
        store=str(options.store), parts=parts, runs=runs, spans=spans, files=files, bytes=size, damage=damage
    )


def _check_metadata(found: Spanned[Any]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it) for every file that was written when the part or run was made."""
    for name in found.files:
        try:
            found.check_file(name)
        except CorruptError as error:
            yield name, str(error)


def _check_spans(found: Spanned[Any], task: Task) -> Iterator[tuple[str, int, str | None]]:
    """What :func:`_check_span` says of every committed span."""
    with ThreadPoolExecutor(THREADS) as pool:
        for checked in pool.map(lambda span: list(_check_span(found.path, span)), found.spans):
            task.advance(1)
            yield from checked


def _check_indexes(found: Spanned[Any]) -> Iterator[tuple[str, int, str | None]]:
    """(file, its bytes, what is wrong with it or None) for each file of each index. A stale index is not damage."""
    if not isinstance(found, Part):
        return
    for name in index_names(found):
        folder = index_folder(found, name)
        try:
            manifest = read_manifest(found, name)
        except CorruptError as error:
            yield f"{FOLDER}/{name}/{MANIFEST}", 0, str(error)
            continue
        except (MismatchError, UsageError):
            continue  # of another version, which is refused when it is used; or just removed
        wrong = dict(damage_of(folder, manifest))
        for kind, record in manifest.files.items():
            path = manifest.path_of(folder, kind)
            yield str(path.relative_to(found.path)), record.bytes, wrong.get(path)


def _check_span(folder: Path, span: int) -> Iterator[tuple[str, int, str | None]]:
    """(file, its bytes, what is wrong with it or None) for the record of ``span`` and each file it names."""
    try:
        commit = read_commit(folder, span)
    except CorruptError as error:
        yield f"commits/{span:08d}.json", 0, str(error)
        return
    for key, record in commit.files.items():
        path = folder / key
        if not path.resolve().is_relative_to(folder.resolve()):
            yield key, 0, f"the record of span {span} names a file outside the part or run"
            continue
        try:
            found = FileRecord.of(path)
        except FileNotFoundError:
            yield key, 0, f"missing (span {span})"
            continue
        except OSError as error:
            yield key, 0, f"cannot be read (span {span}): {error}"
            continue
        if found.bytes != record.bytes:
            yield key, found.bytes, f"{found.bytes} bytes; {record.bytes} were committed (span {span})"
        elif found.sha256 != record.sha256:
            yield key, found.bytes, f"its SHA-256 is not that of what was committed (span {span})"
        else:
            yield key, found.bytes, None
