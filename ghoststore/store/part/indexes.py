"""Indexes of a part on the disk: a folder for each, whose manifest appears last and names all other files.

An index is a cache of the committed rows: it can be deleted, and one that no longer fits the part is refused.
``docs/format.md`` specifies it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.store.base.disk import UNCHANGED, exclusive, flush, publish, replace, storage_errors, sweep
from ghoststore.store.base.names import check_name, is_name
from ghoststore.store.base.opening import refuse_links
from ghoststore.store.base.records import FileRecord
from ghoststore.store.base.writers import living, own_id
from ghoststore.store.part.index_manifest import SUFFIXES, IndexManifest
from ghoststore.store.part.part import OF_UNION, Part

FOLDER = "index"
MANIFEST = "index.json"
_OURS = re.compile(r"([0-9a-f]{16}|begun)\.(faiss|rows)")
"""Names of the files that a build of an index makes, apart from temporary ones."""
GROUP = b'{"attributes": {}, "zarr_format": 3, "node_type": "group"}'
State = Literal["current", "stale", "damaged", "of a union"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexState:
    """An index of a part, and whether it can be used."""

    name: str
    state: State
    problem: str | None
    """Why it is stale or damaged. Whether one of a union is current tells only a query of it."""
    manifest: IndexManifest | None
    """None if the manifest cannot be read."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that the commands print."""
        head = {"name": self.name, "state": self.state, "problem": self.problem}
        return head | ({} if self.manifest is None else self.manifest.to_json())


def is_index_file(name: str) -> bool:
    """Whether a build of an index makes files of this name."""
    return name in ("zarr.json", MANIFEST) or _OURS.fullmatch(name) is not None


def index_folder(part: Part, name: str) -> Path:
    """The folder of the index ``name``, whether it exists or not."""
    return part.caches / FOLDER / check_name(name, "index")


def index_words(part: str, name: str) -> str:
    """The index ``name`` of the part ``part`` as messages name it."""
    return f"index {name!r} of part {part!r}"


def own_index_names(part: Part) -> list[str]:
    """Of :func:`index_names` those that cover the rows of ``part``: of a union its own, of a part none of unions."""
    names = index_names(part)
    if part.tag:
        return [name for name in names if name.endswith(part.tag)]
    return [name for name in names if not OF_UNION.fullmatch(name)]


def index_names(part: Part) -> list[str]:
    """Names of the indexes that lie with ``part``, sorted. A folder without a manifest is an unfinished build, not an
    index.
    """
    names = (path.parent.name for path in (part.caches / FOLDER).glob(f"*/{MANIFEST}"))
    return sorted(name for name in names if is_name(name))


def read_manifest(part: Part, name: str) -> IndexManifest:
    """The manifest of one index.

    UsageError if there is none, CorruptError if it is damaged, MismatchError if it is of another version.
    """
    try:
        return IndexManifest.read(index_folder(part, name) / MANIFEST, part.caches)
    except (FileNotFoundError, NotADirectoryError):
        names = ", ".join(index_names(part)) or "none"
        raise UsageError(
            f"part {part.name!r} has no index {name!r}; it has: {names}. `ghoststore index` makes one"
        ) from None


def check_coverage(part: Part, name: str, manifest: IndexManifest) -> None:
    """MismatchError unless the index covers exactly what is committed in ``part``."""
    remedy = "; `ghoststore index` builds it again"
    spans = len(part.spans)
    if manifest.spans != spans:
        raise MismatchError(
            f"index {name!r} is stale: it covers {manifest.spans} spans, part {part.name!r} has {spans}{remedy}"
        )
    if manifest.dimension != part.layout.dimension or manifest.coverage != part.fingerprint():
        raise MismatchError(f"index {name!r} was built of other vectors than those of part {part.name!r}{remedy}")


