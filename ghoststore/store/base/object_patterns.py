"""Patterns of object names, as ``glob`` has them for files."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from ghoststore.store.base.object_path import ObjectPath


def matching(pattern: ObjectPath) -> list[ObjectPath]:
    """The objects whose names match, sorted by name: what ``glob.glob(…, recursive=True)`` finds on a disk.

    Where only the last name is a pattern, its folder alone is listed; else all below the first name that is one.
    """
    names = pattern.parts[2:]
    first = next((place for place, name in enumerate(names) if glob.has_magic(name)), len(names) - 1)
    folder = type(pattern)(*pattern.parts[: 2 + first])
    wanted = names[first:]
    return sorted((path for inside, path in _in(folder, wanted) if _fits(inside, wanted)), key=str)


def _in(folder: ObjectPath, wanted: Sequence[str]) -> Iterator[tuple[Sequence[str], ObjectPath]]:
    """(names below ``folder``, object) of all that may match."""
    if len(wanted) > 1 or wanted[0] == "**":
        for name, path in folder.below():
            yield name.split("/"), path
        return
    try:
        listed = list(folder.iterdir())
    except FileNotFoundError:
        return
    for path in listed:
        if path.listed is not None:
            yield [path.name], path


def _fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not names
    if wanted[0] == "**" and _fits(names, wanted[1:]):
        return True
    if not names or (names[0].startswith(".") and not wanted[0].startswith(".")):
        return False
    if wanted[0] == "**":
        return _fits(names[1:], wanted)
    return fnmatchcase(names[0], wanted[0]) and _fits(names[1:], wanted[1:])
