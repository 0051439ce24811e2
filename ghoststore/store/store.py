"""A store: one directory of parts and runs."""

from __future__ import annotations

from pathlib import Path

from ghoststore.errors import CorruptError, StorageError, UsageError
from ghoststore.store.base.disk import UNFINISHED, flush, publish_group, storage_errors
from ghoststore.store.base.manifest import PART, RUN, Kind, check_format
from ghoststore.store.base.names import FORMAT_VERSION, check_name, is_name
from ghoststore.store.base.object_folders import unfinished_folder
from ghoststore.store.base.object_path import ObjectPath, location
from ghoststore.store.part.part import Part
from ghoststore.store.run.run import Run
from ghoststore.store.spans.group import read_attributes
from ghoststore.store.spans.soundness import refuse_lost

ROOT = "zarr.json"
ROOT_ATTRIBUTES = {"ghoststore_format": FORMAT_VERSION}
"""Attributes of the store's own group; the groups ``parts`` and ``runs`` have none."""


def _is_of_creation(entry: Path) -> bool:
    """Whether ``entry`` is one that the creation of a store makes before the store's own ``zarr.json``."""
    if UNFINISHED.fullmatch(entry.name):
        return True
    files = _entries(entry) if entry.name in ("parts", "runs") and entry.is_dir() else [entry]
    return all(file.name == "zarr.json" or UNFINISHED.fullmatch(file.name) is not None for file in files)


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
        folder = location(path)
        try:
            attributes = read_attributes(folder, "store")
        except (UsageError, CorruptError) as error:
            if holds_anything(folder):
                raise _without_root(folder) from error
            raise
        check_format(attributes, str(folder / ROOT))
        return cls(folder)

    @classmethod
    def examined(cls, path: str | Path) -> Store:
        """As :meth:`open`, but a store with a part or a run may lack its own ``zarr.json``."""
        folder = location(path)
        try:
            return cls.open(folder)
        except CorruptError:
            if holds_anything(folder):
                return cls(folder)
            raise

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """The store at ``path``, made if there is none. UsageError if a file or another folder is there.

        A creation that was interrupted is completed.
        """
        folder = location(path)
        cls.refuse_others(folder)
        if not (folder / ROOT).exists():
            with storage_errors(str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("parts", "runs"):
                    publish_group(folder / name, {})
                publish_group(folder, ROOT_ATTRIBUTES)
                flush(folder.parent)
        return cls.open(folder)

    @staticmethod
    def refuse_others(folder: Path) -> None:
        """UsageError if :meth:`create` would touch something that is not a store."""
        if (folder / ROOT).exists() or not folder.exists():
            return
        if holds_anything(folder):
            raise _without_root(folder)
        if not (isinstance(folder, ObjectPath) or folder.is_dir()) or not all(
            _is_of_creation(entry) for entry in _entries(folder)
        ):
            raise UsageError(f"{folder} exists and is not a store; give `store` another path, or empty it")

    def part_path(self, name: str) -> Path:
        """The path of the part ``name``, whether it exists or not."""
        return self.path / "parts" / check_name(name)

    def part_names(self) -> list[str]:
        """Names of the parts, sorted: every folder in ``parts``, so that a damaged part does not disappear."""
        return _folders(self.path / "parts")

    def part(self, name: str | None = None) -> Part:
        """Open the part ``name``, or the only one.

        UsageError if there is no such part, or several and no name. CorruptError if its metadata are damaged or it lost
        records of spans.
        """
        part = Part(self.part_path(self._choose(PART, name, self.part_names(), "build")))
        refuse_lost(part)
        return part

    def damaged_part(self, name: str) -> Part:
        """As :meth:`part`, but records of spans may be lost. CorruptError if metadata or the folder of records is."""
        return Part(self.part_path(self._choose(PART, name, self.part_names(), "build")))

    def run_path(self, name: str) -> Path:
        """The path of the training run ``name``, whether it exists or not."""
        return self.path / "runs" / check_name(name, "run")

    def run_names(self) -> list[str]:
        """Names of the training runs, sorted: every folder in ``runs``."""
        return _folders(self.path / "runs")

    def run(self, name: str | None = None) -> Run:
        """Open the training run ``name``, or the only one. Raises as :meth:`part`."""
        run = Run(self.run_path(self._choose(RUN, name, self.run_names(), "train")))
        refuse_lost(run)
        return run

    def damaged_run(self, name: str) -> Run:
        """As :meth:`run`, but records of spans may be lost."""
        return Run(self.run_path(self._choose(RUN, name, self.run_names(), "train")))

    def chosen(self, part: str | None, run: str | None) -> tuple[list[str], list[str]]:
        """The names ``part`` and ``run`` as lists of parts and of runs; all of the store if both are None."""
        if part is None and run is None:
            return self.part_names(), self.run_names()
        return [name for name in (part,) if name is not None], [name for name in (run,) if name is not None]

    def _choose(self, kind: Kind, name: str | None, names: list[str], command: str) -> str:
        if name is None:
            if len(names) == 1:
                return names[0]
            if not names:
                raise UsageError(
                    f"{self.path} has no {kind.name}s; `ghoststore {command} --store {self.path} …` makes one"
                )
            raise UsageError(f"{self.path} has several {kind.name}s; choose one with `{kind.name}`: {', '.join(names)}")
        if check_name(name, kind.name) not in names:
            raise UsageError(f"{self.path} has no {kind.name} {name!r}; it has: {', '.join(names) or 'none'}")
        return name


def holds_anything(folder: Path) -> bool:
    """Whether ``folder`` holds a part or a run, with or without the store's own ``zarr.json``."""
    return any(
        (folder / kind / name / ROOT).is_file() for kind in ("parts", "runs") for name in _folders(folder / kind)
    )


def _without_root(folder: Path) -> CorruptError:
    return CorruptError(
        f"{folder / ROOT} is missing or damaged, though parts or runs are there; `ghoststore repair --store {folder}` "
        "restores it"
    )


def _entries(folder: Path) -> list[Path]:
    """What is in ``folder``; nothing if the last object in it was removed just now."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _folders(path: Path) -> list[str]:
    try:
        if not path.is_dir():
            return []
        names = sorted(p.name for p in _entries(path) if is_name(p.name) and p.is_dir())
        if isinstance(path, ObjectPath):  # a folder that is being made has its names already
            return [name for name in names if not unfinished_folder(path / name)]
        return names
    except StorageError:
        raise
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}") from error
