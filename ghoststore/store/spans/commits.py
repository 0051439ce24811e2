"""Commit records: a small JSON object for each span, with the name and checksum of every file of the span.

A file that a record names never changes; a file that no record names is not part of the data.
:mod:`ghoststore.store.spans.committing` makes the records.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghoststore.errors import CorruptError
from ghoststore.store.base.records import FileRecord, read_bounded, reading, unseal

_NAME = re.compile(r"(\d{8})\.json")
LARGEST_COMMIT = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The record of a span. ``files`` is by path in the part or run; ``statuses`` counts rows by status."""

    span: int
    start: int
    stop: int
    statuses: dict[str, int]
    tokens: int
    files: dict[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of the record, without its checksum."""
        return {
            "span": self.span,
            "rows": [self.start, self.stop],
            "tokens": self.tokens,
            "statuses": self.statuses,
            "files": {name: record.to_json() for name, record in sorted(self.files.items())},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Commit:
        """The inverse of :meth:`to_json`; KeyError, TypeError, ValueError or AttributeError for anything else."""
        start, stop = value["rows"]
        return cls(
            span=int(value["span"]),
            start=int(start),
            stop=int(stop),
            tokens=int(value["tokens"]),
            statuses={str(name): int(count) for name, count in value["statuses"].items()},
            files={str(name): FileRecord.from_json(record) for name, record in value["files"].items()},
        )


def commit_path(folder: Path, span: int) -> Path:
    """The path of the record of ``span``."""
    return folder / "commits" / f"{span:08d}.json"


def committed(folder: Path) -> list[int]:
    """Spans that have a record now, in order."""
    names = (entry.name for entry in (folder / "commits").iterdir())
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def read_commit(folder: Path, span: int) -> Commit:
    """The record of ``span``; CorruptError if it is missing or damaged."""
    path = commit_path(folder, span)
    try:
        with reading(path, "is not a commit record", "`ghoststore verify` lists what is damaged"):
            commit = Commit.from_json(unseal(read_bounded(path, LARGEST_COMMIT, folder)))
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    if commit.span != span:
        raise CorruptError(f"{path} is the record of span {commit.span}, not {span}")
    return commit
