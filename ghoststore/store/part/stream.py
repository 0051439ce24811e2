"""Parts of streams: what the last span of an open part says of it, and how it becomes an ordinary part at the end.

``docs/design/0026-streaming-corpora.md`` says why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ghoststore.errors import CorruptError
from ghoststore.store.base.disk import replace as replace_file
from ghoststore.store.base.disk import storage_errors
from ghoststore.store.base.manifest import ENDED, attributes_of
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.opening import parse_json
from ghoststore.store.base.records import read_record, reading, write_record
from ghoststore.store.part.layout import STREAM

if TYPE_CHECKING:
    from ghoststore.store.part.part import Part

STATES = "stream.json"
"""The file in an open part with the states to go on with."""
_LENGTH = re.compile(rb'("shape"\s*:\s*\[\s*)(\d+)')
"""The length of an array in its metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEntry:
    """What a committed span of a stream says: of itself, and of all up to and with it."""

    rows: int
    fingerprint: str
    digest: int
    """Of the samples of the span."""
    start: tuple[int, int, int]
    """Place of its first sample in the corpus: source row, file, offset."""
    domains: tuple[str, ...] = ()
    """In the order in which the stream had them first: the ``domain`` array indexes them."""
    next: tuple[int, int, int] | None = None
    """Place of the sample that follows; None if the stream ended."""

    @property
    def ended(self) -> bool:
        """Whether the stream has nothing behind this span."""
        return self.next is None

    def to_text(self) -> str:
        """The entry of the array."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def of(cls, text: str) -> StreamEntry:
        """The inverse of :meth:`to_text`; ValueError, KeyError or TypeError for anything else."""
        value = parse_json(text.encode())
        follows = value["next"]
        return cls(
            rows=int(value["rows"]),
            fingerprint=str(value["fingerprint"]),
            digest=_whole(value["digest"]),
            start=_place(value["start"]),
            domains=tuple(map(str, value["domains"])),
            next=None if follows is None else _place(follows),
        )


def _place(value: Any) -> tuple[int, int, int]:
    source_row, file, offset = map(_whole, value)
    return source_row, file, offset


def _whole(value: Any) -> int:
    """``value``, if it fits in 64 bits; else OverflowError."""
    return int(np.int64(value))


def strings_of_span(part: Part, name: str, span: int) -> NDArray[Any]:
    """The entries of a committed ``span`` in an array of strings. Parts of many spans are read by it span by span."""
    spec, rows = part.spec(name), part.layout.span_of(span)
    if not isinstance(part.path, ObjectPath):
        for key in part.layout.chunk_keys(spec, span):
            part.check_chunk(spec, key)
    return part.slice(spec, spec.count(part.layout.length), *spec.entries(*rows))


def read_entry(part: Part, span: int) -> StreamEntry:
    """What the committed ``span`` of a part of a stream says. CorruptError if that is damaged."""
    (text,) = strings_of_span(part, STREAM, span)
    with reading(part.path / STREAM / "c" / str(span), "does not say what a span of a stream says"):
        return StreamEntry.of(str(text))


def keep_states(part: Part, states: Mapping[int, str]) -> None:
    """Keep the states, as JSON, with which the stream goes on behind some spans, in the place of those kept before.

    They are no data of the part: a stream that has gone on from a state says where it stands in other words than one
    that came there from its beginning.
    """
    write_record(part.path / STATES, {"states": {str(span): state for span, state in states.items()}})


def kept_states(part: Part) -> dict[int, str]:
    """What :func:`keep_states` kept last; nothing if that is gone or damaged."""
    try:
        states = read_record(part.path / STATES, within=part.path)["states"]
        return {int(span): str(state) for span, state in states.items()}
    except (FileNotFoundError, CorruptError, KeyError, AttributeError, ValueError):
        return {}


def stream_table(part: Part) -> NDArray[np.int64]:
    """(committed spans, 5): what :func:`~ghoststore.store.part.part.span_table` is of a part whose stream ended."""
    entries = [read_entry(part, span) for span in part.spans]
    rows = [[entry.start[0], 0, *entry.start[1:], entry.digest] for entry in entries]
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def with_length(metadata: bytes, length: int) -> bytes:
    """The metadata of an array (its ``zarr.json``) with ``length`` entries in the place of those it has."""
    return _LENGTH.sub(lambda match: match[1] + str(length).encode(), metadata, count=1)


def end_stream(part: Part, corpus: Mapping[str, Any], fixed: Mapping[str, NDArray[Any]]) -> None:
    """Make an ordinary part of one whose last committed span says that the stream ended.

    ``corpus`` are entries of that section of the manifest, ``fixed`` arrays that are kept beside the rows. The manifest
    is replaced last, in one step: until then the part is as it was, whatever was written.
    """
    if not part.complete:
        raise CorruptError(f"part {part.name!r} of {part.path.parent.parent} lacks spans of a stream that ended")
    layout = replace(part.layout, stream=ENDED)
    files = dict(part.files)
    with storage_errors(str(part.path)), TemporaryDirectory(prefix="ghoststore-") as scratch:
        for spec in layout.arrays():
            metadata = with_length(part.array_metadata(spec.name), spec.count(layout.rows))
            files |= _put(part.path, {f"{spec.name}/zarr.json": metadata})
        group = zarr.create_group(scratch)
        for name, values in fixed.items():
            from ghoststore.store.part.part import create_fixed

            create_fixed(group, name, values)[...] = values
            written = (path for path in (Path(scratch) / name).rglob("*") if path.is_file())
            files |= _put(part.path, {str(path.relative_to(scratch)): path.read_bytes() for path in written})
        (part.path / STATES).unlink(missing_ok=True)
        manifest = {
            **part.recorded,
            "corpus": {**part.manifest["corpus"], **corpus},
            "storage": {**part.recorded["storage"], "rows": layout.rows, "stream": ENDED},
        }
        root = {"attributes": attributes_of(manifest, files), "zarr_format": 3, "node_type": "group"}
        replace_file(part.path / "zarr.json", json.dumps(root, indent=2).encode())


def _put(folder: Path, contents: Mapping[str, bytes]) -> dict[str, str]:
    """Write files of ``folder``; the SHA-256 of each."""
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
