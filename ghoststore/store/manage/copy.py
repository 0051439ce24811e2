"""``ghoststore.copy``: a checked copy of a part or a training run, in the same store or another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from ghoststore.errors import BusyError, CorruptError, UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.store import CopyOptions
from ghoststore.store.base.disk import create_whole
from ghoststore.store.base.manifest import manifest_of
from ghoststore.store.base.object_folders import appearing_folder, put_all
from ghoststore.store.base.object_path import ObjectPath, at_once
from ghoststore.store.base.objects import side_by_side
from ghoststore.store.base.opening import open_regular, parse_json, read_bounded, size_of
from ghoststore.store.base.records import json_digest, reading, unseal
from ghoststore.store.base.writable import check_writable
from ghoststore.store.manage.held import existing, folder_of, words_of
from ghoststore.store.run.journal import FOLDER as JOURNAL
from ghoststore.store.run.journal import Journal, entries_of, journal_path
from ghoststore.store.run.run import Run
from ghoststore.store.run.skipped import write_skipped
from ghoststore.store.spans.commits import LARGEST_COMMIT, Commit, commit_path
from ghoststore.store.spans.group import LARGEST_METADATA, Spanned
from ghoststore.store.spans.soundness import damaged, record_name, record_problem
from ghoststore.store.store import ROOT, Store

_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """The result of ``copy``."""

    store: str
    part: str | None
    run: str | None
    to_store: str
    to_name: str
    spans: int
    """Spans that were committed when the copy began."""
    complete: bool
    """Whether these are all spans."""
    files: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore cp --json`` prints."""
        return asdict(self)


@takes(CopyOptions)
def copy(options: CopyOptions) -> CopyReport:
    """Copy a part or a training run, and check every file against its record on the way.

    The copy appears whole or not at all. It holds what is committed when it begins: a process may go on writing the
    original, and either can be continued later under its ``name``. Caches and indexes are not copied; they are made
    again when needed. ``to_store`` is made if it does not exist.

    UsageError if there is none, or if the new name is taken; CorruptError naming a damaged file; BusyError while
    another process makes the copy; StorageError if the disk refuses.
    """
    store = Store.open(options.store)
    existing(store, options)
    source: Spanned[Any] = store.part(options.part) if options.run is None else store.run(options.run)
    name = options.to_name or options.name
    target = Store.create(options.store if options.to_store is None else options.to_store)
    path, target_words = folder_of(target, options, name), words_of(options, name)
    if path.exists():
        raise UsageError(
            f"{target.path} has a {target_words} already; nothing was copied. Give another `to_name`, or remove it"
        )
    check_writable(path.parent)
    copying = _Copying(source, options.progress or Silent())
    if isinstance(path, ObjectPath):
        copying.put(path)
    else:
        create_whole(path, copying.fill)
    if type(source)(path).manifest != source.manifest:
        raise BusyError(f"another process has just made a {target_words} of {target.path}; nothing was copied")
    return CopyReport(
        store=str(options.store),
        part=options.part,
        run=options.run,
        to_store=str(target.path),
        to_name=name,
        spans=len(source.spans),
        complete=source.complete,
        files=copying.files,
        bytes=copying.bytes,
    )


