"""The addresses behind a sample and a ranking: where it was trained on, its near-duplicates, the rows to train on."""

from __future__ import annotations

from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ghoststore.progress import Progress
from ghoststore.server.bodies import object_of, while_wanted
from ghoststore.server.choosing import Choosing, choose
from ghoststore.server.problems import JSON
from ghoststore.server.questions import Questions, Watched
from ghoststore.server.samples import duplicates, history
from ghoststore.settings.serve import ServeOptions
from ghoststore.shown import json_text


class Views:
    """Those of one store. All of them wait for their turn among the questions."""

    def __init__(self, options: ServeOptions, questions: Questions) -> None:
        self._options, self._questions = options, questions

    def routes(self, before: str) -> list[Route]:
        """Its addresses, each behind ``before``."""
        return [
            Route(f"{before}/select", self.select, methods=["POST"]),
            Route(f"{before}/sample/{{part}}/{{row}}/runs", self.history),
            Route(f"{before}/sample/{{part}}/{{row}}/duplicates", self.duplicates),
        ]

    async def select(self, request: Request) -> Response:
        """What ``ghoststore select`` writes."""
        chosen = Choosing.of(await object_of(request))

        def work(progress: Watched) -> bytes:
            self._questions.let_go()
            return choose(self._options, chosen, progress)

        work_of = partial(self._questions.work, work)
        return Response(await while_wanted(request, work_of), media_type=JSON)

    async def history(self, request: Request) -> Response:
        """Where a sample was trained on, by run, and what ``ghoststore scores --sample`` says of it."""
        part, row = request.path_params["part"], row_of(request)

        def work(progress: Progress) -> bytes:
            return json_text(history(self._options, part, row, progress)).encode()

        return Response(await while_wanted(request, partial(self._questions.work, work)), media_type=JSON)

    async def duplicates(self, request: Request) -> Response:
        """Samples of the corpus that hold half of this one's runs of words, as ``ghoststore select`` looks for them."""
        part, row = request.path_params["part"], row_of(request)

        def work(progress: Progress) -> bytes:
            return json_text(duplicates(self._options, part, row, progress)).encode()

        return Response(await while_wanted(request, partial(self._questions.work, work)), media_type=JSON)


def row_of(request: Request) -> int:
    """The row of the corpus in the address. HTTPException 404 for what is none."""
    row = request.path_params["row"]
    if not (row.isascii() and row.isdigit()) or len(row) > 18:
        raise HTTPException(404, f"{row!r:.40} is no row: rows are numbered from 0")
    return int(row)
