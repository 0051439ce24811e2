"""``ghoststore query --server``: the question goes to an explorer, which has the model already; the answer is the same.

Only loopback is spoken to, and never by a proxy: the address holds a token. It is named in no message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from http.client import HTTPConnection, HTTPException
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import parse_qs, quote, urlsplit

from ghoststore.corpus import Position, open_corpus, source_name
from ghoststore.corpus.source_rows import SourceRows
from ghoststore.errors import (
    BusyError,
    CorruptError,
    GhostStoreError,
    MismatchError,
    StorageError,
    UsageError,
    reason_of,
)
from ghoststore.progress import Progress, Silent
from ghoststore.settings.fields import Fields
from ghoststore.settings.question import NO_VAL_SET, QueryOptions
from ghoststore.settings.shared import Data
from query.answer.results import BlendedHit, Hit, HybridHit, QueryHits, QueryResult

T = TypeVar("T")
TOKEN = "GHOSTSTORE_TOKEN"
LISTENS = "127.0.0.1"
"""Explorers listen there alone: what listens on the port of ``localhost`` at ::1 is another's, and gets no token."""
HOSTS = (LISTENS, "localhost")
ROWS = ("val_set", "minus")
OF_CLIENT = ("server", "store", "progress", *ROWS)
"""Options that are not sent as they are."""
ERRORS: dict[int, type[GhostStoreError]] = {
    error.exit_code: error for error in (UsageError, MismatchError, CorruptError, BusyError, StorageError)
}
ASK_HERE = "leave it out, or ask without `server`"


