"""The few requests to an object store that a store needs: read, read a range, list, create if absent, copy, delete.

One :class:`Objects` speaks to one bucket (S3, Google Cloud Storage) or container (Azure) through obstore, an optional
dependency. Credentials and endpoint come from the usual environment, and no message, log or manifest ever has them:
the texts of the library, which may hold a signed address, are not passed on.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from ghoststore.errors import GhostStoreError, StorageError, UsageError

SCHEMES = ("s3", "gs", "az")
IN_FLIGHT = 16
"""Requests at a time; docs/object-storage.md says how it was chosen."""
PAUSES = (0.1, 0.5, 2.0)
"""Most seconds before a request is sent again that ended without an answer."""
TIMEOUT = timedelta(seconds=60)
RETRIED = timedelta(seconds=60)
"""How long the library itself repeats a request that fails."""
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_STATUS = re.compile(r"status code: (\d{3}(?: [A-Za-z ]{1,40})?)")
_NO_BUCKET = re.compile(r"<Code>(?:NoSuchBucket|ContainerNotFound)</Code>|bucket does not exist", re.IGNORECASE)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Found:
    """An object, as a listing or an answer tells of it."""

    key: str
    size: int
    modified: float
    """Seconds since the epoch, by the clock of the store."""
    etag: str = ""
    """What the store calls these bytes; another one after each write. Empty if it says none."""

    @property
    def version(self) -> tuple[int, str | float]:
        """Differs from that of the object before it was written again."""
        return self.size, self.etag or self.modified


class EndsBeforeError(StorageError):
    """An object ends before the first byte that was asked for: it has become shorter."""


class Objects:
    """One bucket. Keys are without a leading slash. Threads may share it.

    FileNotFoundError for an object that does not exist; StorageError for a request that fails for another reason, also
    after it was repeated; UsageError if there is no such bucket.
    """

    def __init__(self, scheme: str, bucket: str) -> None:
        self._obstore = _library()
        self.name = f"{scheme}://{bucket}"
        self.scheme = scheme
        try:
            self._store = self._obstore.store.from_url(
                self.name,
                # Given together: options here replace those that the library takes from the environment.
                client_options={"timeout": TIMEOUT, "allow_http": _is_on(_ALLOW_HTTP[scheme])},
                retry_config={"max_retries": 4, "retry_timeout": RETRIED},
            )
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise UsageError(f"{self.name} cannot be opened ({type(error).__name__}); {_ENVIRONMENT[scheme]}") from None

    def head(self, key: str) -> Found:
        """Size and time of an object."""
        with self.errors("read", key):
            return _found(self._obstore.head(self._store, key))

    def get(self, key: str, start: int = 0, stop: int | None = None) -> tuple[Found, Iterator[Any]]:
        """(the object, its bytes from ``start``, up to ``stop``, in pieces as they arrive)."""
        options: dict[str, Any] = {}
        if stop is not None:
            options["range"] = (start, stop)
        elif start:
            options["range"] = {"offset": start}
        with self.errors("read", key):
            answer = self._obstore.get(self._store, key, options=options or None)
            return _found(answer.meta), self._pieces(answer, key)

    def _pieces(self, answer: Any, key: str) -> Iterator[Any]:
        with self.errors("read", key):
            yield from answer.stream(min_chunk_size=1 << 18)

    def below(self, prefix: str) -> Iterator[Found]:
        """Every object in the folder ``prefix`` and in the folders inside."""
        with self.errors("list", prefix):
            for page in self._obstore.list(self._store, prefix or None, chunk_size=1000):
                yield from map(_found, page)

    def folder(self, prefix: str) -> tuple[list[str], list[Found]]:
        """(keys of the folders, the objects) directly in ``prefix``. Both are empty if it does not exist."""
        with self.errors("list", prefix):
            listing = self._obstore.list_with_delimiter(self._store, prefix or None)
            return list(listing["common_prefixes"]), [_found(meta) for meta in listing["objects"]]

    def holds(self, prefix: str) -> bool:
        """Whether there is an object in the folder ``prefix``."""
        with self.errors("list", prefix):
            pages = self._obstore.list(self._store, prefix or None, chunk_size=1)
            return any(len(page) > 0 for page in pages)

    def create(self, key: str, data: Any) -> bool:
        """Make an object that must not exist. False, and nothing changes, if one with other bytes is there.

        One with the same bytes is a success: the answer to an earlier attempt may have been lost.
        """
        for pause in (*PAUSES, None):
            try:
                with self.errors("write", key):
                    self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
                return True
            except FileExistsError:
                try:
                    return self._is(key, data)
                except FileNotFoundError:  # removed since, as a claim that has served: the place is free again
                    if pause is None:
                        raise
            except StorageError:
                if pause is None:
                    raise
                time.sleep(random.uniform(0, pause))
        raise AssertionError

    def put(self, key: str, data: Any) -> None:
        """Make an object, or replace it."""
        with self.errors("write", key):
            self._obstore.put(self._store, key, data, use_multipart=False)

    def copy(self, key: str, to: str) -> None:
        """Copy an object inside the bucket, without its bytes coming here. One at ``to`` is replaced."""
        with self.errors("write", to):
            self._obstore.copy(self._store, key, to)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, if they exist."""
        present = list(keys)
        for first in range(0, len(present), 500):
            with self.errors("remove", present[first]):
                if self.scheme == "s3":
                    self._obstore.delete(self._store, present[first : first + 500])
                    continue
                for key in present[first : first + 500]:  # these refuse to remove what is not there
                    try:
                        self._obstore.delete(self._store, key)
                    except FileNotFoundError:
                        continue

    def _is(self, key: str, data: Any) -> bool:
        found, pieces = self.get(key)
        expected = memoryview(data).cast("B")
        if found.size != expected.nbytes:
            return False
        place = 0
        for piece in pieces:
            view = memoryview(piece)
            if view != expected[place : place + len(view)]:
                return False
            place += len(view)
        return place == expected.nbytes

    @contextmanager
    def errors(self, verb: str, key: str) -> Iterator[None]:
        """Turn the errors of the library into ours, without its texts, and say what could not be done to ``key``."""
        exceptions = self._obstore.exceptions
        try:
            yield
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise UsageError(f"there is no bucket {self.name}, or it is not yours to see") from None
            raise FileNotFoundError(2, "no such object", f"{self.name}/{key}") from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise FileExistsError(17, "the object exists", f"{self.name}/{key}") from None
        except GhostStoreError:
            raise
        except (exceptions.BaseError, OSError) as error:
            if _NO_BUCKET.search(str(error)):
                raise UsageError(f"there is no bucket {self.name}, or it is not yours to see") from None
            kind = EndsBeforeError if "416" in _said(str(error)) else StorageError
            raise kind(
                f"cannot {verb} {self.name}/{key}: {_reason(error, exceptions, self.scheme)}. What was committed is "
                "intact: run the same command again"
            ) from None


