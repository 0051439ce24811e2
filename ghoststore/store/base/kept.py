"""Small JSON records beside arrays, with a checksum of themselves: what was computed from a part, or written of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ghoststore.errors import CorruptError
from ghoststore.store.base.disk import replace
from ghoststore.store.base.records import json_digest

LARGEST_RECORD = 1 << 20


def read_record(path: Path, largest: int = LARGEST_RECORD) -> dict[str, Any]:
    """What :func:`write_record` wrote. FileNotFoundError if nothing is there, CorruptError if it is damaged."""
    try:
        if path.stat().st_size > largest:
            raise ValueError("it is too large")
        value = json.loads(path.read_bytes())
        stated = value.pop("record_sha256")
        if stated != json_digest(value):
            raise ValueError("its checksum does not hold")
        return dict(value)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path} is damaged ({error!s:.200})") from error


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Make ``path`` hold ``value`` and its checksum, on disk, in one step."""
    sealed = {**value, "record_sha256": json_digest(value)}
    replace(path, (json.dumps(sealed, indent=1) + "\n").encode())
