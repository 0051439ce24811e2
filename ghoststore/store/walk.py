"""Lists the files of a part or run by kind: data, leftovers of writers, and unknown files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ghoststore.store.base.disk import UNFINISHED
from ghoststore.store.base.manifest import OPEN
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.part.caches import FOLDERS, SECOND_MOMENT, cache_groups
from ghoststore.store.part.indexes import FOLDER as INDEX
from ghoststore.store.part.indexes import is_index_file
from ghoststore.store.part.part import Part
from ghoststore.store.part.stream import STATES
from ghoststore.store.run.run import Run
from ghoststore.store.spans.group import Spanned
from ghoststore.store.spans.layout import first_row
from ghoststore.store.spans.soundness import undecided

Kind = Literal["data", "leftover", "unknown"]
_RECORD = re.compile(r"commits/[0-9]{8}\.json")
JOURNAL = re.compile(r"journal/(?:([0-9]{8})\.log(?:/[0-9]{8})?|skipped\.json)")
"""Also the entries of a journal in an object store."""
_CHUNK = re.compile(r"([^/]+)/c/([0-9]{1,12})((?:/0)*)")
_MOMENT = re.compile(rf"{SECOND_MOMENT}/.*-[0-9a-f]{{16}}\.(safetensors|npy)")


def is_unfinished(name: str) -> bool:
    """Whether the name of a file or folder marks it as unfinished."""
    return name.startswith(".") or UNFINISHED.fullmatch(name) is not None


def entries_below(folder: Path, below: str = "", *, deep: bool = True) -> Iterator[tuple[str, Path, str | None]]:
    """(path in ``folder``, path, why it cannot be listed or None) of every file below, sorted.

    An unfinished folder is one entry. Links are not followed. Without ``deep`` only the folder itself is listed.
    """
    if isinstance(folder, ObjectPath):
        yield from _objects_below(folder / below if below else folder, deep)
        return
    try:
        with os.scandir(folder / below) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except FileNotFoundError:
        return  # removed meanwhile
    except OSError as error:
        yield below or ".", folder / below, f"cannot be listed: {error}"
        return
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        if deep and entry.is_dir(follow_symlinks=False) and not is_unfinished(entry.name):
            yield from entries_below(folder, name)
        else:
            yield name, folder / name, None


def _objects_below(folder: ObjectPath, deep: bool) -> Iterator[tuple[str, Path, str | None]]:
    """:func:`entries_below` of an object store."""
    if not deep:
        with suppress(FileNotFoundError):
            for path in sorted(folder.iterdir(), key=lambda path: path.name):
                yield path.name, path, None
        return
    seen = ""
    for name, path in sorted(folder.below(), key=lambda item: item[0]):
        parts = name.split("/")
        unfinished = next((i for i, part in enumerate(parts[:-1], 1) if is_unfinished(part)), None)
        if unfinished is None:
            yield name, path, None
        elif (whole := "/".join(parts[:unfinished])) != seen:
            seen = whole
            yield whole, folder / whole, None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for what cannot be read."""
    if isinstance(path, ObjectPath):
        return path.stat().st_size if path.is_file() else sum(found.stat().st_size for _, found in path.below())
    try:
        if not path.is_dir() or path.is_symlink():
            return path.lstat().st_size
        return sum(size_of(entry) for entry in path.iterdir())
    except OSError:
        return 0


class Census:
    """Classifies the files of ``source``. ``caches`` are the files that the records of its caches name."""

    def __init__(self, source: Spanned[Any], caches: set[str]) -> None:
        self._source = source
        self._specs = {spec.name: spec for spec in source.layout.arrays()}
        self._spans, self._undecided = set(source.spans), undecided(source.path)
        groups = cache_groups(source) if isinstance(source, Part) else []
        self._caches = {*caches, *(f"{group}/zarr.json" for group in groups)}

    def kind_of(self, name: str) -> Kind:
        """The kind of the file ``name``, a path in the part or run."""
        if is_unfinished(name.rpartition("/")[2]):
            return "leftover"
        if name == "zarr.json" or name in self._source.files or name in self._caches or _RECORD.fullmatch(name):
            return "data"
        if isinstance(self._source, Part) and name == STATES and self._source.layout.stream is not None:
            return "data" if self._source.layout.stream == OPEN else "leftover"
        if isinstance(self._source, Run) and (match := JOURNAL.fullmatch(name)):
            # The journal of a committed span is one that its writer did not remove any more.
            return "leftover" if match[1] and int(match[1]) in self._spans else "data"
        if match := _CHUNK.fullmatch(name):
            return self._chunk(name, match[1], int(match[2]))
        if name.partition("/")[0] in FOLDERS and isinstance(self._source, Part):
            return "leftover" if self._is_of_cache(name) else "unknown"
        return "unknown"

    def _chunk(self, name: str, array: str, number: int) -> Kind:
        spec, layout = self._specs.get(array), self._source.layout
        if spec is None or first_row(spec, number) >= layout.length:
            return "unknown"
        span = first_row(spec, number) // layout.span_length
        if name not in layout.chunk_keys(spec, span):
            return "unknown"
        # Without a record a writer's intent names it, or the record is lost, which is reported elsewhere.
        return "leftover" if span not in self._spans and span in self._undecided else "data"

    def _is_of_cache(self, name: str) -> bool:
        """Whether a file that no cache record names has the name of a cache file: a process did not finish it."""
        if _MOMENT.fullmatch(name):
            return True
        folder, _, file = name.rpartition("/")
        return folder.count("/") == 1 and folder.startswith(f"{INDEX}/") and is_index_file(file)
