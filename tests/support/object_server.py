"""A real S3 server on loopback: moto's application, behind a front that counts requests and spoils the network.

The front calls the application, without moto's own server between: that one opens a connection for each request, and
looks through the folders of a hundred services for the one that is meant, which took longer than the request.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote_to_bytes

KEY, SECRET = "testing-key-id", "testing-secret-value"
Rule = Callable[["Request"], bool]


@dataclass(frozen=True)
class Request:
    """What the proxy sees of a request."""

    method: str
    path: str
    """With the query."""
    conditional: bool
    """Whether it makes an object only if there is none."""

    @property
    def writes(self) -> bool:
        return self.method not in ("GET", "HEAD")


@dataclass
class Server:
    """The proxy. ``rules`` decide what becomes of a request; each returns whether it applies."""

    port: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    """Bytes of bodies to the server."""
    received: int = 0
    """Bytes of bodies from it."""
    log: list[str] = field(default_factory=list)
    delay: float = 0.0
    """Seconds before each answer."""
    lose: Rule | None = None
    """The server does what is asked, and the connection ends without the answer."""
    refuse: Rule | None = None
    """The connection ends before the server hears of it."""
    cut: Rule | None = None
    """The answer ends after half its bytes."""
    seen: Callable[[Request], None] | None = None
    """Called with each request before it is passed on."""
    at_once: int = 0
    most_at_once: int = 0
    ignore_conditions: bool = False
    """Conditional puts become plain ones."""

    @property
    def address(self) -> str:
        """Host and port: a port alone may stand in any number."""
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def reset(self) -> None:
        """Count from zero, and behave."""
        self.requests, self.sent, self.received, self.log = Counter(), 0, 0, []
        self.delay, self.lose, self.refuse, self.cut, self.seen = 0.0, None, None, None, None
        self.most_at_once, self.ignore_conditions = 0, False


def first(count: int, rule: Rule) -> Rule:
    """``rule``, for the first ``count`` requests that it applies to."""
    left, lock = [count], threading.Lock()

    def applies(request: Request) -> bool:
        with lock:
            if not left[0] or not rule(request):
                return False
            left[0] -= 1
            return True

    return applies


@contextmanager
def serving(bucket: str = "bucket") -> Iterator[Server]:
    """A server with an empty ``bucket``."""
    from moto.moto_server.werkzeug_app import create_backend_app

    app = create_backend_app("s3")
    state = Server()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state, app))
    proxy.daemon_threads = True
    proxy.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client was killed
    state.port = proxy.server_address[1]
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        status, _, _ = answer_of(app, "PUT", f"/{bucket}", b"", {"Host": state.address})
        assert status == 200
        yield state
    finally:
        proxy.shutdown()
        proxy.server_close()


def answer_of(
    app: Any, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], bytes]:
    """(status, headers, body) of what a WSGI ``app`` answers; ``path`` with the query."""
    from werkzeug.test import run_wsgi_app

    named, _, query = path.partition("?")
    environment: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(named).decode("latin-1"),
        "QUERY_STRING": query,
        "REQUEST_URI": path,
        "RAW_URI": path,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": headers["Host"].rpartition(":")[2],
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in headers.items():
        key = name.upper().replace("-", "_")
        if key != "CONTENT_LENGTH":
            environment[key if key == "CONTENT_TYPE" else f"HTTP_{key}"] = value
    pieces, status, answered = run_wsgi_app(app, environment)
    return int(status.partition(" ")[0]), list(answered), b"".join(pieces)


def _handler(state: Server, app: Any) -> type[BaseHTTPRequestHandler]:
    one_at_a_time = threading.Lock()  # moto looks for the object and makes it in two steps
    counting = threading.Lock()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(self.command, self.path, self.headers.get("If-None-Match") == "*")
            with counting:
                state.requests[self.command] += 1
                state.sent += len(body)
                state.log.append(f"{self.command} {self.path}")
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                self._pass_on(request, body)
            finally:
                with counting:
                    state.at_once -= 1

        def _pass_on(self, request: Request, body: bytes) -> None:
            if state.seen is not None:
                state.seen(request)
            if state.refuse is not None and state.refuse(request):
                self.close_connection = True
                return
            headers = dict(self.headers.items())
            if state.ignore_conditions:
                headers.pop("If-None-Match", None)
                headers.pop("if-none-match", None)
            if state.delay:
                time.sleep(state.delay)
            headers["Host"] = self.headers["Host"]
            with one_at_a_time if request.method == "PUT" else nullcontext():
                status, answered, data = answer_of(app, self.command, self.path, body, headers)
            if state.lose is not None and state.lose(request):
                self.close_connection = True
                return
            self.send_response_only(status)
            for name, value in answered:
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            lengths = [value for name, value in answered if name.lower() == "content-length"]
            length = next(iter(lengths), "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            if state.cut is not None and len(data) > 1 and state.cut(request):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(data)
            with counting:
                state.received += len(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def log_message(self, *_: Any) -> None:
            pass

    return Proxy


def contents(server: Server, prefix: str, bucket: str = "bucket") -> dict[str, bytes]:
    """Every object below ``prefix``, by its path in it. Read past the proxy's counters by :meth:`Server.reset`."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        bucket,
        endpoint=f"http://{server.address}",
        access_key_id=KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        client_options={"allow_http": True},
    )
    keys = [meta["path"] for page in obstore.list(store, prefix) for meta in page]
    return {key.removeprefix(f"{prefix}/"): bytes(obstore.get(store, key).bytes()) for key in keys}
