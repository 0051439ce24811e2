"""Errors as JSON: ``{"error": {"type", "message", "exit_code"}}``."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ghoststore.errors import BusyError, CorruptError, GhostStoreError, MismatchError, StorageError, UsageError
from ghoststore.shown import json_text

STATUSES = {
    UsageError.exit_code: 400,
    MismatchError.exit_code: 409,
    CorruptError.exit_code: 500,
    BusyError.exit_code: 503,
    StorageError.exit_code: 507,
}
"""By exit code of the command line; of others 500."""
JSON = "application/json; charset=utf-8"


def problem(status: int, message: str, kind: str = "Refused", exit_code: int | None = None) -> Response:
    """A response that says what is wrong. ``exit_code`` is that of the command line, None for what only HTTP knows."""
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "2"}}.get(status)
    return Response(json_text(_body(message, kind, exit_code)).encode(), status, headers, JSON)


def of_library(error: GhostStoreError) -> Response:
    """The response for an error of the library."""
    return problem(STATUSES.get(error.exit_code, 500), str(error), type(error).__name__, error.exit_code)


def description(error: GhostStoreError) -> dict[str, Any]:
    """The body of that response."""
    return _body(str(error), type(error).__name__, error.exit_code)


def _body(message: str, kind: str, exit_code: int | None) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "exit_code": exit_code}}
