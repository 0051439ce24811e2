"""A part: creating it, opening it, and reading its committed rows.

Legend: N rows, D numbers of a vector.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from ghoststore.errors import CorruptError
from ghoststore.store.base.manifest import OPEN, PART, Manifest, as_begun, open_rows
from ghoststore.store.base.object_path import ObjectPath, at_once, local_cache
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import read_bounded, size_of
from ghoststore.store.base.records import json_digest, reading
from ghoststore.store.part.encoding import Encoding, encoding
from ghoststore.store.part.layout import PartLayout
from ghoststore.store.part.status import FIRST_UNUSABLE, Status
from ghoststore.store.part.stream import StreamEntry, read_entry, stream_table, with_length
from ghoststore.store.spans.gathered import gather
from ghoststore.store.spans.group import LARGEST_ARRAY_METADATA, Spanned, create, create_array, in_memory
from ghoststore.store.spans.layout import ArraySpec
from ghoststore.store.spans.reader import read_span

SPAN_TABLE = "span_start"
OF_UNION = re.compile(r".*-union-[0-9a-f]{8}")
"""Names of caches that cover other parts, too: see :attr:`Part.tag`."""


class Part(Spanned[PartLayout]):
    """A build in the state in which it was opened: later commits are not seen.

    Open it with :meth:`ghoststore.Store.part`.
    """

    kind = PART
    unit = "rows"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen_last: StreamEntry | None = None
        """Of an open part what its last committed span says; None without one, and for other parts."""
        if self.layout.stream == OPEN:
            self._see_stream()

    def _see_stream(self) -> None:
        """Take what is known of a stream by now from the entry of the last committed span."""
        self.grows, size = True, self.layout.span_rows
        if not self.spans:
            self.grow(size)
            return
        self.seen_last = last = read_entry(self, self.spans[-1])
        before = self.spans[-1] * size
        if not before < last.rows <= before + size or (last.rows < before + size and not last.ended):
            raise CorruptError(f"{self.path}: span {self.spans[-1]} of its stream ends at row {last.rows}, it says")
        # One span more than are committed: a part whose end is not known is not complete.
        self.grow(last.rows if last.ended else last.rows + size)
        known = {"fingerprint": last.fingerprint, "samples": last.rows, "domains": list(last.domains) or None}
        self.manifest = {**self.manifest, "corpus": {**self.manifest["corpus"], **known}}

    def grow(self, rows: int) -> None:
        """Make room for ``rows`` rows in an open part."""
        self.layout = replace(self.layout, rows=rows)
        self.manifest = {**self.manifest, "storage": {**self.manifest["storage"], "rows": rows}}

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest; of a part of a stream of that at its beginning. It is the same while a part grows,
        and another if the part was removed and built anew.
        """
        return json_digest(as_begun(self.manifest))

    @property
    def open(self) -> bool:
        """Whether it is built from a stream whose end was not seen yet."""
        return self.layout.stream == OPEN and not self.complete

    def digest_of(self, name: str, data: bytes) -> str:
        # The length of arrays of an open part is replaced at its end, and either is sound.
        if self.layout.stream == OPEN and (spec := self._specs.get(name.removesuffix("/zarr.json"))) is not None:
            data = with_length(data, spec.count(open_rows(self.layout.span_rows)))
        return super().digest_of(name, data)

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return {spec.name: spec for spec in self.layout.arrays()}

    def check_file(self, name: str) -> None:
        if self.layout.stream == OPEN and name.removesuffix("/zarr.json") in self._specs:
            self._refuse_outside(name)
            with reading(self.path / name), suppress(FileNotFoundError, ValueError):
                data = read_bounded(self.path / name, LARGEST_ARRAY_METADATA, self.path)
                if self.digest_of(name, data) == self.files.get(name):
                    return
        super().check_file(name)

    @classmethod
    def layout_of(cls, storage: Mapping[str, Any]) -> PartLayout:
        return PartLayout.of(storage)

    @property
    def members(self) -> tuple[Part, ...]:
        """The parts that are read as this one: itself, unless it is a union."""
        return (self,)

    @property
    def tag(self) -> str:
        """What the names of caches end with that lie with this part, and cover others as well; nothing of its own."""
        return ""

    @property
    def planned_rows(self) -> int:
        """Rows, committed or not."""
        return self.layout.rows

    def home(self, span: int) -> tuple[Part, int]:
        return self, span

    def first_source_row(self, member: Part) -> int:
        """What is added to ``source_row`` of one of :attr:`members`."""
        return 0

    def located(
        self, rows: Sequence[int] | NDArray[np.int64]
    ) -> Iterator[tuple[Part, NDArray[np.int64], NDArray[np.int64]]]:
        """For each of :attr:`members` with some of ``rows``: (it, which of ``rows`` it holds, their numbers there)."""
        yield self, np.arange(len(rows)), np.asarray(rows, dtype=np.int64)

    @property
    def caches(self) -> Path:
        """The folder of its indexes, second moments and measurements, which can all be computed again: its own, or one
        of this user on this machine if the part is in an object store.
        """
        return local_cache(self.path) if isinstance(self.path, ObjectPath) else self.path

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self.length

    @property
    def encoding(self) -> Encoding:
        """The encoding of ``vectors``."""
        return encoding(self.layout.dtype)

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """(name, first column, one past the last) of each block with a norm of its own."""
        return [(str(name), int(start), int(stop)) for name, start, stop in self.manifest["storage"]["groups"]]

    @property
    def sketched_together(self) -> bool:
        """Whether one sketch holds all layers, so that they cannot be told apart."""
        projection = self.manifest["projection"]
        return projection["compress"] is not None and projection["compress_by"] == "all"

    def summarize(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
        """Counts of rows by status, and their tokens."""
        status = np.asarray(arrays["status"])
        counts = {member.name.lower(): int((status == member).sum()) for member in Status}
        tokens = int(np.asarray(arrays["n_tokens"], dtype=np.int64).sum())
        return {name: count for name, count in counts.items() if count}, tokens

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """(rows,): the number of each committed row, ascending."""
        self.bear_out()
        spans = (np.arange(*self.layout.span_of(span)) for span in self.spans)
        return np.concatenate([np.zeros(0, dtype=np.int64), *spans])

    def column(self, name: str) -> NDArray[Any]:
        """(rows, …): a numeric array other than ``vectors``, of all committed rows, ordered as :attr:`row_numbers`.

        CorruptError naming a chunk that is damaged or missing.
        """
        spec = self.spec(name)
        nothing = np.zeros((0, *spec.columns), dtype=spec.dtype)
        read = side_by_side(lambda span: read_span(self, name, span), self.spans, at_once(self.path))
        return np.concatenate([nothing, *read])

    def usable(self) -> NDArray[np.bool_]:
        """(rows,): whether each committed row has a vector. Raises as :meth:`column`."""
        return np.asarray(self.column("status") < FIRST_UNUSABLE)

    def read_rows(self, name: str, rows: Sequence[int] | NDArray[np.int64]) -> list[Any]:
        """The value of each of ``rows``, in their order. Each span is read once."""
        dtype = self.spec(name).dtype
        if isinstance(self.path, ObjectPath):
            self.array(name)  # once, before several threads read
        return list(
            gather(
                rows,
                self.layout.span_rows,
                lambda span: self.read(name, *self.layout.span_of(span)),
                dtype,
                at_once(self.path),
            )
        )


def span_table(part: Part) -> NDArray[np.int64]:
    """(spans, 5): source row, window, file, byte offset and content digest at the start of each span; of an open part
    of each committed one.
    """
    return stream_table(part) if part.layout.stream == OPEN else fixed_array(part, SPAN_TABLE)


def fixed_array(part: Part, name: str) -> NDArray[Any]:
    """Read an array that was written when the part was made, see :func:`create_part`.

    CorruptError if it is damaged or missing.
    """
    files = [file for file in part.files if file.startswith(f"{name}/")]
    if not files:
        raise CorruptError(f"part {part.name!r} has no array {name!r}, which its manifest tells of")
    for file in files if not isinstance(part.path, ObjectPath) else ():  # an object is checked as it is read
        part.check_file(file)
    array = part.open_zarr(name)
    # Zarr reads a missing chunk as zeros, as many as the shape says.
    present = sum(size_of(part.path / file, part.path) for file in files)
    if array.nbytes > present:
        raise CorruptError(f"{part.path / name} tells of {array.nbytes} bytes; {present} are there")
    with reading(part.path / name):
        if isinstance(part.path, ObjectPath):
            read = side_by_side(lambda file: part.checked_bytes(file, present), files, at_once(part.path))
            array = in_memory({file.removeprefix(f"{name}/"): data for file, data in zip(files, read, strict=True)})
        return np.asarray(array[...])


def create_fixed(group: zarr.Group, name: str, like: NDArray[Any]) -> zarr.Array[Any]:
    """Make an array in one chunk with the shape and dtype of ``like``, without numbers."""
    return group.create_array(
        name, shape=like.shape, chunks=like.shape, dtype=like.dtype, compressors=[Crc32cCodec()], fill_value=0
    )


def create_part(
    path: Path, manifest: Manifest, spans: NDArray[np.int64] | None, fixed: Mapping[str, NDArray[Any]] | None = None
) -> Part:
    """Make an empty part in one step: it appears whole or not at all. If it exists, open it.

    ``spans`` is the :func:`span_table`, None for an open part; ``fixed`` holds further arrays, see :func:`fixed_array`.
    """
    layout = PartLayout.of(manifest["storage"])

    def fill(group: zarr.Group) -> None:
        table = {} if spans is None else {SPAN_TABLE: spans}
        for name, values in {**table, **(fixed or {})}.items():
            create_fixed(group, name, values)[...] = values
        for spec in layout.arrays():
            create_array(group, spec, spec.count(layout.length))

    create(path, manifest, fill)
    return Part(path)