def damage_of(folder: Path, manifest: IndexManifest) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong with it) for the files of an index."""
    for kind, record in manifest.files.items():
        path = manifest.path_of(folder, kind)
        if problem := record.damage(path):
            yield path, problem


def index_states(part: Part) -> list[IndexState]:
    """Every index of ``part``. Of the files only the sizes are looked at: :func:`damage_of` reads them."""
    states = []
    for name in index_names(part):
        manifest: IndexManifest | None = None
        state: State = "current"
        problem: str | None = None
        try:
            manifest = read_manifest(part, name)
            for kind, record in manifest.files.items():
                path = manifest.path_of(index_folder(part, name), kind)
                if not path.is_file() or path.stat().st_size != record.bytes:
                    raise CorruptError(f"{path} is missing or cut")
            if part.tag or not OF_UNION.fullmatch(name):
                check_coverage(part, name, manifest)
            else:
                state = "of a union"
        except MismatchError as error:
            state, problem = "stale", str(error)
        except CorruptError as error:
            state, problem = "damaged", str(error)
        states.append(IndexState(name=name, state=state, problem=problem, manifest=manifest))
    return states


@contextmanager
def building(part: Part, name: str) -> Iterator[Path]:
    """The folder of an index, held against other processes, without what a dead one had begun.

    What is written there is seen by nobody until :func:`publish_index`. BusyError if another process builds it,
    StorageError if the disk refuses.
    """
    folder, what = index_folder(part, name), index_words(part.name, name)
    refuse_links(part.caches)
    with storage_errors(str(folder), UNCHANGED):
        for group in (folder.parent, folder):
            group.mkdir(parents=group.parent == part.caches, exist_ok=True)
            publish(group / "zarr.json", GROUP)
        with exclusive(folder, what):
            _sweep(folder)
            try:
                yield folder
            finally:
                for kind in SUFFIXES:
                    begun_path(folder, kind).unlink(missing_ok=True)
                _sweep(folder)
                if not (folder / MANIFEST).exists() and _alone(folder):
                    shutil.rmtree(folder)


def begun_path(folder: Path, kind: str) -> Path:
    """Where this process writes a file of one kind before it has its name."""
    return folder / f".begun{SUFFIXES[kind]}.{own_id()}.tmp"


def seal_files(folder: Path) -> dict[str, FileRecord]:
    """Give the files at :func:`begun_path` their final names. Returns their records."""
    records = {}
    for kind, suffix in SUFFIXES.items():
        path = begun_path(folder, kind)
        flush(path)
        records[kind] = FileRecord.of(path)
        os.replace(path, folder / (records[kind].sha256[:16] + suffix))
    return records


def publish_index(folder: Path, manifest: IndexManifest) -> None:
    """Make ``manifest`` that of the index, in one step: a reader gets the new one or the old one, whole."""
    flush(folder)  # the names of its files, before the manifest that names them
    replace(folder / MANIFEST, manifest.encode())


def _alone(folder: Path) -> bool:
    return all(writer.id == own_id() for writer in living(folder))


def _sweep(folder: Path) -> None:
    """Remove leftovers of dead writers, and files that the manifest does not name."""
    sweep(folder)
    if not _alone(folder):
        return  # on a file system without locks, another process may be about to name its files
    current: set[str] = set()
    try:
        manifest = IndexManifest.read(folder / MANIFEST)
        current |= {manifest.path_of(folder, kind).name for kind in SUFFIXES}
    except CorruptError as error:
        if isinstance(error.__cause__, OSError):
            return  # the manifest cannot be read now, so the files that it names are not known
    except (FileNotFoundError, MismatchError):
        pass  # there is no usable index
    for path in folder.iterdir():
        if path.name not in current and _OURS.fullmatch(path.name):
            path.unlink()


def remove_index(part: Part, name: str) -> None:
    """Delete an index. UsageError if there is none, BusyError while a process builds it."""
    folder = index_folder(part, name)
    if name not in index_names(part):
        names = ", ".join(index_names(part)) or "none"
        raise UsageError(f"part {part.name!r} has no index {name!r}; it has: {names}")
    with storage_errors(str(folder), UNCHANGED), exclusive(folder, index_words(part.name, name), None):
        (folder / MANIFEST).unlink()
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)