_ENVIRONMENT = {
    "s3": "credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
    "AWS_REGION, AWS_ENDPOINT_URL; AWS_ALLOW_HTTP=true for one without TLS)",
    "gs": "credentials come from the environment (GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS)",
    "az": "account and key come from the environment (AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY)",
}


_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def _reason(error: Exception, exceptions: Any, scheme: str) -> str:
    text = str(error)
    said = _said(text)
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)) or "403" in said:
        return f"access is denied{said}; {_ENVIRONMENT[scheme]}"
    if "169.254.169.254" in text or "builder error" in text or "metadata" in text.lower():
        return f"there are no credentials, or the endpoint is without TLS{said}; {_ENVIRONMENT[scheme]}"
    if isinstance(error, exceptions.InvalidPathError):
        return "its name cannot be that of an object"
    return f"the server refused{said}" if said else "the server did not answer, or broke off"


def _said(text: str) -> str:
    """Status and code of an answer that refuses, in brackets; nothing if there was none."""
    facts = [match[1].strip() for match in (_STATUS.search(text), _CODE.search(text)) if match is not None]
    return f" ({', '.join(facts)})" if facts else ""


def _found(meta: Any) -> Found:
    # Azure has quotes around it in some answers and none in others.
    etag = (meta.get("e_tag") or "").removeprefix("W/").strip('"')
    return Found(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp(), etag)


@cache
def objects_of(scheme: str, bucket: str) -> Objects:
    """The one :class:`Objects` of a bucket. UsageError if obstore is not installed."""
    return Objects(scheme, bucket)


def _library() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise UsageError(
            "a store in object storage needs obstore, which is not installed: pip install 'ghoststore[object]'"
        ) from None
    return obstore


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], at_once: int = IN_FLIGHT) -> Iterator[Result]:
    """``work(item)`` of each item, in order, at most ``at_once`` at a time; items are taken as they are needed.

    The first error of ``work`` is raised here, when none of them is under way any more.
    """
    if at_once == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(at_once, "ghoststore-requests") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
