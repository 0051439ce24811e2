"""Files for users: each appears whole, on the disk, or not at all; and so do several that belong together.

Several (`new_files`) are written aside, each in a folder of its own. Then a mark, ``.NAME.unfinished`` beside the
first, says what they are; each gets its name, the last one last; and the mark goes. A process that is killed in between
leaves the mark, and the next call takes back what has its name already: only files that are, byte for byte, what the
mark says.
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
"""How often, and after how many seconds, to look whether another process has named its files."""
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What link answers on file systems that have none (FAT, mounted buckets)."""
LONGEST = 100
"""Bytes of a name that stand in the name of what is beside it."""


def check_new(what: str, path: Path, *others: Path) -> None:
    """UsageError if ``path``, called ``what``, exists, or the folder that it is to be in does not.

    ``others`` are written with it, by `new_files`: what a killed call of that left may stand there.
    """
    if os.path.lexists(path) and path not in left_behind([path, *others]):
        raise UsageError(f"{what} exists; nothing was written. Give another path, or remove it")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"{what}: the folder {path.resolve().parent} does not exist")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """The operating system's errors in words. UsageError if ``path`` came to exist meanwhile, else StorageError."""
    try:
        yield
    except FileExistsError as error:
        there = error.filename2 or path
        raise UsageError(f"{there} exists by now; nothing was written. Give another path, or remove it") from error
    except OSError as error:
        system = hidden_error(error) or error
        if system.errno is None or not _concerns(
            system, path
        ):  # ours, a library's own words, or of a file that is read
            raise
        raise StorageError(
            f"cannot write {path}: {reason_of(system)}. Nothing was written under that name: run the same command again"
        ) from error


@contextmanager
def new_file(path: Path, *, over: bool = False) -> Iterator[Path]:
    """Where to write what is to be the new file ``path``; with ``over`` what stands there is replaced in one step.

    Errors as of `writing`.
    """
    with writing(path), _aside(path, over=over) as temporary:
        yield temporary


@contextmanager
def _aside(path: Path, *, over: bool = False) -> Iterator[Path]:
    """As `new_file`; what the system refuses is raised as it is, FileExistsError among it."""
    temporary = unfinished(path)
    _sweep(path)
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
        except OSError:  # whether it has its name after a crash is not known: what was refused does not stay
            path.unlink()
            raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_files(*paths: Path) -> Iterator[list[Path]]:
    """Where to write what are to be the new files or folders ``paths``, which get their names together, the last one
    last. Each keeps its name, in a folder aside.

    Errors as of `writing`; BusyError while another process gives the same files their names.
    """
    folders = [unfinished(path) for path in paths]
    staged = [folder / path.name for folder, path in zip(folders, paths, strict=True)]
    with ExitStack() as stack:
        with writing(paths[0]):
            for folder, path in zip(folders, paths, strict=True):
                _sweep(path)
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
    """Those of ``paths`` to which a killed `new_files` gave their names, and which are unchanged."""
    found: set[Path] = set()
    for path in paths:
        try:
            with reading(_mark(path), advice="remove it"):
                files = read_record(_mark(path))["files"]
                found |= {one for one in paths if _key(one) in files and _digest(one) == files[_key(one)]}
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def _name(staged: Sequence[Path], paths: Sequence[Path]) -> None:
    """Give the ``staged`` files, which are complete, their names."""
    for file in staged:
        _flush_all(file)
    digests = {_key(path): str(_digest(file)) for path, file in zip(paths, staged, strict=True)}
    mark = _mark(paths[0])
    with _one_at_a_time(mark.parent):
        _take_back(mark, paths, digests)
        try:
            with _aside(mark) as file:
                file.write_bytes(seal({"by": this_process(), "files": digests}))
        except FileExistsError:  # though nobody else should be here: flock does nothing
            raise BusyError(
                f"{paths[0]} is being written by another process; wait for it, or give another path"
            ) from None
        named: list[Path] = []
        try:
            for path, file in zip(paths, staged, strict=True):
                if path is paths[-1]:  # it says that the others are there: also after a crash
                    for parent in {other.parent for other in named}:
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
    """Undo what a killed process had begun to name. UsageError if it had named everything, and that is not the same."""
    try:
        with reading(mark, advice="remove it"):
            record = read_record(mark)
            by, files = record["by"], record["files"]
            gone = is_gone(by)
            # Nobody touches a mark: naming files takes far less than what a writer may be silent.
            if gone is False or (gone is None and not is_forgotten(mark)):
                raise BusyError(
                    f"{paths[0]} is being written by process {by['pid']} on {by['host']}; wait for it, or give "
                    "another path"
                )
    except FileNotFoundError:
        return
    there = left_behind(paths)
    if len(there) == len(files) and files != digests:
        mark.unlink()
        raise UsageError(f"{paths[0]} exists; nothing was written. Give another path, or remove it")
    for path in there:
        _remove(path)
    mark.unlink()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process names files in ``folder``, which takes a moment; BusyError if it takes long.

    Does nothing where flock does nothing.
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
    """Whether what was refused is ``path``, or what is written aside for it."""
    name = error.filename
    return not isinstance(name, str | Path) or Path(os.path.abspath(name)).is_relative_to(_key(path.parent))


def _move(file: Path, path: Path) -> None:
    """Give ``file``, or a folder, the name ``path``; FileExistsError if something has it."""
    if not file.is_dir():
        try:
            os.link(file, path)  # at once both: whether something stands there, and the name
            return
        except OSError as error:
            with suppress(OSError):
                if os.path.samefile(file, path):
                    return  # done, though the answer of the file system was lost
            if error.errno not in NO_LINKS:
                raise
    # Folders have no links, nor do some file systems: a file that appears between these two lines is lost.
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(file), None, str(path))
    os.rename(file, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_all(path: Path) -> None:
    """A file, or everything in a folder."""
    if path.is_dir():
        for inside, _, names in os.walk(path):
            for name in names:
                flush(Path(inside) / name)
            flush(Path(inside))
    else:
        flush(path)


def _digest(path: Path) -> str | None:
    """Of the content of a file or of everything in a folder; None for anything else."""
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
    """``name``, or what a name beside it has room for."""
    data = os.fsencode(name)
    if len(data) <= LONGEST:
        return name
    return f"{data[:LONGEST].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:12]}"


def _sweep(path: Path) -> None:
    """Remove what dead processes left beside ``path`` in writing it, and its mark."""
    for name in (path, _mark(path)):
        # As `unfinished` writes it, cut where it is long.
        begin = unfinished(name).name.rpartition(own_id())[0]
        for other in path.parent.glob(f"{glob.escape(begin)}*.tmp"):
            if left_by_dead(other, set()):
                _remove(other)


def _final_names(text: str, staged: Sequence[Path], paths: Sequence[Path]) -> str:
    for file, path in zip(staged, paths, strict=True):
        text = text.replace(str(file), str(path))
    return text
