"""A folder of exact gradients: safetensors files of some rows each, and a manifest that names and checks them.

What the manifest does not name does not exist. A file appears whole, then the manifest that names it replaces the one
before; so a writer that is killed leaves rows that are finished, and resuming is writing the others.

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
from ghoststore.store.base.disk import appearing, exclusive, storage_errors, sweep
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
    """Writes a folder of gradients. Made by :meth:`writing`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        """As `MANIFEST` holds it: the sections of `KIND`, and ``files`` by name: ``rows`` (first, one past the last),
        ``bytes``, ``sha256``, ``losses`` and ``statuses``, one a row."""

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, manifest: Manifest) -> Iterator[GradientFiles]:
        """The folder, made or gone on with, locked against other processes.

        UsageError if something else stands there, MismatchError if it holds the gradients of another request,
        CorruptError for a file that is not what was written, BusyError while another process writes.
        """
        with storage_errors(str(folder)):
            _refuse_others(folder)
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive(folder, f"the folder {folder}", "out"):
                sweep(folder)
                for other in folder.glob(".tmp??????"):  # what safetensors writes before it has the name we gave
                    other.unlink(missing_ok=True)
                files = cls(folder, stored_manifest(folder, manifest) or {**manifest, "files": {}})
                files._check()
                files._publish()
                yield files

    @property
    def there(self) -> list[str]:
        """Names of the files that are finished."""
        return list(self.manifest["files"])

    def write(
        self, rows: tuple[int, int], gradients_BP: Tensor, losses: list[float | None], statuses: list[str]
    ) -> None:
        """The file of these rows: one tensor ``gradients`` (B, P)."""
        path = self.folder / file_name(rows[0], self.manifest["rows_per_file"])
        with storage_errors(str(path)):
            path.unlink(missing_ok=True)  # of a writer that died before the manifest named it
            with appearing(path) as temporary, own_errors():
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
        """Forget files that are gone, so that they are written again; CorruptError for one that is damaged."""
        whole = {}
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
            whole[name] = entry
        self.manifest = {**self.manifest, "files": whole}


def stored_manifest(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of ``folder`` if there is one and it is of the same request; raises as `GradientFiles.writing`."""
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
    """The date that the chat template wrote into the rows of ``folder``; None where it asked for none, and where there
    is nothing to go on with.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        stored: Manifest = read_record(folder / MANIFEST, LARGEST_MANIFEST)
        date: str | None = stored["tokens"]["template_date"]
    except (CorruptError, KeyError):  # what is damaged is refused where it is opened
        return None
    return date


def file_name(first_row: int, rows_per_file: int) -> str:
    """Name of the file whose first row is ``first_row``."""
    return f"gradients-{first_row // rows_per_file:05d}.safetensors"


def _refuse_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`out={folder}` is a file; give a folder")
    if folder.is_dir() and not (folder / MANIFEST).exists():
        ours = (f".{MANIFEST}.", WRITERS)
        strange = [entry.name for entry in folder.iterdir() if not entry.name.startswith(ours)]
        if strange:
            raise UsageError(f"`out={folder}` holds other files ({strange[0]}, …); give a new or empty folder")
