"""What the tests of the explorer share: requests to a real server, and streams that are read as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import ghoststore


def store_of(explorer: ghoststore.Explorer) -> Any:
    """The path of its store."""
    return explorer._questions._options.store


@contextmanager
def answered(explorer: ghoststore.Explorer, path: str, body: Any = None) -> Iterator[HTTPResponse]:
    """The answer of a request with the token; the connection is closed at the end, read or not."""
    connection = HTTPConnection("127.0.0.1", explorer.port, timeout=60)
    headers = {"authorization": f"Bearer {explorer.token}", "content-type": "application/json"}
    try:
        data = None if body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers)
        yield connection.getresponse()
    finally:
        connection.close()


def got(explorer: ghoststore.Explorer, path: str, body: Any = None, status: int = 200) -> Any:
    """The JSON of an answer, whose status is asserted."""
    with answered(explorer, path, body) as answer:
        document = json.loads(answer.read())
        assert answer.status == status, document
        return document


def events(answer: HTTPResponse) -> Iterator[tuple[str, Any]]:
    """(name, data) of each server-sent event, as it comes."""
    assert answer.status == 200, answer.read()
    assert (answer.getheader("content-type") or "").startswith("text/event-stream")
    name, data = "", ""
    for line in iter(answer.readline, b""):
        field, _, value = line.decode().rstrip("\n").partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data = value
        elif not field:
            yield name, json.loads(data)
