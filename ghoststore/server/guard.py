"""What stands before the explorer: whose requests are answered, and what every answer says to a browser."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from ghoststore.server.problems import problem

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY = 8 << 20
"""Bytes of a request's body."""
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class TooLargeError(Exception):
    """A body has more than MOST_BODY bytes."""


class Guard:
    """Answers 403 to requests for another host or from another origin, 401 without the token, 413 to large bodies."""

    def __init__(self, app: Application, *, token: str, port: int, public: Sequence[str]) -> None:
        self._app, self._token, self._public = app, token.encode(), frozenset(public)
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
        # A browser leaves port 80 out.
        hosts += [name.removesuffix(":80") for name in hosts if name.endswith(":80")]
        self._hosts = frozenset(host.encode() for host in hosts)
        self._origins = frozenset(b"http://" + host for host in self._hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await problem(*refusal)(scope, receive, sent)
            return
        size = 0

        async def received() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BODY:
                raise TooLargeError
            return message

        await self._app(scope, received, sent)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """(status, message) of a request that is not answered."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return 403, "this server answers by the address that `ghoststore serve` printed, and by no other name"
        if not self._origins.issuperset(origin.lower() for origin in origins):
            return 403, "this server answers its own pages alone"
        if scope["path"] not in self._public and not self._known(headers.get(b"authorization", [])):
            return 401, (
                "the token is missing, or another one: open the whole address that `ghoststore serve` printed; "
                "programs send it as `Authorization: Bearer TOKEN`"
            )
        lengths = [int(value) for value in headers.get(b"content-length", []) if value.isdigit()]
        if any(length > MOST_BODY for length in lengths):
            return 413, too_large()
        return None

    def _known(self, values: list[bytes]) -> bool:
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and secrets.compare_digest(token, self._token)


def too_large() -> str:
    """Why a body is refused."""
    return f"a request holds at most {MOST_BODY >> 20} MiB: give fewer rows, or use `ghoststore query`"
