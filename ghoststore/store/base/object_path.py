"""A place in an object store that stands where the path of a file or folder stands.

Below ``ghoststore.store`` every file has a `Path`. An :class:`ObjectPath` is one whose methods ask the object store.
The system's own functions (``open``, ``os.rename``, …) refuse it: code that was not made for objects ends with an error
and never with a local folder called ``s3:``. A folder exists as long as an object is in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from io import RawIOBase
from pathlib import Path, PosixPath
from typing import Any

from ghoststore.errors import GhostStoreError, StorageError, UsageError
from ghoststore.settings.option import refuse_remote
from ghoststore.store.base.objects import IN_FLIGHT, SCHEMES, Found, Objects, objects_of

_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}):(/{{0,2}})(.*)", re.DOTALL)
_NO_KEY = re.compile(r"[?#@%\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters of a query or of credentials, and those that no object's name can have."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class NoFileError(GhostStoreError, TypeError):
    """Something was to be done with an object that takes a file of this machine (exit code 2)."""

    exit_code = 2


class ObjectPath(PosixPath):
    """``s3://bucket/key``. :func:`location` makes it; its ``/``, ``parent`` and ``name`` are those of a path."""

    _listed: Found | bool | None = None
    """What the listing that this path comes from said: the object, True for a folder. None if it was not listed."""
    opened: Any = None
    """A :class:`~ghoststore.store.base.object_ranges.RangedFile` whose beginning was asked for already; taken once."""

    def __str__(self) -> str:
        scheme, separator, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if separator else scheme

    def __fspath__(self) -> str:
        # No ValueError, which os.path.exists would take for "no".
        raise NoFileError(f"{self} is in object storage, and this cannot be done there: it takes files of this machine")

    @property
    def objects(self) -> Objects:
        """The bucket."""
        return objects_of(self.parts[0][:-1], self.parts[1])

    @property
    def key(self) -> str:
        """The key in the bucket."""
        return "/".join(self.parts[2:])

    def _head(self) -> Found | None:
        if isinstance(self._listed, Found):
            return self._listed
        try:
            return None if self._listed is True or not self.key else self.objects.head(self.key)
        except FileNotFoundError:
            return None

    def exists(self, **_: Any) -> bool:
        return self._head() is not None or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        return self._head() is not None

    def is_dir(self, **_: Any) -> bool:
        if self._listed is not None:
            return self._listed is True
        return self.objects.holds(self.key)

    def is_symlink(self) -> bool:
        return False

    def stat(self, **_: Any) -> os.stat_result:
        found = self._head()
        if found is None:
            raise FileNotFoundError(2, "no such object", str(self))
        times = (int(found.modified),) * 3
        return os.stat_result((stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, found.size, *times))

    def lstat(self) -> os.stat_result:
        return self.stat()

    @property
    def listed(self) -> Found | None:
        """What the listing that this path comes from said of the object."""
        return self._listed if isinstance(self._listed, Found) else None

    def twin(self) -> ObjectPath:
        """An equal path of its own, with what the listing said."""
        return self if self._listed is None else self._of(self.key, self._listed)

    def looked_up(self) -> ObjectPath:
        """This path, with what there is: nothing asks for that again."""
        found = self._head()
        # Of a folder some tools make an empty object, too.
        if (found is None or not found.size) and self.is_dir():
            return self._of(self.key, True)
        return self if found is None else self._of(self.key, found)

    def iterdir(self) -> Iterator[ObjectPath]:  # type: ignore[override]
        """The objects and folders in it. FileNotFoundError if there are none."""
        folders, objects = self.objects.folder(self.key)
        objects = [found for found in objects if found.key != self.key]  # consoles make an object for a folder
        if not folders and not objects:
            raise FileNotFoundError(2, "no such folder", str(self))
        for key in folders:
            yield self._of(key, True)
        for found in objects:
            yield self._of(found.key, found)

    def below(self) -> Iterator[tuple[str, ObjectPath]]:
        """(path in it, object) of every object in it and in the folders inside."""
        skipped = len(self.key) + 1 if self.key else 0
        for found in self.objects.below(self.key):
            yield found.key[skipped:], self._of(found.key, found)

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        wanted = pattern.split("/")
        for name, path in self.below():
            parts = name.split("/")
            if len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)):
                yield path

    def rglob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:  # type: ignore[override]
        return (path for _, path in self.below() if fnmatchcase(path.name, pattern))

    def __truediv__(self, name: Any) -> ObjectPath:
        joined = super().__truediv__(name)
        assert isinstance(joined, ObjectPath)
        return joined

    def _of(self, key: str, listed: Found | bool) -> ObjectPath:
        path = type(self)(self.parts[0], self.parts[1], key)
        path._listed = listed
        return path

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: an object makes its folders."""

    def rmdir(self) -> None:
        """Nothing: a folder without objects does not exist."""

    def read_bytes(self) -> bytes:
        with ObjectFile(self) as file:
            return file.read()

    def write_bytes(self, data: Any) -> int:
        self.objects.put(self.key, bytes(data))
        return len(data)

    def create(self, data: Any) -> bool:
        """See :meth:`Objects.create`."""
        return self.objects.create(self.key, data)

    def copy_to(self, to: ObjectPath) -> None:
        """Copy it inside its bucket. FileNotFoundError if it does not exist."""
        self.objects.copy(self.key, to.key)

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "no such object", str(self))
        self.objects.delete([self.key])

    def resolve(self, strict: bool = False) -> ObjectPath:
        return self

    def absolute(self) -> ObjectPath:
        return self

    def is_absolute(self) -> bool:
        return True


class ObjectReader(RawIOBase):
    """An object, open for reading: a place in it, to which :meth:`seek` goes without a request."""

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._position = 0

    @property
    def size(self) -> int:
        """Bytes of the object."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in a file on a disk: OSError for a place before the beginning."""
        start = self.size if whence == os.SEEK_END else self._position if whence == os.SEEK_CUR else 0
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = start + offset
        return self._position


