"""Commit records: one small JSON object a span, naming and checksumming everything the span wrote.

What a record names never changes; what no record names does not exist.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.errors import CorruptError
from ghoststore.store.base.disk import publish

_RECORD = re.compile(r"(\d{8})\.json")
LARGEST_RECORD = 16 << 20


def json_digest(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Read ``path``, in bounded memory."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(bytes=file.tell(), sha256=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One span's record. ``files`` by path relative to the part; ``statuses`` counts rows by status."""

    span: int
    start: int
    stop: int
    files: dict[str, FileRecord]
    statuses: dict[str, int]
    tokens: int

    def encode(self) -> bytes:
        """The record's bytes: a function of its content alone, with a checksum of itself."""
        value: dict[str, Any] = {
            "span": self.span,
            "rows": [self.start, self.stop],
            "tokens": self.tokens,
            "statuses": self.statuses,
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }
        value["record_sha256"] = json_digest(value)
        return (json.dumps(value, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> Commit:
        """Parse a record; CorruptError naming ``where`` if it is not one."""
        try:
            value: dict[str, Any] = json.loads(data)
            stated = value.pop("record_sha256")
            if stated != json_digest(value):
                raise ValueError("its own checksum does not hold")
            start, stop = value["rows"]
            return cls(
                span=int(value["span"]),
                start=int(start),
                stop=int(stop),
                tokens=int(value["tokens"]),
                statuses={str(name): int(count) for name, count in value["statuses"].items()},
                files={
                    str(name): FileRecord(int(record["bytes"]), str(record["sha256"]))
                    for name, record in value["files"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptError(
                f"{where} is not a commit record: {error}; `ghoststore verify` lists what is damaged"
            ) from error


def record_path(part: Path, span: int) -> Path:
    """Where the record of ``span`` stands."""
    return part / "commits" / f"{span:08d}.json"


def committed(part: Path) -> list[int]:
    """Spans that have a record at this moment, in order."""
    names = (entry.name for entry in (part / "commits").iterdir())
    return sorted(int(found[1]) for name in names if (found := _RECORD.fullmatch(name)))


def read_commit(part: Path, span: int) -> Commit:
    """The record of ``span``; CorruptError if it is missing or damaged."""
    path = record_path(part, span)
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise CorruptError(f"{path} is {path.stat().st_size} bytes: not a commit record")
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    commit = Commit.decode(data, str(path))
    if commit.span != span:
        raise CorruptError(f"{path} is the record of span {commit.span}, not {span}")
    return commit


def write_commit(
    part: Path,
    *,
    span: int,
    start: int,
    stop: int,
    keys: Iterable[str],
    statuses: dict[str, int],
    tokens: int,
) -> bool:
    """Checksum the files ``keys`` and publish the record; False if another process did so first.

    The files must be on the disk already.
    """
    files = {key: FileRecord.of(part / key) for key in keys}
    commit = Commit(span=span, start=start, stop=stop, files=files, statuses=statuses, tokens=tokens)
    return publish(record_path(part, span), commit.encode())
