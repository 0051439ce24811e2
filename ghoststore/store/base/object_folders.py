"""Folders of objects that appear whole.

An object store cannot rename a folder. Here the folder is there once its ``zarr.json`` is, which is made last and only
if there is none. Before that an **intent**, made only if there is none, says what it will hold: whoever finds one goes
on with it, so that two processes, or one that was killed and another, never mix their files.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ghoststore.errors import BusyError
from ghoststore.store.base.object_path import ObjectPath
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.zarr_writes import settled

ROOT = "zarr.json"
INTENT = f".{ROOT}.intent"


def publish_folder(path: ObjectPath, fill: Callable[[Path], None]) -> None:
    """Make the folder ``path`` with the files that ``fill`` writes into a folder of this machine. Nothing if it exists.

    BusyError if another process has begun to make it with other files. One with the same files and another
    ``zarr.json`` (of another machine, for example) is gone on with, as it was begun.
    """
    if (path / ROOT).is_file():
        return
    with tempfile.TemporaryDirectory(prefix="ghoststore-") as temporary:
        folder = Path(temporary)
        with settled():
            fill(folder)
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if name != ROOT}
        with appearing_folder(path, (folder / ROOT).read_bytes(), files) as begun:
            if begun:
                put_all(path, ((name, (folder / name).read_bytes) for name in files))


@contextmanager
def appearing_folder(path: ObjectPath, root: bytes, contents: dict[str, str]) -> Iterator[bool]:
    """Make the folder ``path`` while the block puts its objects; at the end its ``zarr.json`` appears.

    ``contents`` identifies the other objects. Yields False if another process has just finished the folder. BusyError
    if one has begun it with other contents.
    """
    intent = path / INTENT
    own = json.dumps({"contents": contents, "root": root.decode()}, sort_keys=True).encode()
    begun = own
    if not intent.create(own):
        try:
            begun = intent.read_bytes()
        except FileNotFoundError:  # its maker has just finished
            yield False
            return
    value = json.loads(begun)
    if value["contents"] != contents:
        raise BusyError(
            f"{path} is being made by another process, with other content, or removed; nothing was written. If none is "
            "at work, one was cut short: `ghoststore rm` removes what it left"
        )
    yield True
    (path / ROOT).create(value["root"].encode())
    intent.unlink(missing_ok=True)


def put_all(path: ObjectPath, objects: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
    """Put objects, several at a time: (name in ``path``, function that returns the bytes) of each."""
    for _ in side_by_side(lambda item: (path / item[0]).write_bytes(item[1]()), objects):
        pass


def unfinished_folder(path: ObjectPath) -> bool:
    """Whether a folder was begun and is not there yet."""
    return not (path / ROOT).is_file() and (path / INTENT).is_file()


def is_there(path: Path) -> bool:
    """Whether a folder that appears whole is there. What was begun in an object store is not."""
    return path.exists() and not (isinstance(path, ObjectPath) and unfinished_folder(path))


def remove_folder(path: ObjectPath) -> None:
    """Remove everything in a folder, its ``zarr.json`` first: a reader finds the whole or nothing.

    An intent of nothing stands meanwhile, so that what a kill leaves is unfinished, not damaged.
    """
    intent, objects = path / INTENT, path.objects
    intent.write_bytes(b'{"contents": {}, "root": ""}')
    (path / ROOT).unlink(missing_ok=True)
    objects.delete([found.key for found in objects.below(path.key) if not found.key.endswith(f"/{INTENT}")])
    intent.unlink(missing_ok=True)
