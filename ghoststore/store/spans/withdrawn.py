"""Spans that are taken out of a part or run: their record first, then their chunks, all into ``.withdrawn/<span>/``.

Nothing is deleted. Whoever is killed in between leaves a span without a record and with chunks, which is named as
damage, or a span without either, which nobody has built; and in both cases the files are still there.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghoststore.store.base.disk import flush
from ghoststore.store.base.manifest import PART
from ghoststore.store.spans.commits import commit_path

if TYPE_CHECKING:
    from ghoststore.store.spans.group import Spanned

FOLDER = ".withdrawn"
FOREIGN = "foreign"
"""In it: records and journals of spans that a part or run does not have."""
RECORD = "record.json"
_NUMBER = re.compile(r"[0-9]{8}")


def aside(source: Spanned[Any], span: int) -> Path:
    """Where the files of a withdrawn span lie."""
    return source.path / FOLDER / f"{span:08d}"


def withdrawn_spans(source: Spanned[Any]) -> list[int]:
    """Spans that were withdrawn, built again or not, in order."""
    folder = source.path / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if _NUMBER.fullmatch(entry.name))


def taken_out(source: Spanned[Any]) -> list[int]:
    """Spans of a part that a repair withdrew and that are not committed again. (Those of a run were given up.)"""
    if source.kind is not PART:
        return []
    return [span for span in withdrawn_spans(source) if not commit_path(source.path, span).exists()]


def withdraw(source: Spanned[Any], span: int) -> None:
    """Take ``span`` out. Again after a kill, it goes on. The caller is the one writer of ``source``."""
    to = aside(source, span)
    to.mkdir(parents=True, exist_ok=True)
    # The record before the chunks that it names, and on the disk: a record never names what is not there.
    withdraw_record(source, span)
    for key in source.layout.span_keys(span):
        _move(source.path / key, to / key.replace("/", "+"))
    flush(to)


def withdraw_record(source: Spanned[Any], span: int) -> None:
    """Take the record of ``span`` alone out, if there is one."""
    to = aside(source, span)
    to.mkdir(parents=True, exist_ok=True)
    path = commit_path(source.path, span)
    _move(path, to / RECORD)
    flush(path.parent)


def put_back(source: Spanned[Any], span: int) -> bool:
    """Take back what was withdrawn of ``span``, where nothing else is in its place; whether anything was. The caller is
    the one writer of ``source``, and checks what it has then.
    """
    to, back = aside(source, span), False
    for key in source.layout.span_keys(span):
        back = _take(to / key.replace("/", "+"), source.path / key) or back
    # The record after the chunks that it names, and these on the disk.
    for folder in {(source.path / key).parent for key in source.layout.span_keys(span)} if back else ():
        flush(folder)
    path = commit_path(source.path, span)
    if _take(to / RECORD, path):
        flush(path.parent)
        back = True
    if back:
        for folder in (to, source.path / FOLDER):
            with suppress(OSError):  # something else is still in there
                folder.rmdir()
    return back


def _take(path: Path, place: Path) -> bool:
    if not path.is_file() or os.path.lexists(place):
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, place)
    return True


def forget(source: Spanned[Any], span: int) -> None:
    """Remove what was withdrawn of ``span``."""
    shutil.rmtree(aside(source, span), ignore_errors=True)
    with suppress(OSError):  # others are still in there
        (source.path / FOLDER).rmdir()


def _move(path: Path, to: Path) -> None:
    with suppress(FileNotFoundError):
        os.replace(path, to)
