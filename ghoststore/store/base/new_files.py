"""Files for users: each appears whole, on the disk, or not at all. So do several that belong together.

`new_files` writes each file in a temporary folder of its own. Then a mark, ``.NAME.unfinished`` beside the first file,
records their checksums; the files get their names, the last path last; and the mark is removed. A process that is
killed in between leaves the mark. The next call then removes the files that already have their names, but only those
that are, byte for byte, what the mark says.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ghoststore.errors import BusyError, GhostStoreError, StorageError, UsageError, reason_of
from ghoststore.hidden_errors import hidden_error
from ghoststore.processes import is_gone, this_process
from ghoststore.store.base.disk import NO_LOCKS, flush
from ghoststore.store.base.records import FileRecord, json_digest, read_record, reading, seal
from ghoststore.store.base.writers import is_forgotten, own_id, touched, unfinished
from ghoststore.store.base.writers import left_behind as left_by_dead

LOOKS, PAUSE = 100, 0.1
"""Attempts, and seconds between them, to wait until another process has named its files."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Errors of link on file systems without hard links (FAT, mounted buckets)."""
LONGEST = 100
"""Most bytes of a file's name that are repeated in the name of its temporary file or mark."""


def check_new(what: str, path: Path, *others: Path) -> None:
    """UsageError if ``path`` exists, or its folder does not. ``what`` is its name in the message.

    ``others`` are written with it by `new_files`; what a killed call of that left behind may exist.
    """
    if os.path.lexists(path) and path not in left_behind([path, *others]):
        raise UsageError(f"{what} exists; nothing was written. Give another path, or remove it")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{what}: the folder {path.resolve().parent} does not exist")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into UsageError if ``path`` exists by now, else into StorageError."""
    try:
        yield
    except FileExistsError as error:
        existing = error.filename2 or path
        raise UsageError(f"{existing} exists by now; nothing was written. Give another path, or remove it") from error
    except OSError as error:
        system = hidden_error(error) or error
        # Others are our own errors, sentences of a library, or errors of a file that is read.
        if system.errno is None or not _concerns(system, path):
            raise
        raise StorageError(
            f"cannot write {path}: {reason_of(system)}. Nothing was written under that name: run the same command again"
        ) from error


@contextmanager
def new_file(path: Path, *, over: bool = False) -> Iterator[Path]:
    """Yield the path to write to; at the end it becomes the new file ``path``.

    With ``over`` an existing file is replaced in one step. Raises as `writing`.
    """
    with writing(path), _aside(path, over=over) as temporary:
        yield temporary


@contextmanager
def _aside(path: Path, *, over: bool = False) -> Iterator[Path]:
    """As `new_file`, but with the errors of the operating system as they are, FileExistsError among them."""
    temporary = unfinished(path)
    sweep(path)
    try:
        yield temporary
        flush(temporary)
        if over:
            os.replace(temporary, path)
            flush(path.parent)
            return
        _move(temporary, path)
        try:
            flush(path.parent)
        except OSError:  # after a crash the name might be gone: a file that was refused must not stay
            path.unlink()
            raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_files(*paths: Path) -> Iterator[list[Path]]:
    """Yield the paths to write to; at the end they become the new files or folders ``paths`` together, in this order.

    Each has its final name, in a temporary folder. Raises as `writing`; BusyError while another process names the same
    files.
    """
    folders = [unfinished(path) for path in paths]
    staged = [folder / path.name for folder, path in zip(folders, paths, strict=True)]
    with ExitStack() as stack:
        with writing(paths[0]):
            for folder, path in zip(folders, paths, strict=True):
                sweep(path)
                folder.mkdir()
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(touched(folder))
        try:
            with writing(paths[0]):
                yield staged
        except GhostStoreError as error:
            error.args = (_final_names(str(error), staged, paths), *error.args[1:])
            raise
        with writing(paths[-1]):
            _name(staged, paths)


def left_behind(paths: Sequence[Path]) -> set[Path]:
    """Those of ``paths`` that a killed call of `new_files` has named, and that are unchanged."""
    unchanged: set[Path] = set()
    for path in paths:
        try:
            with reading(_mark(path), advice="remove it"):
                files = read_record(_mark(path))["files"]
                unchanged |= {file for file in paths if _key(file) in files and _digest(file) == files[_key(file)]}
        except (FileNotFoundError, NotADirectoryError):
            continue
    return unchanged


