"""The caches of a part: indexes, second moments and measured fidelity.

Each is a record with the files that it names, and can be made again. So a damaged one is dropped, not mended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.store.base.records import FileRecord, read_record, reading
from ghoststore.store.part.fidelity import FOLDER as FIDELITY
from ghoststore.store.part.indexes import FOLDER as INDEX
from ghoststore.store.part.indexes import MANIFEST, index_folder, index_names, read_manifest, remove_index
from ghoststore.store.part.part import Part
from ghoststore.store.spans.group import group_problem

SECOND_MOMENT = "second_moment"
FOLDERS = (INDEX, SECOND_MOMENT, FIDELITY)
ROOT = "zarr.json"
What = Literal["index", "second moment", "fidelity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A cache of a part, as its record describes it."""

    what: What
    name: str
    record: str
    """Path of the record in the part."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """The files that the record names, by path in the part."""
    covers: str | None = None
    """The :meth:`ghoststore.store.spans.group.Spanned.fingerprint` it was made from; None if that is not known."""
    problem: str | None = None
    """What is wrong with the record; None if nothing is."""

    def damage(self, part: Part) -> Iterator[tuple[str, str]]:
        """(file, what is wrong with it) of each damaged file."""
        if self.problem is not None:
            yield self.record, self.problem
        for name, record in self.files.items():
            if problem := record.damage(part.caches / name, part.caches):
                yield name, problem


def caches(part: Part) -> list[Cache]:
    """All caches of ``part``. Only their records are read."""
    moments = (_moment(part, path) for path in _records(part.caches / SECOND_MOMENT))
    measured = (_fidelity(part, path) for path in _records(part.caches / FIDELITY))
    indexes = (_index(part, name) for name in index_names(part))
    return [cache for cache in (*indexes, *moments, *measured) if cache is not None]


def cache_damage(part: Part) -> Iterator[tuple[str, int, str | None]]:
    """(file, its bytes, what is wrong with it or None) for every file of every cache, and their groups."""
    for cache in caches(part):
        damage = dict(cache.damage(part))
        if damage and cache not in caches(part):
            continue  # another process has just replaced or removed it
        yield cache.record, 0, damage.get(cache.record)
        for name, record in cache.files.items():
            yield name, record.bytes, damage.get(name)
    for group in cache_groups(part):
        yield f"{group}/{ROOT}", 0, group_problem(part.caches / group, {})


def cache_groups(part: Part) -> list[str]:
    """Paths in the part of the Zarr groups that hold caches."""
    folders = [folder for folder in FOLDERS if (part.caches / folder).is_dir()]
    return [*folders, *(f"{INDEX}/{name}" for name in index_names(part))]


def drop(part: Part, cache: Cache) -> list[str]:
    """Remove a cache. Returns the paths of its files. BusyError while a process builds that index."""
    if cache.what == "index":
        folder = index_folder(part, cache.name)
        names = [str(path.relative_to(part.caches)) for path in sorted(folder.rglob("*")) if not path.is_dir()]
        remove_index(part, cache.name)
        return names
    # The record first: the files are leftovers then, which `ghoststore gc` removes.
    for name in (cache.record, *cache.files):
        with suppress(FileNotFoundError):
            (part.caches / name).unlink()
    return [cache.record, *cache.files]


def _records(folder: Path) -> list[Path]:
    """The records in a folder of caches, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("*.json") if path.name != ROOT and not path.name.startswith("."))


def _index(part: Part, name: str) -> Cache | None:
    record = f"{INDEX}/{name}/{MANIFEST}"
    try:
        manifest = read_manifest(part, name)
    except CorruptError as error:
        return Cache(what="index", name=name, record=record, problem=str(error))
    except UsageError:
        return None  # removed meanwhile
    except MismatchError:  # of another version: refused when it is used, not here
        folder = index_folder(part, name)
        paths = [path for path in folder.iterdir() if path.is_file() and path.name not in (MANIFEST, ROOT)]
        return Cache(
            what="index", name=name, record=record, files={_inside(part, path): FileRecord.of(path) for path in paths}
        )
    files = {_inside(part, manifest.path_of(index_folder(part, name), kind)): r for kind, r in manifest.files.items()}
    return Cache(what="index", name=name, record=record, files=files, covers=manifest.coverage)


def _moment(part: Part, path: Path) -> Cache | None:
    def read(value: dict[str, Any]) -> Cache:
        data = str(value["data"])
        if not re.fullmatch(rf"{re.escape(path.stem)}-[0-9a-f]{{16}}\.(safetensors|npy)", data):
            raise ValueError(f"it names a file {data!r:.80}")
        files = {f"{SECOND_MOMENT}/{data}": FileRecord.from_json(value["file"])}
        return Cache(
            what="second moment", name=path.stem, record=_inside(part, path), files=files, covers=str(value["covers"])
        )

    return _of_record(part, path, "second moment", read)


def _fidelity(part: Part, path: Path) -> Cache | None:
    def read(value: dict[str, Any]) -> Cache:
        return Cache(what="fidelity", name=path.stem, record=_inside(part, path), covers=str(value["covers"]))

    return _of_record(part, path, "fidelity", read)


def _of_record(part: Part, path: Path, what: What, read: Any) -> Cache | None:
    try:
        with reading(path):
            cache: Cache = read(read_record(path, within=part.caches))
            return cache
    except (FileNotFoundError, NotADirectoryError):
        return None  # removed meanwhile
    except CorruptError as error:
        return Cache(what=what, name=path.stem, record=_inside(part, path), problem=str(error))


def _inside(part: Part, path: Path) -> str:
    return path.relative_to(part.caches).as_posix()
