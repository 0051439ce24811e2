"""Committing a span, without a lock: however many writers are at it, and however late one wakes up, its record names
the files of one of them, and nothing that a record names is written again.

A writer **stages** its files under names in ``commits/`` that nobody else has. Then the span is **decided**: an intent
appears by a hard link, which fails where one stands. It holds what the record will say, and where each file is staged.
Whoever finds an intent **moves** its files to their places, flushes, links the **record**, marks that it did, and
removes the intent and then the mark. A staged file can be moved only once: who comes late has nothing left to move.

An intent is void once its span has a record: a writer looks for intents first and for the record after them, and
intents are removed only after the record stands. Intents of a span are numbered: one whose files are neither staged nor
in place (a disk lost them) is followed by the next, whose maker first removes what is still staged for the one before.
An intent with a mark beside it tells that the span had its record: where that is not there, it was lost.
Specified in ``docs/format.md``.
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
    """Name in ``commits/`` of each file of the commit."""


def commit_span(folder: Path, commit: Commit, files: Iterable[tuple[str, bytes | memoryview]]) -> bool:
    """Write ``files`` (path relative to ``folder``, and bytes) and commit them; each is let go once it is written.

    ``commit`` has no files yet. False if another process committed the span with anything else, which stands. OSError
    if the disk refuses; running again finishes what was decided, and replaces the rest.
    """
    records: dict[str, FileRecord] = {}
    staged: dict[str, str] = {}
    decided, made = False, 0
    try:
        for key, data in files:
            path = unfinished(folder / "commits" / f"{commit.span:08d}.{key.replace('/', '.')}")
            staged[key] = path.name
            records[key] = _stage(path, data)
        own = _Intent(replace(commit, files=records), staged)
        while True:
            number = _intents_of(folder, commit.span)
            intent = _read_intent(folder, commit.span, number - 1, list(records))
            # After the intents: they go only when the record is there.
            if commit_path(folder, commit.span).exists():
                break
            if intent is not None and _finish(folder, intent):
                break
            if intent == own:
                raise StorageError(
                    f"files of span {commit.span} of {folder} were removed while they were written; the same command "
                    "writes them again"
                )
            # Not flushed: an intent holds writers together, and a power cut leaves none. One that is cut is void.
            intended = seal({"commit": own.commit.to_json(), "staged": staged})
            decided = _link(_intent_path(folder, commit.span, number), intended)
            made = number + 1
        decided = False
    finally:
        if not decided:  # else they are the span, and whoever comes next moves them
            _drop(folder, staged)
    # One of ours may stand beyond a gap: others were cleared away before it appeared.
    _clear(folder, commit.span, range(max(made, _intents_of(folder, commit.span))))
    return read_commit(folder, commit.span) == own.commit


def settle(folder: Path, files: Callable[[int], Sequence[str]]) -> None:
    """Finish what was decided and not committed in ``folder``, whoever decided it, and remove void intents.

    ``files`` are the paths that a span has, none for a number that is no span: an intent of others is not followed.
    """
    intents, marks = decided_spans(folder)
    for span in sorted(intents.keys() | marks):
        numbers = intents.get(span, [])
        # After the intents: they go only when the record is there.
        recorded = commit_path(folder, span).exists()
        if not recorded and numbers:
            intent = _read_intent(folder, span, max(numbers), files(span))
            recorded = intent is not None and _finish(folder, intent)
        if recorded:
            _clear(folder, span, numbers)


def decided_spans(folder: Path) -> tuple[dict[int, list[int]], set[int]]:
    """Numbers of the intents that stand, by span; and the spans with a mark, which had a record when it was made."""
    intents: dict[int, list[int]] = {}
    marks: set[int] = set()
    for name in os.listdir(folder / "commits"):
        if match := _INTENT.fullmatch(name):
            intents.setdefault(int(match[1]), []).append(int(match[2] or 0))
        elif match := _MARK.fullmatch(name):
            marks.add(int(match[1]))
    return intents, marks


def _stage(path: Path, data: bytes | memoryview) -> FileRecord:
    """A new file with ``data``, on the disk."""
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
    """Make ``path`` appear whole with ``data``; False if it is there. (:func:`publish` would list ``commits/`` for what
    the dead left of it, at every span.) With a ``mark``, which appears after it, its bytes are flushed.
    """
    begun = unfinished(path)
    try:
        begun.write_bytes(data)
        if mark is not None:
            flush(begun)
        os.link(begun, path)
        if mark is not None:
            os.rename(begun, mark)
    except FileExistsError:
        return False
    finally:
        begun.unlink(missing_ok=True)
    return True


def _intents_of(folder: Path, span: int) -> int:
    """How many intents ``span`` has, up to a gap."""
    number = 0
    while _intent_path(folder, span, number).exists():
        number += 1
    return number


def _read_intent(folder: Path, span: int, number: int, files: Sequence[str]) -> _Intent | None:
    """Intent ``number`` of ``span``; None if there is none, or it is damaged.

    ``files`` are the paths that the span has: an intent that names others could move anything.
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
    """Move what is staged, and write the record. False if a file is neither staged nor in place: it is given up."""
    moved_before: list[str] = []
    folders: set[Path] = set()
    for key, name in intent.staged.items():
        place = folder / key
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(folder / "commits" / name, place)
        except FileNotFoundError:
            moved_before.append(key)
        parents = [folder / parent for parent in PurePath(key).parents]
        folders.update(parents[:-1] or parents)
    for key in moved_before:
        try:
            if FileRecord.of(folder / key) == intent.commit.files[key]:
                continue
        except FileNotFoundError:
            pass
        # Nothing of it may move any more once there is another intent.
        _drop(folder, intent.staged)
        return False
    # Bytes, then their names in the folders, then the record: after a crash no record names what is not there.
    for parent in folders:
        flush(parent)
    path = commit_path(folder, intent.commit.span)
    _link(path, seal(intent.commit.to_json()), _mark_path(folder, intent.commit.span))
    flush(path.parent)
    return True


def _drop(folder: Path, staged: dict[str, str]) -> None:
    for name in staged.values():
        (folder / "commits" / name).unlink(missing_ok=True)


def _clear(folder: Path, span: int, numbers: Iterable[int]) -> None:
    """Remove the intents of a span that has its record, the last first: none is left beyond a gap. Then the mark, which
    tells of the record while there is an intent.
    """
    for number in sorted(numbers, reverse=True):
        _intent_path(folder, span, number).unlink(missing_ok=True)
    _mark_path(folder, span).unlink(missing_ok=True)
