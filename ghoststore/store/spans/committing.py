"""Commits a span without a lock. However many writers there are, and however late one wakes up, the record names the
files of one of them, and nothing that a record names is written again.

A writer **stages** its files under names in ``commits/`` that no other writer has. Then it **decides** the span: an
intent appears by a hard link, which fails if there is one already. The intent holds the content of the record and the
staged name of each file. Any writer that finds an intent **moves** its files to their places, flushes, links the
**record**, makes a mark, and removes the intent and then the mark. A staged file can be moved only once, so a late
writer has nothing left to move.

An intent is void once its span has a record. A writer therefore looks for intents first and for the record after them,
and intents are removed only after the record exists. The intents of a span are numbered. If the files of one are
neither staged nor in place (a disk lost them), a next one follows, whose writer first removes what is still staged for
the one before. An intent with a mark shows that the span had a record: if there is none, it was lost.

In an object store an object is made only if there is none (a conditional put) where a link is made here, and copied
inside the store where a file is moved. Copies of one intent are alike, and what was staged is removed once the record
exists: a late writer copies the same bytes, or nothing.
``docs/format.md`` specifies this.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from ghoststore.errors import StorageError
from ghoststore.store.base.disk import flush
from ghoststore.store.base.object_path import ObjectPath, at_once
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import names_in
from ghoststore.store.base.records import FileRecord, read_bounded, seal, unseal
from ghoststore.store.base.writers import unfinished
from ghoststore.store.spans.commits import LARGEST_COMMIT, Commit, commit_path, read_commit

_STAGED = re.compile(r"\.[^/\0]+\.tmp")
_INTENT = re.compile(r"\.([0-9]{8})(?:\.([0-9]{1,9}))?\.intent")
_MARK = re.compile(r"\.([0-9]{8})\.recorded")


@dataclass(frozen=True, slots=True)
class _Intent:
    commit: Commit
    staged: dict[str, str]
    """By file of the commit, its staged name in ``commits/``."""


def commit_span(folder: Path, commit: Commit, files: Iterable[tuple[str, bytes | memoryview]]) -> bool:
    """Write ``files`` (path in ``folder``, and bytes) and commit them. Each is released once it is written.

    ``commit`` has no files yet. Returns False if another process committed the span with other content, which stays.
    OSError if the disk refuses: another call finishes what was decided and replaces the rest.
    """
    records: dict[str, FileRecord] = {}
    staged: dict[str, str] = {}
    decided, numbered = False, 0

    def stage(item: tuple[str, bytes | memoryview]) -> tuple[str, FileRecord]:
        key, data = item
        path = unfinished(folder / "commits" / f"{commit.span:08d}.{key.replace('/', '.')}")
        staged[key] = path.name
        return key, _stage(path, data)

    try:
        records.update(side_by_side(stage, files, at_once(folder)))
        own = _Intent(replace(commit, files=records), staged)
        while True:
            number = _intents_of(folder, commit.span)
            intent = _read_intent(folder, commit.span, number - 1, list(records))
            # After the intents: they are removed only when the record exists.
            if _is_there(commit_path(folder, commit.span)):
                break
            if intent is not None and _finish(folder, intent):
                break
            if intent == own:
                raise StorageError(
                    f"files of span {commit.span} of {folder} were removed while they were written; the same command "
                    "writes them again"
                )
            # Not flushed: an intent coordinates living writers, and a power cut leaves none. A truncated one is void.
            intended = seal({"commit": own.commit.to_json(), "staged": staged})
            # An object may have been made although the answer was lost: then what is staged must stay.
            decided = isinstance(folder, ObjectPath)
            decided = _link(_intent_path(folder, commit.span, number), intended)
            numbered = number + 1
        decided = False
    finally:
        if not decided:  # else the next writer moves them into place
            _drop(folder, staged)
    # Our intent may follow a gap: earlier ones may have been removed before it appeared.
    _clear(folder, commit.span, range(max(numbered, _intents_of(folder, commit.span))))
    return read_commit(folder, commit.span) == own.commit


def settle(folder: Path, files: Callable[[int], Sequence[str]]) -> None:
    """Finish the spans that any writer decided and did not commit in ``folder``, and remove void intents.

    ``files(span)`` are the paths of a span, none if there is no such span: an intent that names others is ignored.
    """
    intents, marks = decided_spans(folder)
    for span in sorted(intents.keys() | marks):
        numbers = intents.get(span, [])
        # After the intents: they are removed only when the record exists.
        recorded = _is_there(commit_path(folder, span))
        if not recorded and numbers:
            intent = _read_intent(folder, span, max(numbers), files(span))
            recorded = intent is not None and _finish(folder, intent)
        if recorded:
            _clear(folder, span, numbers)


def decided_spans(folder: Path) -> tuple[dict[int, list[int]], set[int]]:
    """The numbers of the present intents by span, and the spans with a mark, which had a record when it was made."""
    intents: dict[int, list[int]] = {}
    marks: set[int] = set()
    for name in names_in(folder / "commits"):
        if match := _INTENT.fullmatch(name):
            intents.setdefault(int(match[1]), []).append(int(match[2] or 0))
        elif match := _MARK.fullmatch(name):
            marks.add(int(match[1]))
    return intents, marks


def _stage(path: Path, data: bytes | memoryview) -> FileRecord:
    """Write ``data`` to a new file, on the disk."""
    if isinstance(path, ObjectPath):
        path.write_bytes(data)
        return FileRecord(bytes=memoryview(data).nbytes, sha256=hashlib.sha256(data).hexdigest())
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(bytes=memoryview(data).nbytes, sha256=hashlib.sha256(data).hexdigest())


def _intent_path(folder: Path, span: int, number: int) -> Path:
    return folder / "commits" / f".{span:08d}{f'.{number}' if number else ''}.intent"


def _mark_path(folder: Path, span: int) -> Path:
    return folder / "commits" / f".{span:08d}.recorded"


def _link(path: Path, data: bytes, mark: Path | None = None) -> bool:
    """Make ``path`` appear whole with ``data``. Returns False if it exists.

    With ``mark`` its bytes are flushed, and the file ``mark`` appears after it. :func:`publish` is not used: it would
    list ``commits/`` for leftovers at every span.
    """
    if isinstance(path, ObjectPath):
        if not path.create(data):
            return False
        if mark is not None:
            mark.write_bytes(b"")
        return True
    temporary = unfinished(path)
    try:
        temporary.write_bytes(data)
        if mark is not None:
            flush(temporary)
        os.link(temporary, path)
        if mark is not None:
            os.rename(temporary, mark)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _is_there(path: Path) -> bool:
    """Whether something has the name ``path``. It asks for it: a listing of objects may lag behind."""
    return path.is_file() if isinstance(path, ObjectPath) else path.exists()


def _intents_of(folder: Path, span: int) -> int:
    """Number of intents of ``span``, up to the first gap."""
    number = 0
    while _is_there(_intent_path(folder, span, number)):
        number += 1
    return number


def _read_intent(folder: Path, span: int, number: int, files: Sequence[str]) -> _Intent | None:
    """Intent ``number`` of ``span``; None if it is missing or damaged, or names other files than ``files``.

    ``files`` are the paths of the span: an intent that names others could move anything.
    """
    try:
        value = unseal(read_bounded(_intent_path(folder, span, number), LARGEST_COMMIT)) if number >= 0 else {}
        intent = _Intent(Commit.from_json(value["commit"]), dict(value["staged"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    names = intent.staged.values()
    fits = set(intent.staged) == set(intent.commit.files) == set(files) and intent.commit.span == span
    if not fits or not all(isinstance(name, str) and _STAGED.fullmatch(name) for name in names):
        return None
    return intent


def _finish(folder: Path, intent: _Intent) -> bool:
    """Move the staged files and write the record. False if a file is neither staged nor in place."""
    moved_before: list[str] = []
    folders: set[Path] = set()
    moved = side_by_side(lambda item: _move(folder, *item), intent.staged.items(), at_once(folder))
    for key, was_staged in zip(intent.staged, moved, strict=True):
        if not was_staged:
            moved_before.append(key)
        parents = [folder / parent for parent in PurePath(key).parents]
        folders.update(parents[:-1] or parents)
    for key in moved_before:
        try:
            if FileRecord.of(folder / key) == intent.commit.files[key]:
                continue
        except FileNotFoundError:
            pass
        # Once there is another intent, no file of this one may be moved any more.
        _drop(folder, intent.staged)
        return False
    # Bytes, then their names in the folders, then the record: after a crash no record names what is not there.
    for parent in folders:
        flush(parent)
    path = commit_path(folder, intent.commit.span)
    _link(path, seal(intent.commit.to_json()), _mark_path(folder, intent.commit.span))
    flush(path.parent)
    return True


def _move(folder: Path, key: str, name: str) -> bool:
    """Move a staged file to its place; an object is copied, and removed when the record exists. False if it is gone."""
    staged, path = folder / "commits" / name, folder / key
    try:
        if isinstance(staged, ObjectPath) and isinstance(path, ObjectPath):
            staged.copy_to(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged, path)
    except FileNotFoundError:
        return False
    return True


def _drop(folder: Path, staged: dict[str, str]) -> None:
    if isinstance(folder, ObjectPath):
        folder.objects.delete([(folder / "commits" / name).key for name in staged.values()])
        return
    for name in staged.values():
        (folder / "commits" / name).unlink(missing_ok=True)


def _clear(folder: Path, span: int, numbers: Iterable[int]) -> None:
    """Remove the intents of a span with a record, then its mark, which must exist as long as there is an intent.

    The last intent goes first, so that none is left beyond a gap.
    """
    for number in sorted(numbers, reverse=True):
        if isinstance(folder, ObjectPath):  # its objects were copied, or belong to a writer that came too late
            _drop_staged(folder, span, number)
        _intent_path(folder, span, number).unlink(missing_ok=True)
    _mark_path(folder, span).unlink(missing_ok=True)


def _drop_staged(folder: Path, span: int, number: int) -> None:
    """Remove what is staged for an intent of a span that has a record."""
    try:
        staged = dict(unseal(read_bounded(_intent_path(folder, span, number), LARGEST_COMMIT))["staged"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    _drop(folder, {str(key): str(name) for key, name in staged.items() if _STAGED.fullmatch(str(name))})
