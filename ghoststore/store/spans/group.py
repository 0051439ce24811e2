"""The common base of parts and runs: a sealed folder that appears whole, committed spans, and checked reads."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from ghoststore.errors import CorruptError, GhostStoreError, StorageError, UsageError
from ghoststore.store.base.disk import create_whole
from ghoststore.store.base.manifest import MOST_SPANS, Kind, Manifest, attributes_of, manifest_of
from ghoststore.store.base.object_path import ObjectPath, at_once
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import (
    open_regular,
    parse_json,
    read_bounded,
    size_and_beginning,
    size_of,
    size_open,
)
from ghoststore.store.base.records import MISSING, check_file, digests, json_digest, reading
from ghoststore.store.spans.commits import LARGEST_COMMIT, Commit, commit_path, committed
from ghoststore.store.spans.layout import CRC_BYTES, ArraySpec, SpanLayout, chunk_keys
from ghoststore.store.spans.soundness import damaged, exact_commit, record_name

LARGEST_METADATA = 64 << 20
MOST_CHUNKS = 1 << 17
"""Most chunks of an array in a span: the record names them all."""
LARGEST_ARRAY_METADATA = 1 << 20
FEW_ROWS = 1 << 24
MOST_TIMES = 64
"""For a number of each row in memory, a part may have at most FEW_ROWS rows, or MOST_TIMES the committed ones."""
CODECS = {"bytes", "vlen-utf8", "crc32c"}
"""Allowed codecs of arrays: none that expands a little data to much."""
if TYPE_CHECKING:
    from ghoststore.store.spans.reader import ReadAhead, WarmChunks

L = TypeVar("L", bound=SpanLayout)


def read_attributes(folder: Path, what: str) -> dict[str, Any]:
    """The attributes of the Zarr group at ``folder``, read as plain data in bounded memory.

    ``what`` is "store", "part" or "run". UsageError if there is none, CorruptError if it is damaged.
    """
    path = folder / "zarr.json"
    try:
        with reading(path):
            value = parse_json(read_bounded(path, LARGEST_METADATA, folder))
            if not isinstance(value, dict):
                raise ValueError("it is not a JSON object")
            attributes = value.pop("attributes", {})
            if value != {"zarr_format": 3, "node_type": "group"} or not isinstance(attributes, dict):
                raise ValueError("it does not describe a Zarr group")
            return attributes
    except (FileNotFoundError, NotADirectoryError):
        if what != "store" and folder.is_dir():
            raise CorruptError(f"{path} is missing") from None
        raise UsageError(f"there is no {what} at {folder}") from None


def group_problem(folder: Path, attributes: dict[str, Any]) -> str | None:
    """Why the group at ``folder`` does not have these ``attributes``; None if it does. Raises nothing."""
    try:
        present = read_attributes(folder, "store")
    except UsageError:
        return MISSING
    except CorruptError as error:
        return str(error)
    return None if present == attributes else f"its attributes are {present!r:.80}; {attributes} were written"


class Spanned(ABC, Generic[L]):
    """A part or a run in the state in which it was opened: later commits are not seen.

    Opening reads only its ``zarr.json`` and the names of its records.
    """

    kind: ClassVar[Kind]
    unit: ClassVar[str]
    """The unit of the first axis, in the plural."""
    grows: bool = False
    """Whether its length is not known yet: its arrays are longer."""
    ahead: ReadAhead | None = None
    """Reads chunks of an object store before they are needed, while somebody scans them."""
    warm: WarmChunks | None = None
    """Keeps chunks of an object store from one scan to the next, for who asks about them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.manifest: Manifest
        self.files: dict[str, str]
        """SHA-256 by path of every file that is written when it is made, except ``zarr.json``."""
        attributes = read_attributes(path, self.kind.name)
        self.manifest, self.files = manifest_of(attributes, str(path / "zarr.json"), self.kind)
        self.recorded = self.manifest
        """The manifest as it is on the disk: that of an open part lacks what is known of its stream by now."""
        try:
            self.layout: L = self.layout_of(self.manifest["storage"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptError(f"{path / 'zarr.json'}: its storage section cannot be used: {error!r}") from error
        if self.layout.spans > MOST_SPANS:
            raise CorruptError(f"{path / 'zarr.json'} tells of {self.layout.spans} spans; at most {MOST_SPANS} can be")
        chunks = self.layout.most_chunks()
        if chunks > MOST_CHUNKS:
            raise CorruptError(f"{path / 'zarr.json'} tells of spans of {chunks} files; at most {MOST_CHUNKS} can be")
        self.spans: list[int] = self._committed()
        """Committed spans, in order."""
        self._forget()

    def _forget(self) -> None:
        """Nothing of it has been read yet."""
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._metadata: dict[str, bytes] = {}
        self._sizes_checked = False

    @classmethod
    @abstractmethod
    def layout_of(cls, storage: Mapping[str, Any]) -> L:
        """The layout that a manifest's storage section describes. KeyError, TypeError or ValueError if it is none."""

    @abstractmethod
    def summarize(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
        """The counts in the record of a span with these arrays: rows by status, and tokens."""

    def _committed(self) -> list[int]:
        try:
            spans = committed(self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise damaged(self, [("commits", "there is no commits folder")]) from None
        except StorageError:
            raise
        except OSError as error:
            raise CorruptError(f"{self.path / 'commits'} cannot be read: {error.strerror}") from error
        beyond = [span for span in spans if span >= self.layout.spans]
        if beyond:
            problem = f"there are records of spans {beyond[:5]}, but only {self.layout.spans} spans"
            raise damaged(self, [(record_name(beyond[0]), problem)])
        return spans

    def home(self, span: int) -> tuple[Spanned[L], int]:
        """What holds ``span``, and its number there: other than itself only where several are read as one."""
        return self, span

    def homes(self, spans: Sequence[int]) -> Iterator[tuple[Spanned[L], list[int], int]]:
        """(what holds them, their numbers there, what is added to numbers of rows there) of ``spans``, in order."""
        yield self, list(spans), 0

    def seen(self, name: str, span: int, values: NDArray[Any]) -> NDArray[Any]:
        """``values`` of the array ``name`` in ``span``, read from its :meth:`home`, as this one has them."""
        return values

    @property
    def complete(self) -> bool:
        """Whether every span is committed."""
        return len(self.spans) == self.layout.spans

    @property
    def length(self) -> int:
        """Committed rows, or steps."""
        return sum(stop - start for start, stop in map(self.layout.span_of, self.spans))

    @property
    def domains(self) -> list[str]:
        """The names that the ``domain`` array indexes; -1 in it stands for no domain."""
        return list(self.manifest["corpus"]["domains"] or [])

    @property
    def repeated_ids(self) -> dict[str, int] | None:
        """The number of ``ids`` that occur more than once, and of ``samples`` with them; None if every id is unique."""
        repeated: dict[str, int] | None = self.manifest["corpus"]["repeated_ids"]
        return repeated

    def commit(self, span: int) -> Commit:
        """The record of a committed span. CorruptError if it is damaged or names other files than those of the span."""
        return exact_commit(self.path, self.layout, span)

    def commits(self) -> Iterator[Commit]:
        """The record of each committed span, in order. CorruptError if one is damaged."""
        yield from side_by_side(self.commit, self.spans, at_once(self.path))

    def fingerprint(self) -> str:
        """SHA-256 of the manifest and every commit record. It identifies the committed rows that a cache was made from.

        CorruptError if a record is missing.
        """

        def record(span: int) -> bytes:
            path = commit_path(self.path, span)
            try:
                return read_bounded(path, LARGEST_COMMIT, self.path)
            except (CorruptError, StorageError):
                raise
            except (OSError, ValueError) as error:
                raise CorruptError(f"{path} cannot be read: {error}") from error

        digest = hashlib.sha256(json_digest(self.manifest).encode())
        for span, data in zip(self.spans, side_by_side(record, self.spans, at_once(self.path)), strict=True):
            digest.update(f"{span}:".encode() + data)
        return digest.hexdigest()

    def spec(self, name: str) -> ArraySpec:
        """The specification of one array; UsageError if there is no such array."""
        for spec in self.layout.arrays():
            if spec.name == name:
                return spec
        raise UsageError(f"{self.kind.name} {self.name!r} has no array {name!r}")

    def digest_of(self, name: str, data: bytes) -> str:
        """The SHA-256 that one of ``files`` has with the bytes ``data``."""
        return hashlib.sha256(data).hexdigest()

    def check_file(self, name: str) -> None:
        """CorruptError unless ``name`` is one of ``files`` and has the bytes that were written."""
        self._refuse_outside(name)
        check_file(self.path / name, self.files.get(name, "not one of its files"), within=self.path)

    def _refuse_outside(self, name: str) -> None:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CorruptError(f"{self.path / 'zarr.json'} names a file outside the {self.kind.name}: {name!r:.200}")

    def array(self, name: str) -> zarr.Array[Any]:
        """The Zarr array ``name``. CorruptError if it does not fit the layout."""
        spec = self.spec(name)
        return self.open_array(spec, spec.count(self.layout.length))

    def open_array(self, spec: ArraySpec, length: int) -> zarr.Array[Any]:
        """The Zarr array of ``spec``. CorruptError if its metadata were changed or do not fit."""
        if spec.name not in self._arrays:
            shape, chunks = (length, *spec.columns), (spec.chunk_rows, *spec.columns)
            array = self.open_zarr(spec.name)
            if array.shape[self.grows :] != shape[self.grows :] or array.chunks != chunks:
                raise CorruptError(
                    f"array {self.path / spec.name} has shape {array.shape} in chunks of {array.chunks}; the "
                    f"manifest says {shape} in chunks of {chunks}"
                )
            self._arrays[spec.name] = array
        return self._arrays[spec.name]

    def array_metadata(self, name: str) -> bytes:
        """The ``zarr.json`` of an array, checked. One in an object store is read and checked once."""
        path = self.path / name / "zarr.json"
        if not isinstance(path, ObjectPath):
            self.check_file(f"{name}/zarr.json")
            return path.read_bytes()
        if name not in self._metadata:
            self._metadata[name] = self.checked_bytes(f"{name}/zarr.json", LARGEST_ARRAY_METADATA)
        return self._metadata[name]

    def checked_bytes(self, name: str, largest: int) -> bytes:
        """The bytes of one of ``files``. CorruptError as :meth:`check_file`, ValueError beyond ``largest`` bytes."""
        self._refuse_outside(name)
        try:
            data = read_bounded(self.path / name, largest, self.path)
        except FileNotFoundError:
            data = b""
        if self.digest_of(name, data) != self.files.get(name):
            self.check_file(name)  # says what is wrong
            raise CorruptError(f"{self.path / name} changed while it was read")
        return data

    def open_zarr(self, name: str) -> zarr.Array[Any]:
        """A Zarr array of any shape. CorruptError if its metadata were changed or name codecs that are not ours."""
        path = self.path / name / "zarr.json"
        if not isinstance(path, ObjectPath):
            self.check_file(f"{name}/zarr.json")
        with reading(path, "does not describe an array"):
            metadata_bytes = (
                self.array_metadata(name)
                if isinstance(path, ObjectPath)
                else read_bounded(path, LARGEST_ARRAY_METADATA, self.path)
            )
            metadata = parse_json(metadata_bytes)
            unknown = {str(codec["name"]) for codec in metadata["codecs"]} - CODECS
            if unknown or metadata["chunk_grid"]["name"] != "regular":
                raise ValueError(f"it has chunks or codecs that are not ours: {sorted(unknown)[:3]!r:.100}")
            if isinstance(self.path, ObjectPath):
                return in_memory({"zarr.json": metadata_bytes})  # its chunks are read by `slice`
            return zarr.open_array(self.path / name, mode="r", zarr_format=3)  # ignores metadata of other formats

    def check_chunk(self, spec: ArraySpec, key: str) -> None:
        """CorruptError unless the file ``key`` has the size of a chunk of ``spec``.

        The bytes of a chunk of strings are not known beforehand: it must state the number of strings of a chunk, and be
        large enough for them. Call this before allocating memory for a chunk, or letting a library read it.
        """
        path = self.path / key
        try:
            if spec.dtype is not str:
                size, expected = size_of(path, self.path), spec.chunk_bytes + CRC_BYTES
                if size != expected:
                    raise CorruptError(f"{path} has {size} bytes; {expected} were written")
                return
            size, start = size_and_beginning(path, 4, self.path)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptError(f"{path} is missing, though its span is committed") from None
        self._check_strings(spec, path, size, start)

    def _chunk_bytes(self, spec: ArraySpec, key: str) -> bytes:
        """The bytes of a chunk, checked as by :meth:`check_chunk` before they are read."""
        path = self.path / key
        try:
            with open_regular(path, self.path) as file:
                size = size_open(file)
                if spec.dtype is str:
                    start = file.read(4) or b""
                    self._check_strings(spec, path, size, start)
                    return start + file.readall()
                if size != spec.chunk_bytes + CRC_BYTES:
                    raise CorruptError(f"{path} has {size} bytes; {spec.chunk_bytes + CRC_BYTES} were written")
                return file.readall()
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing, though its span is committed") from None

    def _check_strings(self, spec: ArraySpec, path: Path, size: int, start: bytes) -> None:
        """CorruptError unless a chunk of strings with these first four bytes can be one of ``spec``."""
        count = int.from_bytes(start, "little")
        if count != spec.chunk_rows or size < 4 + 4 * count + CRC_BYTES:
            raise CorruptError(
                f"{path} is not what was written: {count} strings in {size} bytes, where {spec.chunk_rows} are expected"
            )

    def check_sizes(self, spec: ArraySpec, spans: Sequence[int]) -> None:
        """Check every chunk of ``spans`` as :meth:`check_chunk`, before memory for all of them is allocated."""
        if isinstance(self.path, ObjectPath):  # a listing tells of a thousand at a time
            folder = self.path / spec.name
            sizes = {f"{spec.name}/{name}": path.stat().st_size for name, path in folder.below()}
            for key in (key for span in spans for key in self.layout.chunk_keys(spec, span)):
                if sizes.get(key) != spec.chunk_bytes + CRC_BYTES:
                    self.check_chunk(spec, key)
            return
        for span in spans:
            for key in self.layout.chunk_keys(spec, span):
                self.check_chunk(spec, key)

    def bear_out(self, spans: Sequence[int] | None = None) -> None:
        """CorruptError unless the files of ``spans`` (default: all committed) are as large as the manifest says.

        Call it before allocating memory for a value of each row (or step). It checks the smallest array, once.
        """
        if self._sizes_checked:
            return
        numeric = [spec for spec in self.layout.arrays() if spec.dtype is not str and spec.every == 1]
        smallest = min(numeric, key=lambda spec: spec.width * spec.dtype.itemsize)
        self.check_sizes(smallest, self.spans if spans is None else spans)
        self._sizes_checked = spans is None

    def refuse_hollow(self) -> None:
        """CorruptError if the length in the manifest is out of proportion to what is committed.

        Call it before allocating memory for a number of each row (or step), committed or not.
        """
        if self.layout.length > max(FEW_ROWS, MOST_TIMES * self.length):
            raise CorruptError(
                f"{self.path / 'zarr.json'} tells of {self.layout.length:,} {self.unit}, of which {self.length:,} are "
                f"committed: too few to keep a number of each in memory. Where the {self.kind.name} is yours, go on "
                "with it first"
            )
        self.bear_out()

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows (or steps) ``start`` to ``stop`` of one array.

        CorruptError naming the array if a checksum does not hold or a chunk is missing. UsageError if a span is not
        committed.
        """
        spec, present = self.spec(name), set(self.spans)
        for span in range(start // self.layout.span_length, -(-stop // self.layout.span_length)):
            if span not in present:
                raise UsageError(
                    f"{self.unit} {start} to {stop} of {self.kind.name} {self.name!r} are not committed (span {span})"
                )
            for key in self.layout.chunk_keys(spec, span) if not isinstance(self.path, ObjectPath) else ():
                self.check_chunk(spec, key)
        return self.slice(spec, spec.count(self.layout.length), *spec.entries(start, stop))

    def slice(self, spec: ArraySpec, length: int, start: int, stop: int) -> NDArray[Any]:
        """Read entries through Zarr, whose errors become CorruptError. Call :meth:`check_chunk` before.

        Chunks in an object store are checked here, several at a time: each is one request.
        """
        try:
            array = self.open_array(spec, length)
            if isinstance(self.path, ObjectPath) and start < stop:
                keys = chunk_keys(spec, start * spec.every, stop * spec.every)
                read = side_by_side(partial(self._chunk_bytes, spec), keys, at_once(self.path))
                chunks = {key.removeprefix(f"{spec.name}/"): data for key, data in zip(keys, read, strict=True)}
                array = in_memory({"zarr.json": self.array_metadata(spec.name), **chunks})
            return np.asarray(array[start:stop])
        except GhostStoreError:
            raise
        except (ValueError, RuntimeError, OSError, TypeError, KeyError) as error:
            raise CorruptError(f"{self.path / spec.name}, {start} to {stop}: {error}") from error


def in_memory(files: Mapping[str, bytes]) -> zarr.Array[Any]:
    """The array with these files, by path in its folder."""
    prototype = default_buffer_prototype()
    return zarr.open_array(
        MemoryStore({name: prototype.buffer.from_bytes(data) for name, data in files.items()}), mode="r", zarr_format=3
    )


def create_array(group: zarr.Group, spec: ArraySpec, length: int) -> zarr.Array[Any]:
    """Make an array of ``spec`` at its full length, without chunks. A path in its name makes groups."""
    *folders, name = spec.name.split("/")
    for folder in folders:
        group = group.require_group(folder)
    return group.create_array(
        name,
        shape=(length, *spec.columns),
        chunks=(spec.chunk_rows, *spec.columns),
        dtype=spec.dtype,
        compressors=[Crc32cCodec()],
        fill_value=spec.fill,
        dimension_names=spec.axes[: 1 + len(spec.columns)],
        config={"write_empty_chunks": True},
    )


def create(path: Path, manifest: Manifest, fill: Callable[[zarr.Group], None]) -> None:
    """Make an empty part or run in one step: it appears whole or not at all. Do nothing if it exists.

    ``fill`` makes its arrays. StorageError if the disk refuses.
    """
    create_whole(path, lambda folder: _fill(folder, manifest, fill))


def _fill(folder: Path, manifest: Manifest, fill: Callable[[zarr.Group], None]) -> None:
    """Write all files of a new part or run to the empty ``folder``."""
    group = zarr.create_group(folder)
    group.create_group("commits")
    fill(group)
    files = digests(folder, (file for file in folder.rglob("*") if file != folder / "zarr.json"))
    group.attrs.put(attributes_of(manifest, files))
