"""Remembers which manifests this user wrote on this machine: only the paths that these name may be opened.

A manifest's ``source`` says where checkpoint and corpus lay. A store may come from anywhere, so a path in it is a hint
for people; following it would open files, or ask a hub, that somebody else chose. What this user's own build, training
or tokenizing wrote is remembered in a folder of the user's own (``$XDG_STATE_HOME/ghoststore/own``, by default
``~/.local/state/ghoststore/own``): an entry is called after the SHA-256 of the manifest, which covers the paths in it.
A store cannot put an entry there, and a store that was moved keeps its own.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.settings.option import in_objects
from ghoststore.store.base.manifest import Manifest, as_begun
from ghoststore.store.base.records import json_digest


def own_folder() -> Path:
    """The folder of the entries. RuntimeError if there is neither the variable nor a home."""
    variable = os.environ.get("XDG_STATE_HOME", "")
    state = Path(variable) if os.path.isabs(variable) else Path.home() / ".local" / "state"
    return state / "ghoststore" / "own"


def remember(manifest: Manifest, source: Manifest, where: Path) -> str | None:
    """Remember that this user gave the paths in ``source``, if ``manifest`` has the same.

    ``where`` the manifest lies is noted for people who look into the folder. Returns a warning if the entry cannot be
    written, else None.
    """
    if any(manifest["source"].get(name) != source.get(name) for name in PATHS):
        return None  # begun with other paths, maybe by another user
    problem = remember_digest(json_digest(as_begun(manifest)), where)
    return problem and (
        f"that these paths are yours cannot be remembered ({problem}): commands that read the checkpoint or the corpus "
        "of this part or run will ask for their paths"
    )


def remember_digest(digest: str, where: Path) -> str | None:
    """Remember that this user wrote the file at ``where`` with the SHA-256 ``digest``.

    Returns what is wrong if the entry cannot be written, else None.
    """
    try:
        folder = own_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = folder / digest
        if not is_own_digest(digest):
            entry.unlink(missing_ok=True)  # made by another user who worked with this home
            entry.write_text(f"{where.absolute()}\n", errors="replace")
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def is_own(manifest: Manifest) -> bool:
    """Whether this user wrote ``manifest``, see :func:`remember`."""
    return is_own_digest(json_digest(as_begun(manifest)))


def is_own_digest(digest: str) -> bool:
    """Whether this user wrote the file with the SHA-256 ``digest``, see :func:`remember_digest`."""
    try:
        status = os.lstat(own_folder() / digest)
    except (OSError, RuntimeError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


PATHS = ("checkpoint", "base", "tokenizer", "data", "corpus")
"""Entries of a manifest's ``source`` that are paths to read from."""


def is_place(path: str) -> bool:
    """Whether a recorded path leads to one place: an absolute path, or an address in object storage."""
    return os.path.isabs(path) or in_objects(path)


def source_path(manifest: Manifest, name: str, whose: str, parameter: str, given: Any = None) -> Any:
    """The path of the ``checkpoint``, ``tokenizer``, ``data`` or ``corpus`` (``name``) of a manifest.

    It is ``given`` by the user (a path, or an object in memory), else the recorded one, if this user recorded it; None
    if none is recorded. ``whose`` manifest it is is said in messages. UsageError, naming ``parameter``, if the user has
    to give it.
    """
    if given is not None:
        return given
    path = manifest["source"].get(name)
    if path is None or path == "-":
        return None
    what = "corpus" if name in ("data", "corpus") else name
    printable = str(path).encode(errors="backslashreplace").decode()  # half a surrogate pair cannot be printed
    give = f"if that is the one, give it: `{parameter}={printable:.200}`"
    if not isinstance(path, str) or not is_place(path):
        raise UsageError(
            f"{whose} names {path!r:.200} as its {what}: no path on this machine, and nothing is fetched because a "
            f"manifest says so; {give}"
        )
    if not is_own(manifest):
        raise UsageError(
            f"{whose} names {path!r:.200} as its {what}, and no build of yours on this machine recorded that: the "
            f"store may come from anywhere, so nothing is opened for it; {give}"
        )
    return path