@dataclass(frozen=True, slots=True)
class Address:
    """Of an explorer: where it listens, its token, and the store of it that is asked (None: the only one)."""

    host: str
    port: int
    token: str = field(repr=False)
    store: str | None

    @classmethod
    def of(cls, url: str, store: str) -> Address:
        """The address in ``url``, as ``ghoststore serve`` prints it; the token may be in GHOSTSTORE_TOKEN instead.

        ``store`` is the name of a store of a server that has several. UsageError for what is no such address.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, 80 if parts.port is None else parts.port
        except ValueError:
            host, port, parts = None, 80, urlsplit("")
        if parts.scheme != "http" or host not in HOSTS or parts.username is not None:
            raise UsageError(
                f"`server` is the address that `ghoststore serve` printed, http://127.0.0.1:PORT/?token=…, on this "
                f"machine or forwarded to it, not one on {host or 'no host'}"
            )
        given = parse_qs(parts.query)
        token = (given.get("token") or [os.environ.get(TOKEN, "")])[0]
        if not token or not token.isascii() or not token.isprintable():
            raise UsageError(
                f"`server` has no token: give the whole address that `ghoststore serve` printed, or set {TOKEN}"
            )
        return cls(str(host), port, token, store or given.get("store", [""])[0] or None)

    def __str__(self) -> str:
        return f"the server at {self.host}:{self.port}"

    def path(self, name: str) -> str:
        """The path of ``name`` below /api."""
        return f"/api/{name}" if self.store is None else f"/api/stores/{quote(self.store, safe='')}/{name}"

    def answer(self, path: str, body: bytes | None = None) -> Any:
        """The JSON at ``path``. Raises the error that the server says; UsageError if nobody answers."""
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        connection = HTTPConnection(LISTENS, self.port)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent: the reply says why
                connection.request("GET" if body is None else "POST", path, body, headers)
            reply = connection.getresponse()
            status, content = reply.status, reply.read()
        except (OSError, HTTPException) as error:
            why = reason_of(error) if isinstance(error, OSError) else type(error).__name__
            raise UsageError(
                f"{self} does not answer ({why}): start it with `ghoststore serve` and give the address that it prints"
            ) from None
        finally:
            connection.close()
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if status == 200 and isinstance(document, dict):
            return document
        raise self._error(status, document)

    def _error(self, status: int, document: Any) -> GhostStoreError:
        said = document.get("error") if isinstance(document, dict) else None
        if not isinstance(said, dict):
            return UsageError(f"{self} is no explorer of this version: it answered with HTTP status {status}")
        code, message = said.get("exit_code"), f"{self} says: {said.get('message')}"
        if code is None:  # what only HTTP knows: the token, the size, the name of a store
            return BusyError(message) if status == 503 else UsageError(message)
        return ERRORS.get(code, GhostStoreError)(message)


def ask_server(options: QueryOptions) -> QueryResult:
    """The answer of the explorer at ``options.server``, as if it was asked here.

    UsageError for an option that it does not offer, by its name; and what the server raises.
    """
    assert options.server is not None
    progress = options.progress or Silent()
    address = Address.of(options.server, str(options.store))
    question = _question(options, _offered(address), address, progress)
    document = address.answer(address.path("query"), json.dumps(question).encode())
    for note in document.pop("explorer", {}).get("notes", ()):
        progress.note(note)
    for name in ROWS:
        if name in question:  # there they were rows in memory
            document["settings"][name] = source_name(getattr(options, name))
    return result_of(document)


def _offered(address: Address) -> frozenset[str]:
    """The options that a question to the server may have, by its own description."""
    described = address.answer("/openapi.json")
    try:
        body = described["paths"]["/api/query"]["post"]["requestBody"]["content"]["application/json"]
        return frozenset(body["schema"]["properties"])
    except (KeyError, TypeError):
        raise UsageError(f"{address} is no explorer of this version: it takes no questions") from None


def _question(options: QueryOptions, offered: frozenset[str], address: Address, progress: Progress) -> dict[str, Any]:
    """The options that were given, by name, and the rows of the val sets. UsageError for one that is not offered."""
    question: dict[str, Any] = {}
    for spec in fields(QueryOptions):
        value = getattr(options, spec.name)
        if spec.name in OF_CLIENT or value == spec.default:
            continue
        if isinstance(value, Fields):
            named = [f"fields.{inner.name}" for inner in fields(Fields) if getattr(value, inner.name) != inner.default]
        else:
            named = [] if spec.name in offered else [spec.name]
        if named:
            raise UsageError(f"`{named[0]}` is nothing that {address} offers: {ASK_HERE}")
        if isinstance(value, Fields):
            continue
        question[spec.name] = list(value) if isinstance(value, tuple) else value
    if options.val_set is None and options.near is None:
        raise UsageError(NO_VAL_SET)
    for name in ROWS:
        data = getattr(options, name)
        if data is not None:
            question[name] = rows_of(name, data, options.max_samples if name == "val_set" else None, progress)
    return question


def rows_of(name: str, data: Data, most: int | None, progress: Progress) -> list[dict[str, Any]]:
    """The first ``most`` rows (None: all) of a val set, with all their fields. UsageError for rows that are no JSON."""
    with open_corpus(data, Fields(), progress) as corpus:
        places: list[Position] = []
        digests: list[int] = []
        for sample in corpus.samples():
            if most is not None and len(places) >= most:
                break
            places.append(Position(source_row=sample.source_row, file=sample.file, offset=sample.offset))
            digests.append(sample.digest())
        rows = list(SourceRows(corpus, places, digests).rows())
    try:
        json.dumps(rows, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"`{name}`: its rows cannot be sent as JSON ({error}); {ASK_HERE}") from None
    return rows


def result_of(document: Mapping[str, Any]) -> QueryResult:
    """The result that ``to_json`` wrote as ``document``."""
    settings = document["settings"]
    unit = None if settings.get("unit") is None else settings["unit"]["name"]

    def hits(entries: Sequence[Mapping[str, Any]]) -> list[Hit]:
        return [_made(_kind(entry), {**entry, "unit": None if entry["nats"] is None else unit}) for entry in entries]

    results = []
    for entry in document["results"]:
        own = {name: value for name, value in entry.items() if name not in ("hits", "bottom")}
        lists = {name: hits(entry.get(name, ())) for name in ("hits", "bottom")}
        ranking = _made(QueryHits, {**own, "hits": (), "bottom": ()})
        results.append(replace(ranking, hits=lists["hits"], bottom=lists["bottom"]))
    return QueryResult(store=document["store"], settings=settings, results=results)


def _kind(entry: Mapping[str, Any]) -> type[Hit]:
    return BlendedHit if "value" in entry else HybridHit if "bm25" in entry else Hit


def _made(kind: type[T], entry: Mapping[str, Any]) -> T:
    """A dataclass of what ``asdict`` made of it."""
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in entry.items()})


def _value(kind: Any, value: Any) -> Any:
    """``value`` as one of type ``kind``: dataclasses, lists of them, and None are told apart."""
    members = [member for member in get_args(kind) if member is not NoneType]
    if value is None:
        return None
    if NoneType in get_args(kind) and len(members) == 1:
        return _value(members[0], value)
    if is_dataclass(kind) and isinstance(kind, type):
        return _made(kind, value)
    if isinstance(value, list) and get_origin(kind) is not None and len(members) == 1:
        return [_value(members[0], one) for one in value]
    return value
