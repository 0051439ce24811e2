"""A part: creating it whole, opening it at one moment, and reading what is committed.

Legend: N rows, D numbers of a vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.commits import Commit, committed, read_commit
from ghoststore.store.disk import create_whole
from ghoststore.store.encoding import Encoding, encoding
from ghoststore.store.layout import ArraySpec, PartLayout
from ghoststore.store.manifest import Manifest, layout_of, seal, unseal

LARGEST_METADATA = 64 << 20
SPAN_TABLE = "span_start"


def read_attributes(folder: Path, what: str) -> dict[str, Any]:
    """The attributes of the Zarr group at ``folder``, read as data alone, in bounded memory.

    UsageError if there is none, CorruptError if it is damaged.
    """
    path = folder / "zarr.json"
    try:
        if path.stat().st_size > LARGEST_METADATA:
            raise CorruptError(f"{path} is {path.stat().st_size} bytes: not metadata of ghoststore")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        attributes = value.pop("attributes", {})
        if value != {"zarr_format": 3, "node_type": "group"} or not isinstance(attributes, dict):
            raise ValueError("it does not describe a Zarr group")
        return attributes
    except (FileNotFoundError, NotADirectoryError):
        if what == "part" and folder.is_dir():
            raise CorruptError(f"{path} is missing") from None
        raise UsageError(f"there is no {what} at {folder}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path} is damaged: {error}") from error


class Part:
    """One build, as it stood when it was opened: later commits are not seen.

    Opened by :meth:`ghoststore.Store.part`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.manifest: Manifest
        self.files: dict[str, str]
        """SHA-256, by path, of every file that is written when the part is made, ``zarr.json`` aside."""
        self.manifest, self.files = unseal(read_attributes(path, "part"), str(path / "zarr.json"))
        self.layout: PartLayout = layout_of(self.manifest)
        try:
            spans = committed(path)
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptError(f"{path} has no commits folder") from None
        beyond = [span for span in spans if span >= self.layout.spans]
        if beyond:
            raise CorruptError(f"{path} has records of spans {beyond[:5]}, but only {self.layout.spans} spans")
        self.spans: list[int] = spans
        """Committed spans, in order."""
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @property
    def complete(self) -> bool:
        """Whether every span is committed."""
        return len(self.spans) == self.layout.spans

    @property
    def rows(self) -> int:
        """Committed rows."""
        return sum(stop - start for start, stop in map(self.layout.span_of, self.spans))

    @property
    def encoding(self) -> Encoding:
        """How ``vectors`` are stored."""
        return encoding(self.layout.dtype)

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """(name, first column, one past the last) of each block with a norm of its own."""
        return [(str(name), int(start), int(stop)) for name, start, stop in self.manifest["storage"]["groups"]]

    @property
    def domains(self) -> list[str]:
        """Names that the ``domain`` array indexes; -1 there is no domain."""
        return list(self.manifest["corpus"]["domains"] or [])

    def commit(self, span: int) -> Commit:
        """The record of a committed span."""
        return read_commit(self.path, span)

    def spec(self, name: str) -> ArraySpec:
        """The specification of one array; UsageError if the part has no such array."""
        for spec in self.layout.arrays():
            if spec.name == name:
                return spec
        raise UsageError(f"part {self.name!r} has no array {name!r}")

    def check_file(self, name: str) -> None:
        """CorruptError unless ``name``, one of ``files``, has the bytes that the part was made with."""
        try:
            found = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
        except FileNotFoundError:
            raise CorruptError(f"{self.path / name} is missing") from None
        except OSError as error:
            raise CorruptError(f"{self.path / name} cannot be read: {error}") from error
        if found != self.files.get(name):
            raise CorruptError(f"{self.path / name} is not what was written: its SHA-256 does not hold")

    def array(self, name: str) -> zarr.Array[Any]:
        """The Zarr array, checked against the layout; CorruptError if it is not as described."""
        if name not in self._arrays:
            spec = self.spec(name)
            self.check_file(f"{name}/zarr.json")
            shape = (self.layout.rows,) if spec.columns is None else (self.layout.rows, spec.columns)
            found = zarr.open_array(self.path / name, mode="r")
            if found.shape != shape or found.chunks[0] != spec.chunk_rows:
                raise CorruptError(
                    f"array {self.path / name} has shape {found.shape} in chunks of {found.chunks[0]} rows; the "
                    f"manifest says {shape} in chunks of {spec.chunk_rows}"
                )
            self._arrays[name] = found
        return self._arrays[name]

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start`` to ``stop`` of one array, all of committed spans.

        CorruptError naming the array if a checksum does not hold or a chunk is missing.
        """
        spec, present = self.spec(name), set(self.spans)
        for span in range(start // self.layout.span_rows, -(-stop // self.layout.span_rows)):
            if span not in present:
                raise UsageError(f"rows {start} to {stop} of part {self.name!r} are not committed (span {span})")
            for key in self.layout.chunk_keys(spec, span):
                if not (self.path / key).exists():
                    raise CorruptError(f"{self.path / key} is missing, though span {span} is committed")
        try:
            return np.asarray(self.array(name)[start:stop])
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptError(f"{self.path / name}, rows {start} to {stop}: {error}") from error

    def read_rows(self, name: str, rows: Sequence[int]) -> list[Any]:
        """One value for each of ``rows``, in their order; each span is read once."""
        size = self.layout.span_rows
        wanted: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            wanted.setdefault(row // size, []).append(place)
        values: list[Any] = [None] * len(rows)
        for span, places in wanted.items():
            start, stop = self.layout.span_of(span)
            data = self.read(name, start, stop)
            for place in places:
                values[place] = data[rows[place] - start]
        return values


def span_table(part: Part) -> NDArray[np.int64]:
    """(spans, 5) of a part: source row, window, file, byte offset and content digest where each span begins."""
    for name in part.files:
        if name.startswith(f"{SPAN_TABLE}/"):
            part.check_file(name)
    return np.asarray(zarr.open_array(part.path / SPAN_TABLE, mode="r")[...])


def create_part(path: Path, manifest: Manifest, spans: NDArray[np.int64]) -> Part:
    """Make a part with no rows yet, in one step: it appears whole or not at all.

    If it exists, that one is opened. ``spans`` is kept beside the arrays, see :func:`span_table`. BusyError if
    another process is making it.
    """
    create_whole(path, f"part {path.name!r}", lambda folder: _fill(folder, manifest, spans))
    return Part(path)


def _fill(folder: Path, manifest: Manifest, spans: NDArray[np.int64]) -> None:
    """Everything of a new part, in the empty ``folder``."""
    group = zarr.create_group(folder)
    group.create_group("commits")
    _create_arrays(group, layout_of(manifest), spans)
    files = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / "zarr.json"
    }
    group.attrs.put(seal(manifest, files))


def _create_arrays(group: zarr.Group, layout: PartLayout, spans: NDArray[np.int64]) -> None:
    table = group.create_array(
        SPAN_TABLE, shape=spans.shape, chunks=spans.shape, dtype="<i8", compressors=[Crc32cCodec()], fill_value=0
    )
    table[...] = spans
    for spec in layout.arrays():
        columns = () if spec.columns is None else (spec.columns,)
        group.create_array(
            spec.name,
            shape=(layout.rows, *columns),
            chunks=(spec.chunk_rows, *columns),
            dtype=spec.dtype,
            compressors=[Crc32cCodec()],
            fill_value="" if spec.dtype is str else 0,
            dimension_names=("row", "column")[: 1 + len(columns)],
            config={"write_empty_chunks": True},
        )
