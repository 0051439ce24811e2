"""Checkpoints and tokenizers in object storage: copied once into the user's cache folder, and read from there.

A copy is called after what the store says of each object (name, size, etag), which one listing tells: an object that
was written again has another copy, and one that was not is not read again. A copy appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from ghoststore.errors import CheckpointError, GhostStoreError, MismatchError, StorageError, UsageError
from ghoststore.progress import BYTES, Progress, Silent, Task
from ghoststore.store.base.disk import NO_LOCKS, create_whole, remove, storage_errors
from ghoststore.store.base.object_path import ObjectPath, cache_folder, location
from ghoststore.store.base.objects import Found, side_by_side

RECORD = "copied.json"
PIECE = 8 << 20
"""Bytes of a request; IN_FLIGHT of them are under way, of all files together."""
UNUSED_SECONDS = 7 * 86400
"""A copy of an older version goes when nothing has used it for so long, and another one is made."""
INSIDE = {"additional_chat_templates": "*.jinja", "training_state": "state.json"}
"""Folders inside that belong to it: a tokenizer's further chat templates, and the learning rate of a training."""
_PICKLES = (".bin", ".pt", ".pth")
_made: set[Path] = set()
"""The copies that this process made, or has said that it found."""


def copied(
    address: str | Path,
    patterns: Sequence[str],
    what: str = "checkpoint",
    *,
    suffixes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """The copy of a folder's objects whose names match ``patterns``, or of one object with one of ``suffixes``. Its
    name is that of the address.

    Objects in folders inside it are left out, but for INSIDE. ``progress`` hears of the bytes that are copied; or, once
    a process, that there is a copy already. CheckpointError if nothing is there; StorageError if the store does not
    answer, or the cache folder cannot be written.
    """
    progress = progress or Silent()
    place = location(address, what)
    assert isinstance(place, ObjectPath)
    place = place.looked_up()
    if (single := place.listed) is not None:
        if place.suffix not in suffixes:
            raise CheckpointError(f"{what} {place} is an object; give the folder that holds it, {place.parent}")
        files, name = {place.name: single}, place.parent.name
    else:
        files, name = _listed(place, patterns, what), place.name
    described = {path: [found.size, found.etag or found.modified] for path, found in sorted(files.items())}
    record = json.dumps({"address": str(place), "files": described})
    folder = cache_folder() / "checkpoints" / _digest(str(place))
    whole = folder / _digest(record)
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        if not _is_whole(whole / name, described):
            progress.note(f"{what} {place}: waiting for another process, which copies it")

    with _one_at_a_time(folder, wait):
        if not _is_whole(whole / name, described):
            remove(whole)
            _forget_unused(folder)
            with closing(
                progress.task(f"copying {place}", sum(found.size for found in files.values()), unit=BYTES)
            ) as task:
                create_whole(whole, lambda to: _copy(place, files, to, name, record, task))
        elif whole not in _made:
            progress.note(f"{what} {place} is unchanged since it was copied: read from {whole / name}")
        _made.add(whole)
        with suppress(OSError):
            os.utime(whole)
    return whole / name / place.name if single is not None else whole / name


def recorded_place(path: Path) -> str:
    """What a manifest records of where a folder or a file lies: the address that it is a copy of, or its path."""
    return _address_of(path) or str(path.resolve())


def place_of(path: Path) -> str:
    """What messages call a folder or a file: the address that it is a copy of, or its path."""
    return _address_of(path) or str(path)


@contextmanager
def naming_address(folder: Path) -> Iterator[None]:
    """Have errors about a copy name the address that it was made from."""
    try:
        yield
    except GhostStoreError as error:
        if (address := _address_of(folder)) is not None:
            error.args = (str(error).replace(str(folder), address), *error.args[1:])
        raise


def _address_of(path: Path) -> str | None:
    try:
        copies = cache_folder() / "checkpoints"
    except UsageError:  # where there can be no cache, nothing is a copy
        return None
    for folder in (path.parent, path.parent.parent):
        if folder.parent.parent == copies:
            with suppress(OSError, ValueError, KeyError):
                return str(json.loads((folder / RECORD).read_bytes())["address"])
    return None


def _listed(place: ObjectPath, patterns: Sequence[str], what: str) -> dict[str, Found]:
    """The objects to copy, by their path in the folder."""
    if not place.is_dir():
        raise CheckpointError(f"{what} {place}: there is no such folder, and no such object")
    paths = list(place.iterdir())
    for folder in [path for path in paths if path.name in INSIDE and path.listed is None]:
        paths += (path for path in folder.iterdir() if fnmatchcase(path.name, INSIDE[folder.name]))
    skipped = len(place.key) + 1 if place.key else 0
    files = {
        found.key[skipped:]: found
        for path in paths
        if (found := path.listed) is not None
        and not path.name.startswith(".")
        and any(fnmatchcase(path.name, pattern) for pattern in patterns)
    }
    pickles = [path.name for path in paths if path.listed is not None and path.suffix in _PICKLES]
    if "*.safetensors" in patterns and pickles and not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(
            f"{what} {place} holds its weights as a pickle only ({pickles[0]}), which can run code when it is read; "
            "load it where you trust it and save it again: model.save_pretrained(folder)"
        )
    if not files:
        raise CheckpointError(f"{what} {place}: none of its objects is called {', '.join(patterns)}")
    return files


def _copy(place: ObjectPath, files: dict[str, Found], to: Path, name: str, record: str, task: Task) -> None:
    """Write ``files`` to the folder ``name`` in ``to``; ``task`` counts their bytes. MismatchError for an object that
    is another one by now.
    """
    for path in files:
        (to / name / path).parent.mkdir(parents=True, exist_ok=True)
        (to / name / path).touch()
    pieces = [(path, start) for path, found in files.items() for start in range(0, found.size, PIECE)]

    def fetch(piece: tuple[str, int]) -> int:
        path, start = piece
        found = files[path]
        stop = min(start + PIECE, found.size)
        now, parts = place.objects.get(found.key, start, stop)
        address = f"{place.objects.name}/{found.key}"
        if now.version != found.version:
            raise MismatchError(f"{address} was written again while it was copied: run the same command again")
        place_in_file = start
        with open(to / name / path, "r+b") as file:
            file.seek(start)
            for part in parts:
                place_in_file += file.write(part)
        if place_in_file != stop:
            raise StorageError(f"cannot read {address}: the answer ends at byte {place_in_file:,}")
        return stop - start

    for count in side_by_side(fetch, pieces):
        task.advance(count)
    (to / RECORD).write_text(record)


def _is_whole(folder: Path, described: dict[str, list[int | str | float]]) -> bool:
    """Whether a copy has all its bytes: somebody may have taken some of them."""
    try:
        return all((folder / path).stat().st_size == size for path, (size, _) in described.items())
    except OSError:
        return False


def _forget_unused(folder: Path) -> None:
    """Remove the copies of older versions that nothing has used lately."""
    for other in folder.iterdir():
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(other)


@contextmanager
def _one_at_a_time(folder: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Let one process of this machine copy, and others wait for it: they then find what they would have copied.
    ``wait`` is called before that.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(handle)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
