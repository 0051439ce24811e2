"""Sealed records: small JSON files with a checksum of themselves. They may name other files, with their checksums.

Commit records, manifests of indexes, token shards and gradients, states of training and caches are all records.
:mod:`ghoststore.store.base.disk` makes them appear whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststore.errors import CorruptError, GhostStoreError, StorageError
from ghoststore.store.base.disk import replace
from ghoststore.store.base.opening import open_regular as open_regular
from ghoststore.store.base.opening import parse_json, size_open
from ghoststore.store.base.opening import read_bounded as read_bounded

CHECKSUM = "record_sha256"
"""The key of a record's own checksum, unless the format names another."""
LARGEST_RECORD = 1 << 20


def json_digest(value: Any) -> str:
    """SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(value: dict[str, Any], key: str = CHECKSUM, *, indent: int | None = 1, ascii_only: bool = True) -> bytes:
    """The bytes of a record: ``value`` with its own checksum under ``key``. They depend on nothing else."""
    sealed = {**value, key: json_digest(value)}
    return (json.dumps(sealed, indent=indent, ensure_ascii=ascii_only) + "\n").encode()


def unseal(data: bytes, key: str = CHECKSUM) -> dict[str, Any]:
    """The value that :func:`seal` was given. ValueError if the bytes are not a sealed record."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if value.pop(key, None) != json_digest(value):
        raise ValueError("its checksum does not hold")
    return value


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Make ``path`` hold ``value`` and its checksum, on the disk, in one step."""
    replace(path, seal(value))


def read_record(
    path: Path,
    largest: int = LARGEST_RECORD,
    key: str = CHECKSUM,
    *,
    advice: str = "",
    within: Path | None = None,
) -> dict[str, Any]:
    """Read and unseal a record. With ``within`` it must lie below that folder, without a link on the way.

    FileNotFoundError if nothing is there, CorruptError if it is damaged.
    """
    with reading(path, advice=advice):
        return unseal(read_bounded(path, largest, within), key)


@contextmanager
def reading(path: Path, wrong: str = "is damaged", advice: str = "") -> Iterator[None]:
    """Turn errors of reading a damaged record into CorruptError: "``path`` ``wrong`` (why); ``advice``".

    FileNotFoundError and NotADirectoryError pass: nothing is there then.
    """
    try:
        yield
    except (GhostStoreError, FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CorruptError(f"{path} {wrong} ({why!s:.200}){advice and f'; {advice}'}") from error


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, within: Path | None = None) -> FileRecord:
        """Of the file at ``path``, read in bounded memory. Raises as :func:`open_regular`."""
        with open_regular(path, within) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(bytes=file.tell(), sha256=digest)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FileRecord:
        """The inverse of :meth:`to_json`; KeyError, TypeError or ValueError for anything else."""
        sha256 = str(value["sha256"])
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256")
        return cls(bytes=int(value["bytes"]), sha256=sha256)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def damage(self, path: Path, within: Path | None = None) -> str | None:
        """What is wrong with the file at ``path``, read whole; None if it is what was written."""
        return damage(path, self.sha256, self.bytes, within)

    def check(self, path: Path, advice: str = "", within: Path | None = None) -> None:
        """CorruptError unless the file at ``path`` is what was written."""
        check_file(path, self.sha256, self.bytes, advice, within)


MISSING = "missing"


def damage(path: Path, sha256: str, size: int | None = None, within: Path | None = None) -> str | None:
    """What is wrong with a file that was written with this SHA-256 (and ``size``, if known); None if nothing is.

    With ``within`` it must lie below that folder, without a link on the way.
    """
    try:
        with open_regular(path, within) as file:
            # The size first: a file that was cut, or replaced by a huge one, is not read.
            present = size_open(file)
            if size is not None and present != size:
                return f"{present} bytes; {size} were written"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == sha256 else "its SHA-256 is not that of what was written"
    except FileNotFoundError:
        return MISSING
    except CorruptError as error:  # no regular file, or the system refuses; it says which file
        return str(error)
    except StorageError:  # an object store did not answer: nothing is known of the file
        raise
    except OSError as error:
        return f"cannot be read: {error}"


def check_file(path: Path, sha256: str, size: int | None = None, advice: str = "", within: Path | None = None) -> None:
    """CorruptError if :func:`damage` finds any."""
    problem = damage(path, sha256, size, within)
    if problem is not None:
        sentence = "is missing" if problem == MISSING else f"is not what was written: {problem}"
        raise CorruptError(f"{path} {sentence}{advice and f'; {advice}'}")


def digests(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of ``files`` by their path in ``folder``, sorted. Folders among them are left out."""
    return {str(file.relative_to(folder)): FileRecord.of(file).sha256 for file in sorted(files) if file.is_file()}