class ObjectFile(ObjectReader):
    """An object, open for reading: one request, and another after each :meth:`seek`.

    The library continues an answer that breaks off where it ended. FileNotFoundError if there is no such object.
    """

    def __init__(self, path: ObjectPath) -> None:
        super().__init__(path)
        self._rest = memoryview(b"")
        self._pieces: Iterator[Any] | None = None
        self._size = 0
        self._request()

    def _request(self) -> None:
        found, self._pieces = self.path.objects.get(self.path.key, self._position)
        self._size, self._rest = found.size, memoryview(b"")

    @property
    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before, place = self._position, super().seek(offset, whence)
        if place != before:
            self._pieces, self._rest = None, memoryview(b"")
        return place

    def readall(self) -> bytes:
        data = bytearray(max(0, self.size - self._position))
        view, filled = memoryview(data), 0
        while filled < len(view):
            filled += self.readinto(view[filled:])
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if not len(view) or self._position >= self.size:
            return 0
        while not len(self._rest):
            if self._pieces is None:
                self._request()
            assert self._pieces is not None
            self._rest = memoryview(next(self._pieces, b"")).cast("B")
            if not len(self._rest):
                raise StorageError(f"cannot read {self.path}: the answer ends at byte {self._position}")
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        self._position += count
        return count


def piece(path: ObjectPath, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of an object; fewer if it ends before."""
    _, pieces = path.objects.get(path.key, start, stop)
    return b"".join(bytes(part) for part in pieces)


def beginning(path: ObjectPath, count: int) -> tuple[int, bytes]:
    """(bytes of the object, the first ``count`` of them), by one request."""
    found, pieces = path.objects.get(path.key, 0, count)
    return found.size, b"".join(bytes(piece) for piece in pieces)


def at_once(path: Path) -> int:
    """How many files are read or written at a time: one by one on a disk, several objects."""
    return IN_FLIGHT if isinstance(path, ObjectPath) else 1


def location(place: str | Path, what: str = "store") -> Path:
    """Where a store (``what``) is: the path of a local folder, or an :class:`ObjectPath`.

    UsageError for any other address, and for one without a bucket or with credentials in it.
    """
    if isinstance(place, ObjectPath):
        return place
    refuse_remote("store", place)
    address = _ADDRESS.fullmatch(str(place))
    if address is None:
        return Path(place)
    scheme, slashes, rest = address.groups()
    bucket, _, key = rest.partition("/")
    keys = [part for part in key.split("/") if part]
    if not slashes or not _BUCKET.fullmatch(bucket) or {".", ".."} & set(keys) or _NO_KEY.search(key):
        shown = "" if "@" in rest or "?" in rest else f" {str(place)!r:.200}"
        raise UsageError(
            f"the address{shown} of the {what} cannot be used: write {scheme}://BUCKET/PREFIX, without credentials "
            "(these come from the environment) and without ? # @ % or control characters in it; a bucket's name has 3 "
            "to 63 characters"
        )
    return ObjectPath(f"{scheme}:", bucket, *keys)


def refuse_objects(place: str | Path | None, parameter: str, what: str, advice: str) -> None:
    """UsageError if a store is in object storage, where ``what`` is not done."""
    if place is not None and isinstance(location(place), ObjectPath):
        raise UsageError(f"`{parameter}={place}`: {what} is not done in object storage; {advice}")


def cache_folder() -> Path:
    """The folder of this user on this machine for what can be had again: copies, and what was computed.

    UsageError if there is neither the variable nor a home.
    """
    variable = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(variable) if os.path.isabs(variable) else Path.home() / ".cache"
    except RuntimeError:
        raise UsageError("this user has no home folder: set XDG_CACHE_HOME to a folder for caches") from None
    return folder / "ghoststore"


def local_cache(path: ObjectPath) -> Path:
    """The folder in :func:`cache_folder` for what is computed from ``path`` and can be computed again."""
    return cache_folder() / "objects" / hashlib.sha256(str(path).encode()).hexdigest()[:32]
