"""Takes spans out of a part or run: the record first, then the chunks, all into ``.withdrawn/<span>/``.

Nothing is deleted. A process that is killed in between leaves a span with chunks and no record, which is reported as
damage, or a span with neither, which counts as not built. In both cases the files still exist.
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
"""Subfolder for records and journals of spans that the part or run does not have."""
RECORD = "record.json"
_NUMBER = re.compile(r"[0-9]{8}")


def withdrawn_folder(source: Spanned[Any], span: int) -> Path:
    """The folder of the files of a withdrawn span."""
    return source.path / FOLDER / f"{span:08d}"


def withdrawn_spans(source: Spanned[Any]) -> list[int]:
    """Spans that were withdrawn, also those that were built again, in order."""
    folder = source.path / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(entry.name) for entry in folder.iterdir() if _NUMBER.fullmatch(entry.name))


def taken_out(source: Spanned[Any]) -> list[int]:
    """Spans of a part that a repair withdrew and that are not committed again. (Those of a run are given up.)"""
    if source.kind is not PART:
        return []
    return [span for span in withdrawn_spans(source) if not commit_path(source.path, span).exists()]


def withdraw(source: Spanned[Any], span: int) -> None:
    """Take ``span`` out; after a kill, another call continues. The caller must be the one writer of ``source``."""
    to = withdrawn_folder(source, span)
    to.mkdir(parents=True, exist_ok=True)
    # The record before the chunks, and on the disk: a record must never name a file that is gone.
    withdraw_record(source, span)
    for key in source.layout.span_keys(span):
        _move(source.path / key, to / key.replace("/", "+"))
    flush(to)


def withdraw_record(source: Spanned[Any], span: int) -> None:
    """Take only the record of ``span`` out, if there is one."""
    to = withdrawn_folder(source, span)
    to.mkdir(parents=True, exist_ok=True)
    path = commit_path(source.path, span)
    _move(path, to / RECORD)
    flush(path.parent)


def put_back(source: Spanned[Any], span: int) -> bool:
    """Put back what was withdrawn of ``span``, except where a file exists. Returns whether anything was put back.

    The caller must be the one writer of ``source``, and check the files afterwards.
    """
    folder, restored = withdrawn_folder(source, span), False
    for key in source.layout.span_keys(span):
        restored = _take(folder / key.replace("/", "+"), source.path / key) or restored
    # The record after the chunks that it names, once these are on the disk.
    for parent in {(source.path / key).parent for key in source.layout.span_keys(span)} if restored else ():
        flush(parent)
    path = commit_path(source.path, span)
    if _take(folder / RECORD, path):
        flush(path.parent)
        restored = True
    if restored:
        for parent in (folder, source.path / FOLDER):
            with suppress(OSError):  # it is not empty
                parent.rmdir()
    return restored


def _take(path: Path, to: Path) -> bool:
    if not path.is_file() or os.path.lexists(to):
        return False
    to.parent.mkdir(parents=True, exist_ok=True)
    os.rename(path, to)
    return True


def forget(source: Spanned[Any], span: int) -> None:
    """Remove what was withdrawn of ``span``."""
    shutil.rmtree(withdrawn_folder(source, span), ignore_errors=True)
    with suppress(OSError):  # it holds other spans
        (source.path / FOLDER).rmdir()


def _move(path: Path, to: Path) -> None:
    with suppress(FileNotFoundError):
        os.replace(path, to)
