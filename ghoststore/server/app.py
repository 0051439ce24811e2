"""The addresses of the explorer, and what answers them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from functools import partial
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ghoststore.errors import GhostStoreError, UsageError
from ghoststore.progress import Silent
from ghoststore.server.bodies import object_of, while_wanted
from ghoststore.server.checks import Checks
from ghoststore.server.guard import Guard, TooLargeError, too_large
from ghoststore.server.openapi import document
from ghoststore.server.problems import JSON, of_library, problem
from ghoststore.server.questions import Questions, WithdrawnError
from ghoststore.server.runs import WatchedRun, frames, runs
from ghoststore.server.samples import sample
from ghoststore.server.streams import Streams
from ghoststore.server.views import Views, row_of
from ghoststore.settings.serve import ServeOptions
from ghoststore.shown import json_text
from ghoststore.store import Store
from ghoststore.store.info import info

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE = "index.html"


def pages() -> dict[str, tuple[str, bytes]]:
    """(type, bytes) of every file of the page, by its path. Requests are looked up here, and nowhere on the disk."""
    table = {}
    for file in files("ghoststore.server").joinpath("pages").iterdir():
        kind = KINDS.get(f".{file.name.rpartition('.')[2]}")
        if kind is not None:
            table["/" if file.name == PAGE else f"/static/{file.name}"] = kind, file.read_bytes()
    return table


def application(
    stores: Mapping[str, ServeOptions],
    questions: Mapping[str, Questions],
    ended: threading.Event,
    token: str,
    port: int,
) -> Guard:
    """The ASGI application of some stores, by name. ``ended`` is set when the server ends."""
    static, streams = pages(), Streams(ended)
    apis = {name: Interface(options, questions[name], streams) for name, options in stores.items()}

    async def page(request: Request) -> Response:
        kind, content = static[request.url.path]
        return Response(content, media_type=kind)

    async def openapi(request: Request) -> Response:
        return Response(json_text(document()).encode(), media_type=JSON)

    async def names(request: Request) -> Response:
        listed = [{"name": name, "store": str(options.store)} for name, options in stores.items()]
        return Response(json_text({"stores": listed}).encode(), media_type=JSON)

    async def no_store(request: Request) -> Response:
        name = request.path_params["store"]
        what = "no such address" if name in stores else f"no store {name!r:.80}: it has {', '.join(stores)}"
        raise HTTPException(404, f"this server has {what}")

    async def which(request: Request) -> Response:
        raise UsageError(f"this server has several stores: /api/stores/NAME/…, with one of {', '.join(stores)}")

    only = next(iter(apis.values())) if len(apis) == 1 else None
    app = Starlette(
        routes=[
            *(Route(path, page) for path in static),
            Route("/openapi.json", openapi),
            Route("/api/stores", names),
            *(route for name, api in apis.items() for route in api.routes(f"/api/stores/{name}")),
            Route("/api/stores/{store}/{rest:path}", no_store, methods=["GET", "POST"]),
            *(only.routes("/api") if only else [Route("/api/{rest:path}", which, methods=["GET", "POST"])]),
        ],
        exception_handlers={
            GhostStoreError: _library,
            HTTPException: _http,
            TooLargeError: _large,
            WithdrawnError: _withdrawn,
            ClientDisconnect: _withdrawn,  # within the body
            Exception: _bug,
        },
    )
    app.router.redirect_slashes = False
    return Guard(app, token=token, port=port, public=tuple(static))


class Interface:
    """The JSON interface of one store."""

    def __init__(self, options: ServeOptions, questions: Questions, streams: Streams) -> None:
        self._options, self._questions, self._streams = options, questions, streams
        self._checks = Checks(options, streams)

    def routes(self, before: str) -> list[Route]:
        """Its addresses, each behind ``before``."""
        return [
            Route(f"{before}/store", self.store),
            Route(f"{before}/query", self.query, methods=["POST"]),
            Route(f"{before}/sample/{{part}}/{{row}}", self.sample),
            *Views(self._options, self._questions).routes(before),
            Route(f"{before}/runs", self.runs),
            Route(f"{before}/runs/{{run}}", self.run),
            Route(f"{before}/runs/{{run}}/events", self.run_events),
            Route(f"{before}/verify/events", self.verify_events),
        ]

    async def store(self, request: Request) -> Response:
        """What ``ghoststore info --json`` prints."""
        store_info = await asyncio.to_thread(info, self._options.store)
        return Response(json_text(store_info.to_json()).encode(), media_type=JSON)

    async def sample(self, request: Request) -> Response:
        """One sample of a part, by its row in the corpus."""
        part, row = request.path_params["part"], row_of(request)
        found = await asyncio.to_thread(sample, self._options, part, row, Silent())
        return Response(json_text(found).encode(), media_type=JSON)

    async def query(self, request: Request) -> Response:
        """What ``ghoststore query --json`` prints, and ``explorer``, what the page says beside it."""
        question = await object_of(request)
        answer = await while_wanted(request, partial(self._questions.answer, question))
        return Response(answer, media_type=JSON)

    async def runs(self, request: Request) -> Response:
        """Every training run, with its state."""
        found = await asyncio.to_thread(runs, self._options)
        return Response(json_text(found).encode(), media_type=JSON)

    async def run(self, request: Request) -> Response:
        """What ``ghoststore watch --once --json`` prints of a run, how its scores spread, and ``explorer``."""
        watched = await asyncio.to_thread(self._watched, request)
        _, found = await asyncio.to_thread(watched.look)
        return Response(json_text(found).encode(), media_type=JSON)

    async def run_events(self, request: Request) -> Response:
        """The same again and again while the run grows, as server-sent events."""
        watched = await asyncio.to_thread(self._watched, request)
        return self._streams.response(frames(watched, self._streams))

    def _watched(self, request: Request) -> WatchedRun:
        name = request.path_params["run"]
        if name not in Store.open(self._options.store).run_names():
            raise HTTPException(404, f"this store has no run {name!r:.80}")
        return WatchedRun(self._options, name)

    async def verify_events(self, request: Request) -> Response:
        """``ghoststore verify``, with its progress, as server-sent events. It ends when the asker goes."""
        if other := sorted(set(request.query_params) - {"part", "run"}):
            raise UsageError(f"verify has no parameter {other[0]!r:.80}; it has part, run")
        part, run = (request.query_params.get(kind) for kind in ("part", "run"))
        return self._streams.response(self._checks.events(part, run))


async def _library(request: Request, error: Exception) -> Response:
    assert isinstance(error, GhostStoreError)
    return of_library(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail))


async def _large(request: Request, error: Exception) -> Response:
    return problem(413, too_large())


async def _withdrawn(request: Request, error: Exception) -> Response:
    return problem(503, "the question was given up: its asker has gone, or the server ends")


async def _bug(request: Request, error: Exception) -> Response:
    logging.getLogger("ghoststore.server").error("%s %s", request.method, request.url.path, exc_info=error)
    return problem(500, f"{type(error).__name__}: {error}", type(error).__name__, 1)
