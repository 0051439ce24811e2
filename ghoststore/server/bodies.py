"""What requests bring with them, and work that ends when its asker goes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ghoststore.errors import UsageError

T = TypeVar("T")


async def object_of(request: Request) -> dict[str, Any]:
    """The JSON object in the body of ``request``. HTTPException 415 for another type, UsageError for other JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "a question is JSON: send it as `Content-Type: application/json`")
    try:
        question = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the question is no JSON: {error}") from None
    if not isinstance(question, dict):
        raise UsageError('a question is an object: {"val_set": ["a text"]}')
    return question


async def while_wanted(request: Request, answer: Callable[[threading.Event], Awaitable[T]]) -> T:
    """``await answer(withdrawn)``, where ``withdrawn`` is set when the asker has gone."""
    withdrawn = threading.Event()
    watch = asyncio.create_task(_gone(request, withdrawn))
    try:
        return await answer(withdrawn)
    finally:
        withdrawn.set()  # if this task was cancelled, a thread still works on it
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


async def _gone(request: Request, withdrawn: threading.Event) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    withdrawn.set()
