"""What was computed from all committed rows of a part, kept in ``second_moment/`` beside its arrays.

A cache: checked before it is read, computed anew where it does not cover what is committed or is damaged, and deleting
it loses nothing. ``<name>.json`` says what it covers and names the file that holds the numbers, with its checksum; that
file is called after its own SHA-256, so that two processes that compute the same at once cannot mix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghoststore.errors import CorruptError, GhostStoreError
from ghoststore.progress import Progress
from ghoststore.store import Part
from ghoststore.store.base.disk import flush, publish_group, storage_errors
from ghoststore.store.base.opening import refuse_links
from ghoststore.store.base.records import MISSING, FileRecord, read_record, write_record
from ghoststore.store.base.writers import unfinished
from ghoststore.store.part.caches import SECOND_MOMENT as FOLDER

FORMAT = 1


class PartCache:
    """One name of the cache of ``part``."""

    def __init__(self, part: Part, name: str, progress: Progress) -> None:
        self.part, self.name, self.progress = part, name, progress
        self.folder = part.path / FOLDER
        self.covers = part.fingerprint()

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """What :meth:`keep` kept, or None. Nothing of another shape is read into memory."""

        def read(data: Path) -> dict[str, Tensor]:
            with safe_open(data, framework="pt") as file:
                if {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} != shapes:  # noqa: SIM118
                    raise ValueError(f"{data.name} has other tensors than this part")
                return {key: file.get_tensor(key) for key in shapes}

        held: dict[str, Tensor] | None = self._checked("safetensors", read)
        return held

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Keep ``tensors``. Where the store cannot be written, that is noted and nothing is kept."""

        def write(path: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

        try:
            self._publish(self._begun(write), "safetensors")
        except GhostStoreError as error:
            self._not_kept(error)

    def rows(self, shape: tuple[int, ...], fill: Callable[[NDArray[np.float64]], None]) -> NDArray[np.float64]:
        """An array of ``shape``, memory-mapped: what is held, or what ``fill`` now writes into one of zeros.

        Where the store cannot be written, that is noted, and the array is in memory.
        """

        def read(data: Path) -> NDArray[np.float64]:
            array = np.load(data, mmap_mode="r", allow_pickle=False)
            if array.shape != shape or array.dtype != np.float64:
                raise ValueError(f"{data.name} holds {array.dtype} of shape {array.shape}")
            return np.asanyarray(array)

        held: NDArray[np.float64] | None = self._checked("npy", read)
        if held is not None:
            return held
        try:
            begun = self._begun(lambda path: np.lib.format.open_memmap(path, "w+", np.float64, shape).flush())
        except GhostStoreError as error:
            self._not_kept(error)
            array = np.zeros(shape)
            fill(array)
            return array
        try:
            mapped = np.lib.format.open_memmap(begun, "r+")
            fill(mapped)
            mapped.flush()
        except BaseException:
            begun.unlink(missing_ok=True)
            raise
        try:
            self._publish(begun, "npy")
        except GhostStoreError as error:
            self._not_kept(error)
        return np.asanyarray(mapped)

    def _checked(self, form: str, read: Callable[[Path], Any]) -> Any:
        """What ``read`` gives of the file that is held, once it is what was written; None if there is none."""
        path = self.folder / f"{self.name}.json"
        try:
            value = read_record(path, within=self.part.path)
            if value["format"] != FORMAT or value["covers"] != self.covers:
                return None  # of other rows: computed anew
            if not re.fullmatch(rf"{re.escape(self.name)}-[0-9a-f]{{16}}\.{form}", value["data"]):
                raise ValueError(f"it names a file {value['data']!r:.80}")
            data = self.folder / value["data"]
            problem = FileRecord.from_json(value["file"]).damage(data, within=self.part.path)
            if problem == MISSING:
                return None  # just replaced by another process
            if problem is not None:
                raise ValueError(f"{data.name}: {problem}")
            return read(data)
        except FileNotFoundError:
            return None
        except CorruptError as error:
            self.progress.note(f"{error}: it is a cache, and is computed anew")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            self.progress.note(f"{path} is damaged ({error}): it is a cache, and is computed anew")
        return None

    def _begun(self, write: Callable[[Path], None]) -> Path:
        """A file that ``write`` wrote under a name that is not final. StorageError if the disk refuses."""
        refuse_links(self.folder.parent)
        path = unfinished(self.folder / self.name)
        with storage_errors(str(self.folder)):
            publish_group(self.folder, {})
            try:
                write(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    def _publish(self, begun: Path, form: str) -> None:
        """Give a finished file its name, and write the record that names it."""
        with storage_errors(str(self.folder)):
            flush(begun)
            record = FileRecord.of(begun)
            data = self.folder / f"{self.name}-{record.sha256[:16]}.{form}"
            os.replace(begun, data)
            flush(self.folder)
            write_record(
                self.folder / f"{self.name}.json",
                {"format": FORMAT, "covers": self.covers, "data": data.name, "file": asdict(record)},
            )
            for other in self.folder.glob(f"{self.name}-*.{form}"):
                if other != data and len(other.stem) == len(data.stem):
                    other.unlink(missing_ok=True)

    def _not_kept(self, error: GhostStoreError) -> None:
        self.progress.note(f"what was computed is not kept for the next query: {error}")


def keep_newest(part: Part, pattern: str, count: int) -> None:
    """Remove all but the newest ``count`` records that fit ``pattern``, and their files."""
    folder = part.path / FOLDER
    records = sorted(folder.glob(f"{pattern}.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for record in records[count:]:
        record.unlink(missing_ok=True)
        for data in folder.glob(f"{record.name.removesuffix('.json')}-*.npy"):
            data.unlink(missing_ok=True)
