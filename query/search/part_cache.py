"""Numbers computed from all committed rows of a part, cached in ``second_moment/`` beside its arrays.

An entry is checked before it is read. It is computed anew if it is damaged or does not cover what is committed now, so
deleting it loses nothing. ``<name>.json`` says what it covers and names the file of numbers, with its checksum. That
file is named after its own SHA-256: two processes that compute the same entry at once cannot mix their files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
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
from ghoststore.store.base.disk import flush, new_file, publish_group, storage_errors
from ghoststore.store.base.new_files import sweep
from ghoststore.store.base.opening import refuse_links
from ghoststore.store.base.records import MISSING, FileRecord, read_record, write_record
from ghoststore.store.base.writers import unfinished
from ghoststore.store.part.caches import SECOND_MOMENT as FOLDER

FORMAT = 1


class PartCache:
    """The entry ``name`` of the cache of ``part``."""

    def __init__(self, part: Part, name: str, progress: Progress) -> None:
        self.part, self.name, self.progress = part, name + part.tag, progress
        self.folder = part.caches / FOLDER
        self.covers = part.fingerprint()

    def tensors(self, shapes: Mapping[str, tuple[int, ...] | None]) -> dict[str, Tensor] | None:
        """The tensors that :meth:`keep` wrote, or None. Shapes are compared before anything is read into memory; None
        stands for any.
        """

        def read(data: Path) -> dict[str, Tensor]:
            with safe_open(data, framework="pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                if found.keys() != shapes.keys() or any(
                    shape not in (None, found[key]) for key, shape in shapes.items()
                ):
                    raise ValueError(f"{data.name} has other tensors than this part")
                return {key: file.get_tensor(key) for key in shapes}

        cached: dict[str, Tensor] | None = self._checked("safetensors", read)
        return cached

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Write ``tensors`` to the cache. If the store cannot be written, a note says so and nothing is kept."""

        def write(path: Path) -> None:
            with new_file(path):
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

        try:
            self._publish(self._written_aside(write), "safetensors")
        except GhostStoreError as error:
            self._not_kept(error)

    def rows(self, shape: tuple[int, ...], fill: Callable[[NDArray[np.float64]], None]) -> NDArray[np.float64]:
        """An array of ``shape``, memory-mapped: the cached one, or else one of zeros that ``fill`` fills now.

        If the store cannot be written, a note says so and the array is in memory.
        """

        def read(data: Path) -> NDArray[np.float64]:
            array = np.load(data, mmap_mode="r", allow_pickle=False)
            if array.shape != shape or array.dtype != np.float64:
                raise ValueError(f"{data.name} holds {array.dtype} of shape {array.shape}")
            return np.asanyarray(array)

        cached: NDArray[np.float64] | None = self._checked("npy", read)
        if cached is not None:
            return cached
        try:
            begun = self._written_aside(lambda path: np.lib.format.open_memmap(path, "w+", np.float64, shape).flush())
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
        """``read`` applied to the cached file, after its checksum is compared; None without a usable one."""
        path = self.folder / f"{self.name}.json"
        try:
            value = read_record(path, within=self.part.caches)
            if value["format"] != FORMAT or value["covers"] != self.covers:
                return None  # rows were committed since: computed anew
            if not re.fullmatch(rf"{re.escape(self.name)}-[0-9a-f]{{16}}\.{form}", value["data"]):
                raise ValueError(f"it names a file {value['data']!r:.80}")
            data = self.folder / value["data"]
            problem = FileRecord.from_json(value["file"]).damage(data, within=self.part.caches)
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

    def _written_aside(self, write: Callable[[Path], None]) -> Path:
        """The path of a new file with a temporary name, written by ``write``. StorageError if the disk refuses.

        Those that killed processes left are removed.
        """
        refuse_links(self.folder.parent)
        path = unfinished(self.folder / self.name)
        with storage_errors(str(self.folder)):
            self.part.caches.mkdir(parents=True, exist_ok=True)
            publish_group(self.folder, {})
            sweep(self.folder / self.name)
            try:
                write(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    def _publish(self, begun: Path, form: str) -> None:
        """Rename a finished file to its final name, and write the record that names it."""
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
            for old in self.folder.glob(f"{self.name}-*.{form}"):
                if old != data and len(old.stem) == len(data.stem):
                    old.unlink(missing_ok=True)

    def _not_kept(self, error: GhostStoreError) -> None:
        self.progress.note(f"what was computed is not kept for the next query: {error}")


def keep_newest(part: Part, pattern: str, count: int) -> None:
    """Remove all but the ``count`` newest records that match ``pattern``, and their files."""
    folder = part.caches / FOLDER
    written: dict[Path, float] = {}
    for record in folder.glob(f"{pattern}.json"):
        with suppress(FileNotFoundError):  # another query has just removed it
            written[record] = record.stat().st_mtime
    for record in sorted(written, key=written.__getitem__, reverse=True)[count:]:
        record.unlink(missing_ok=True)
        for data in folder.glob(f"{record.name.removesuffix('.json')}-*.npy"):
            data.unlink(missing_ok=True)
