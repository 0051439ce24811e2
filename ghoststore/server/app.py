"""The addresses of the explorer, and what answers them."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from ghoststore.errors import GhostStoreError
from ghoststore.progress import Silent
from ghoststore.server.bodies import object_of, while_wanted
from ghoststore.server.guard import Guard, TooLargeError, too_large
from ghoststore.server.openapi import document
from ghoststore.server.problems import JSON, of_library, problem
from ghoststore.server.questions import Questions, WithdrawnError
from ghoststore.server.samples import sample
from ghoststore.server.views import Views, row_of
from ghoststore.settings.serve import ServeOptions
from ghoststore.shown import json_text
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


def application(options: ServeOptions, questions: Questions, token: str, port: int) -> Guard:
    """The ASGI application of one store."""
    static = pages()
    api = Interface(options, questions)

    async def page(request: Request) -> Response:
        kind, content = static[request.url.path]
        return Response(content, media_type=kind)

    app = Starlette(
        routes=[
            *(Route(path, page) for path in static),
            Route("/openapi.json", api.openapi),
            Route("/api/store", api.store),
            Route("/api/query", api.query, methods=["POST"]),
            Route("/api/sample/{part}/{row}", api.sample),
            *Views(options, questions).routes("/api"),
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
    """The JSON interface."""

    def __init__(self, options: ServeOptions, questions: Questions) -> None:
        self._options, self._questions = options, questions

    async def store(self, request: Request) -> Response:
        """What ``ghoststore info --json`` prints."""
        store_info = await asyncio.to_thread(info, self._options.store)
        return Response(json_text(store_info.to_json()).encode(), media_type=JSON)

    async def sample(self, request: Request) -> Response:
        """One sample of a part, by its row in the corpus."""
        part, row = request.path_params["part"], row_of(request)
        found = await asyncio.to_thread(sample, str(self._options.store), part, row, self._options.data, Silent())
        if found is None:
            raise HTTPException(404, f"part {part!r} has no row of the corpus's row {row:,}")
        return Response(json_text(found).encode(), media_type=JSON)

    async def query(self, request: Request) -> Response:
        """What ``ghoststore query --json`` prints, and ``explorer``, what the page says beside it."""
        question = await object_of(request)
        answer = await while_wanted(request, partial(self._questions.answer, question))
        return Response(answer, media_type=JSON)

    async def openapi(self, request: Request) -> Response:
        """This interface as an OpenAPI document."""
        return Response(json_text(document()).encode(), media_type=JSON)


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