class _Copying:
    """Fills the folder of a copy."""

    def __init__(self, source: Spanned[Any], progress: Progress) -> None:
        self._source, self._progress = source, progress
        self.files = self.bytes = 0
        self._counting = Lock()

    def fill(self, folder: Path) -> None:
        """Write everything of the copy into the empty ``folder``."""
        source = self._source
        if isinstance(source, Run) and source.layout.save_steps is not None:
            self._copy_journals(source, folder)  # before the spans: a journal may become a span meanwhile
        self._write(folder / ROOT, self._metadata())
        for name, sha256 in source.files.items():
            self._copy(name, folder, sha256, None)
        for spec in source.layout.arrays():  # also those without chunks, as in a new part
            (folder / spec.name).mkdir(parents=True, exist_ok=True)
        with closing(self._progress.task(f"copying {source.name}", len(source.spans), unit="spans")) as task:
            for span in source.spans:
                files = self._record(span, folder)
                for _ in side_by_side(lambda file: self._copy(file[0], folder, *file[1:]), files, at_once(source.path)):
                    pass
                task.advance(1)

    def put(self, path: ObjectPath) -> None:
        """Put everything of the copy into an object store. UsageError for a run with steps outside full spans."""
        source = self._source
        if isinstance(source, Run) and (source.journals or source.skipped):
            raise UsageError(
                f"run {source.name!r} has steps that are not in full spans yet, and these are not kept in object "
                "storage: copy it when the training has ended"
            )
        root = self._metadata()
        contents = {"files": json_digest(source.files), "spans": source.fingerprint()}
        with (
            appearing_folder(path, root, contents) as begun,
            closing(self._progress.task(f"copying {source.name}", len(source.spans), unit="spans")) as task,
        ):
            if not begun:
                return
            put_all(path, ((name, partial(self._checked, name, sha256)) for name, sha256 in source.files.items()))
            for span in source.spans:
                record, files = self._commit(span)
                put_all(path, ((key, partial(self._checked, key, sha256, size)) for key, sha256, size in files))
                (path / record_name(span)).write_bytes(record)
                self.files, self.bytes = self.files + 1, self.bytes + len(record)
                task.advance(1)
        self.files, self.bytes = self.files + 1, self.bytes + len(root)

    def _checked(self, name: str, sha256: str, size: int | None = None) -> bytes:
        """The bytes of a file. CorruptError unless they are those that were written."""
        path = self._source.path / name
        data = b""
        if size is None or size_of(path, self._source.path) == size:
            data = b"".join(_pieces(path, self._source.path))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise damaged(self._source, [(name, "not what was written")])
        with self._counting:
            self.files, self.bytes = self.files + 1, self.bytes + len(data)
        return data

    def _copy_journals(self, run: Run, folder: Path) -> None:
        """Copy the journals, and the list of steps that will not come.

        A journal is removed when its span is committed: the run is reloaded then, at most once for each of its spans.
        """
        (folder / JOURNAL).mkdir()
        while not all(self._copy_journal(journal, folder) for journal in run.journals.values()):
            for copied in (folder / JOURNAL).iterdir():
                copied.unlink()
            run.reload()
        for path in (folder / JOURNAL).iterdir():
            self.files, self.bytes = self.files + 1, self.bytes + path.stat().st_size
        if run.skipped:
            write_skipped(folder, run.skipped)
            self.files += 1

    def _copy_journal(self, journal: Journal, folder: Path) -> bool:
        """Copy a journal. Returns False if it is gone. CorruptError if it is damaged."""
        journal.check()
        with open(journal_path(folder, journal.span), "xb") as copied:
            try:
                for data in entries_of(journal):
                    copied.write(data)
            except FileNotFoundError:
                return False
        return True

    def _metadata(self) -> bytes:
        """The bytes of the manifest, if it is still the one that was opened."""
        path = self._source.path / ROOT
        with reading(path):
            data = read_bounded(path, LARGEST_METADATA, self._source.path)
            manifest, files = manifest_of(parse_json(data)["attributes"], str(path), self._source.kind)
        if (manifest, files) != (self._source.recorded, self._source.files):
            raise CorruptError(f"{path} is another than when the copy began")
        return data

    def _record(self, span: int, folder: Path) -> list[tuple[str, str, int]]:
        """Copy the record of ``span``. Returns (path, SHA-256, bytes) of the files that the copied bytes name."""
        data, files = self._commit(span)
        self._write(commit_path(folder, span), data)
        return files

    def _commit(self, span: int) -> tuple[bytes, list[tuple[str, str, int]]]:
        """The bytes of the record of ``span``, and (path, SHA-256, bytes) of the files that they name."""
        path = commit_path(self._source.path, span)
        with reading(path, "is not a commit record", "`ghoststore verify` lists what is damaged"):
            data = read_bounded(path, LARGEST_COMMIT, self._source.path)
            commit = Commit.from_json(unseal(data))
        problem = "it is of another span" if commit.span != span else record_problem(self._source.layout, commit)
        if problem:
            raise damaged(self._source, [(record_name(span), problem)])
        return data, [(key, record.sha256, record.bytes) for key, record in commit.files.items()]

    def _copy(self, name: str, folder: Path, sha256: str, size: int | None) -> None:
        """Copy one file. CorruptError unless the copied bytes are those that were written."""
        path, to = self._source.path / name, folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        digest, count = hashlib.sha256(), 0
        with open(to, "xb") as copied:
            for piece in _pieces(path, self._source.path):
                digest.update(piece)
                count += len(piece)
                if size is not None and count > size:
                    break
                copied.write(piece)
        if digest.hexdigest() != sha256 or (size is not None and count != size):
            raise damaged(self._source, [(name, "not what was written")])
        with self._counting:
            self.files, self.bytes = self.files + 1, self.bytes + count

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.files, self.bytes = self.files + 1, self.bytes + len(data)


def _pieces(path: Path, within: Path) -> Iterator[bytes]:
    """The bytes of a file. CorruptError if it cannot be read: that is no error of the disk of the copy."""
    try:
        with open_regular(path, within) as file:
            while piece := file.read(_PIECE):
                yield piece
    except CorruptError:
        raise
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
