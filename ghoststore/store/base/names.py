"""Valid names of parts, runs and indexes, and the version of the format."""

from __future__ import annotations

import re

from ghoststore.errors import UsageError

FORMAT_VERSION = 1
METADATA = "zarr.json"
"""A file beside parts and runs, so none can have this name."""
MOVED_ASIDE = "moved-aside"
"""What a repair adds to the name of something that stands in the place of a file. Beside parts and runs that is a
folder in the place of their metadata, which is no part or run afterwards either.
"""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_name(name: str) -> bool:
    """Whether ``name`` can name a part, a run or an index. Never a path."""
    return _NAME.fullmatch(name) is not None and name != METADATA and not name.startswith(f"{METADATA}.{MOVED_ASIDE}")


def check_name(name: str, what: str = "part") -> str:
    """``name`` itself if it can name a part, a run or an index; UsageError otherwise."""
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot name a {what}: use 1 to 128 letters, digits, '.', '_' and '-', the first a letter or "
            f"digit, and not {METADATA}"
        )
    return name


def safe_name(*pieces: str) -> str:
    """A valid name made of ``pieces``. Characters that a name cannot have become '-'."""
    joined = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", piece).strip("-._") for piece in pieces if piece)
    return check_name(joined.strip("-._")[:128] or "part")
