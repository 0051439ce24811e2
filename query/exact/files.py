"""A folder of exact gradients: safetensors files with several rows each, and a manifest with their names and checksums.

A file that is not in the manifest does not exist. Each file first appears whole, and then a new manifest that names it
replaces the old one. So a killed writer leaves finished files, and a resumed one writes only the missing ones.

Legend: B rows of a file, P numbers of a gradient.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ghoststore.errors import CorruptError, MismatchError, UsageError
from ghoststore.hidden_errors import own_errors
from ghoststore.store.base.disk import appearing, exclusive, new_file, storage_errors, sweep
from ghoststore.store.base.manifest import Kind, Manifest, refuse_differences
from ghoststore.store.base.records import FileRecord, read_record, write_record
from ghoststore.store.base.writers import FOLDER as WRITERS

MANIFEST = "manifest.json"
VERSION = 1
LARGEST_MANIFEST = 256 << 20
KIND = Kind(
    name="folder of gradients",
    made="written",
    identity=("checkpoint", "tokenizer", "corpus", "tokens", "loss", "parameters", "dtype", "rows", "rows_per_file"),
    description=("source", "software", "compute"),
    parameter="out",
)


class GradientFiles:
    """A folder of gradients, open for writing. :meth:`writing` makes it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        """The manifest: the sections of `KIND`, and ``files`` by name, each with ``rows`` (first, one past the last),
        ``bytes``, ``sha256``, and ``losses`` and ``statuses`` (one for each row)."""

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, manifest: Manifest) -> Iterator[GradientFiles]:
        """Make the folder or open it to continue, and lock it against other processes.

        UsageError if there is something else at this path, MismatchError if it holds the gradients of another request,
        CorruptError for a damaged file, BusyError while another process writes.
        """
        with storage_errors(str(folder)):
            _refuse_others(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder, f"the folder {folder}", "out"):
                sweep(folder)
                for leftover in folder.glob(".tmp??????"):  # temporary files of safetensors, left by a killed writer
                    leftover.unlink(missing_ok=True)
                files = cls(folder, stored_manifest(folder, manifest) or {**manifest, "files": {}})
                files._check()
                files._publish()
                yield files

    @property
    def finished(self) -> list[str]:
        """Names of the finished files."""
        return list(self.manifest["files"])

    def write(
        self, rows: tuple[int, int], gradients_BP: Tensor, losses: list[float | None], statuses: list[str]
    ) -> None:
        """Write the file of the rows ``rows[0]`` to ``rows[1]``: one tensor ``gradients`` (B, P)."""
        path = self.folder / file_name(rows[0], self.manifest["rows_per_file"])
        with storage_errors(str(path)):
            path.unlink(missing_ok=True)  # left by a writer that was killed before the manifest named it
            with appearing(path) as temporary, new_file(temporary), own_errors():
                save_file({"gradients": gradients_BP}, temporary)
            entry = {
                "rows": list(rows),
                **asdict(FileRecord.of(path)),
                "losses": losses,
                "statuses": statuses,
            }
            files = {**self.manifest["files"], path.name: entry}
            self.manifest = {**self.manifest, "files": dict(sorted(files.items()))}
            self._publish()

    def _publish(self) -> None:
        write_record(self.folder / MANIFEST, {"ghoststore_gradients": VERSION, **self.manifest})

    def _check(self) -> None:
        """Drop files that are gone from the manifest, so that they are written again. CorruptError for a
        damaged one.
        """
        intact = {}
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if not path.exists():
                continue
            record = asdict(FileRecord.of(path))
            if record != {key: entry[key] for key in record}:
                raise CorruptError(
                    f"{path} is not what was written ({record['bytes']} bytes, SHA-256 {record['sha256'][:16]}…; "
                    f"written were {entry['bytes']}, {entry['sha256'][:16]}…). Remove it: the same command "
                    "writes it again"
                )
            intact[name] = entry
        self.manifest = {**self.manifest, "files": intact}


def stored_manifest(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of ``folder``, or None without one. MismatchError unless it is of the request ``wanted``,
    CorruptError if it is damaged.
    """
    try:
        stored = read_record(folder / MANIFEST, LARGEST_MANIFEST)
    except FileNotFoundError:
        return None
    except CorruptError as error:
        raise CorruptError(f"{error}: nothing says what the files in {folder} are. Give `out` another path") from error
    version = stored.pop("ghoststore_gradients", None)
    if version != VERSION:
        raise MismatchError(f"{folder} has gradients of version {version!r}; this release writes version {VERSION}")
    refuse_differences(stored, json.loads(json.dumps(wanted)), str(folder), KIND)
    return stored


def date_in(folder: Path) -> str | None:
    """The date that the chat template has written into the rows of ``folder``; None if it used no date, or if there is
    nothing to continue.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        stored: Manifest = read_record(folder / MANIFEST, LARGEST_MANIFEST)
        date: str | None = stored["tokens"]["template_date"]
    except (CorruptError, KeyError):  # a damaged manifest is refused when the folder is opened
        return None
    return date


def file_name(first_row: int, rows_per_file: int) -> str:
    """Name of the file whose first row is ``first_row``."""
    return f"gradients-{first_row // rows_per_file:05d}.safetensors"


def _refuse_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`out={folder}` is a file; give a folder")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        own_names = (f".{MANIFEST}.", WRITERS)
        foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(own_names)]
        if foreign:
            raise UsageError(f"`out={folder}` holds other files ({foreign[0]}, …); give a new or empty folder")