def _name(staged: Sequence[Path], paths: Sequence[Path]) -> None:
    """Give the complete ``staged`` files their names."""
    for file in staged:
        _flush_all(file)
    digests = {_key(path): str(_digest(file)) for path, file in zip(paths, staged, strict=True)}
    mark = _mark(paths[0])
    with _one_at_a_time(mark.parent):
        _take_back(mark, paths, digests)
        try:
            with _aside(mark) as file:
                file.write_bytes(seal({"by": this_process(), "files": digests}))
        except FileExistsError:  # another process is here, so flock has no effect
            raise BusyError(
                f"{paths[0]} is being written by another process; wait for it, or give another path"
            ) from None
        named: list[Path] = []
        try:
            for path, file in zip(paths, staged, strict=True):
                if path is paths[-1]:  # it tells readers that the others exist, also after a crash
                    for parent in {file_path.parent for file_path in named}:
                        flush(parent)
                _move(file, path)
                named.append(path)
            flush(paths[-1].parent)
        except BaseException:
            for path in named:
                _remove(path)
            mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)


def _take_back(mark: Path, paths: Sequence[Path], digests: Mapping[str, str]) -> None:
    """Undo what a killed process named. UsageError if it had named all files, and theirs differ from ours."""
    try:
        with reading(mark, advice="remove it"):
            record = read_record(mark)
            by, files = record["by"], record["files"]
            gone = is_gone(by)
            # A mark is never touched: naming files takes far less time than a writer may be silent.
            if gone is False or (gone is None and not is_forgotten(mark)):
                raise BusyError(
                    f"{paths[0]} is being written by process {by['pid']} on {by['host']}; wait for it, or give "
                    "another path"
                )
    except FileNotFoundError:
        return
    existing = left_behind(paths)
    if len(existing) == len(files) and files != digests:
        mark.unlink()
        raise UsageError(f"{paths[0]} exists; nothing was written. Give another path, or remove it")
    for path in existing:
        _remove(path)
    mark.unlink()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process names files in ``folder``. BusyError if that takes long.

    Without effect on file systems without locks.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(LOOKS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(PAUSE)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
        else:
            raise BusyError(f"another process is writing results in {folder}; wait for it, or give another folder")
        yield
    finally:
        os.close(handle)


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error is about ``path`` or a temporary file for it."""
    name = error.filename
    return not isinstance(name, str | Path) or Path(os.path.abspath(name)).is_relative_to(_key(path.parent))


def _move(file: Path, path: Path) -> None:
    """Give ``file``, or a folder, the name ``path``; FileExistsError if something has it."""
    if not file.is_dir():
        try:
            os.link(file, path)  # names the file and fails if something exists, in one step
            return
        except OSError as error:
            with suppress(OSError):
                if os.path.samefile(file, path):
                    return  # done, though the reply of the file system was lost
            if error.errno not in NO_LINKS:
                raise
    # Folders cannot be linked, nor files on some file systems: a file that appears between these two lines is lost.
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file), None, str(path))
    os.rename(file, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_all(path: Path) -> None:
    """Flush a file, or everything in a folder."""
    if path.is_dir():
        for directory, _, names in os.walk(path):
            for name in names:
                flush(Path(directory) / name)
            flush(Path(directory))
    else:
        flush(path)


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of everything in a folder; None for anything else."""
    if path.is_symlink():
        return None
    if path.is_file():
        return FileRecord.of(path).sha256
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return json_digest({str(file.relative_to(path)): FileRecord.of(file).sha256 for file in files})
    return None


def _key(path: Path) -> str:
    return str(Path(os.path.abspath(path)))


def _mark(path: Path) -> Path:
    return path.with_name(f".{_cut(path.name)}.unfinished")


def _cut(name: str) -> str:
    """``name``, cut if it is long, so that there is room for a prefix and a suffix."""
    data = os.fsencode(name)
    if len(data) <= LONGEST:
        return name
    return f"{data[:LONGEST].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:12]}"


def sweep(path: Path) -> None:
    """Remove temporary files of dead processes for ``path`` and for its mark."""
    for name in (path, _mark(path)):
        # The form of `unfinished`, which cuts long names.
        prefix = unfinished(name).name.rpartition(own_id())[0]
        for other in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
            if left_by_dead(other, set()):
                _remove(other)


def _final_names(text: str, staged: Sequence[Path], paths: Sequence[Path]) -> str:
    for file, path in zip(staged, paths, strict=True):
        text = text.replace(str(file), str(path))
    return text
