"""A store: one directory of parts and runs."""

from __future__ import annotations

from pathlib import Path

import zarr

from ghoststore.errors import UsageError
from ghoststore.store.disk import flush, storage_errors
from ghoststore.store.layout import FORMAT_VERSION, check_name
from ghoststore.store.manifest import check_format
from ghoststore.store.part import Part, read_attributes


class Store:
    """One directory, readable by plain ``zarr.open``. Open it with :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The store at ``path``.

        UsageError if there is none, MismatchError for another format version, CorruptError if its
        metadata are damaged.
        """
        folder = Path(path)
        check_format(read_attributes(folder, "store"), str(folder / "zarr.json"))
        return cls(folder)

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """The store at ``path``, made if there is none. UsageError if a file or another folder stands there."""
        folder = Path(path)
        if (folder / "zarr.json").exists():
            return cls.open(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not a store; give --store another path, or empty it")
        with storage_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("parts", "runs"):
                zarr.create_group(folder / name, overwrite=False)
            zarr.create_group(folder, attributes={"ghoststore_format": FORMAT_VERSION}, overwrite=False)
            for entry in (folder / "parts", folder / "runs", folder):
                flush(entry / "zarr.json")
                flush(entry)
        return cls(folder)

    def part_path(self, name: str) -> Path:
        """Where the part called ``name`` is or would be."""
        return self.path / "parts" / check_name(name)

    def part_names(self) -> list[str]:
        """Names of the parts, sorted."""
        parts = self.path / "parts"
        if not parts.is_dir():
            return []
        return sorted(p.name for p in parts.iterdir() if not p.name.startswith(".") and (p / "zarr.json").exists())

    def part(self, name: str | None = None) -> Part:
        """The part called ``name``, as it stands now; without a name, the only one.

        UsageError if there is no such part, or several and no name.
        """
        names = self.part_names()
        if name is None:
            if len(names) == 1:
                return Part(self.part_path(names[0]))
            if not names:
                raise UsageError(f"{self.path} has no parts; `ghoststore build --store {self.path} …` makes one")
            raise UsageError(f"{self.path} has several parts; choose one with --part: {', '.join(names)}")
        if check_name(name) not in names:
            raise UsageError(f"{self.path} has no part {name!r}; it has: {', '.join(names) or 'none'}")
        return Part(self.part_path(name))
