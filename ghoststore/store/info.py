"""``ghoststore.info``: what a store holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststore.store.part import Part
from ghoststore.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """One part, from its manifest and its commit records."""

    name: str
    complete: bool
    rows: int
    """Rows of the part; ``committed`` of them are there."""
    committed: int
    statuses: dict[str, int]
    """Committed rows by status."""
    tokens: int
    dimension: int
    dtype: str
    bytes: int
    """Bytes of the committed files."""
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What ``ghoststore.info`` returns."""

    store: str
    parts: list[PartInfo]

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore info --json`` prints."""
        return asdict(self)


def describe(part: Part) -> PartInfo:
    """Read the commit records of ``part``; CorruptError if one is damaged."""
    statuses: dict[str, int] = {}
    tokens = size = 0
    for span in part.spans:
        commit = part.commit(span)
        tokens += commit.tokens
        size += sum(record.bytes for record in commit.files.values())
        for status, count in commit.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    return PartInfo(
        name=part.name,
        complete=part.complete,
        rows=part.layout.rows,
        committed=part.rows,
        statuses=statuses,
        tokens=tokens,
        dimension=part.layout.dimension,
        dtype=part.layout.dtype,
        bytes=size,
        manifest=part.manifest,
    )


def info(store: str | Path, *, part: str | None = None) -> StoreInfo:
    """Every part of a store, or one. UsageError if there is no such store or part."""
    opened = Store.open(store)
    names = [part] if part is not None else opened.part_names()
    return StoreInfo(store=str(store), parts=[describe(opened.part(name)) for name in names])
