"""``ghoststore.serve``: the explorer of a store, on this machine alone."""

from __future__ import annotations

import secrets
import socket
import threading
from importlib.util import find_spec
from types import FrameType, TracebackType
from typing import Self

from ghoststore.errors import UsageError, reason_of
from ghoststore.server.stores import served_stores
from ghoststore.settings.keywords import takes
from ghoststore.settings.serve import ExplorerOptions
from ghoststore.store import Store

HOST = "127.0.0.1"
MOST_CONNECTIONS = 64
SECONDS_TO_END = 5
"""How long the end waits for answers that are being written; a question that runs is given up at once."""


@takes(ExplorerOptions)
def serve(options: ExplorerOptions) -> Explorer:
    """An explorer of ``store``, which listens on 127.0.0.1: ``explorer.run()`` answers until Ctrl-C.

    ``store`` is a path; or a list of them, each called as its folder or as ``"name=path"`` says; or a dict of names and
    paths. The page lets one choose among several.

    ``with ghoststore.serve("store") as explorer: explorer.url`` answers in a thread while the block runs. The ``url``
    holds a token that is new each time; without it nothing of the store is shown. ``port`` is a free one by default.
    ``checkpoint``, ``tokenizer``, ``base`` and ``data`` are as in ``ghoststore.open``, and belong to a single store.

    Raises UsageError if Starlette or uvicorn is not installed, if the port is taken, and if there is no such store.
    """
    return Explorer(options)


class Explorer:
    """A server of one store, or of several. Made by ``ghoststore.serve``."""

    def __init__(self, options: ExplorerOptions) -> None:
        missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
        if missing:
            raise UsageError(
                f"the explorer needs {' and '.join(missing)}, not installed here: pip install 'ghoststore[serve]'"
            )
        stores = served_stores(options)
        for served in stores.values():
            Store.open(served.store)
        import uvicorn

        from ghoststore.server.app import application
        from ghoststore.server.questions import Questions

        self._socket = _listening(options.port)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_urlsafe(32)
        self._ended = threading.Event()
        self._asked: dict[str, Questions] = {}
        for name, served in stores.items():
            self._asked[name] = Questions(served, next(iter(self._asked.values()), None))
        self._questions = next(iter(self._asked.values()))
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(stores, self._asked, self._ended, self.token, self.port),
                log_config=None,  # the logging of this process is not ours to set
                access_log=False,
                lifespan="off",
                ws="none",
                http="h11",
                loop="asyncio",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=SECONDS_TO_END,
            )
        )
        handle_exit = self._server.handle_exit

        def end(number: int, frame: FrameType | None) -> None:
            self._end()
            handle_exit(number, frame)

        self._server.handle_exit = end
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address of the page, with its token."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    def run(self) -> None:
        """Answer until a signal ends it. KeyboardInterrupt is then raised."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.close()

    def close(self) -> None:
        """Give up what is asked, and stop."""
        self._end()
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._socket.close()
        for questions in self._asked.values():
            questions.close()

    def _end(self) -> None:
        """Give up what is asked and watched. A handler of a signal may call it."""
        self._ended.set()
        for questions in self._asked.values():
            questions.end()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="ghoststore explorer", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ghoststore explorer on port {self.port}>"


def _listening(port: int) -> socket.socket:
    """A socket that listens: whoever reads the address can connect at once."""
    if not 0 <= port < 65536:
        raise UsageError(f"`port={port}` is none: give one from 1 to 65535, or 0 for one that is free")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(MOST_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"`port={port}` cannot be listened on: {reason_of(error)}; give another one, or 0 for one that is free"
        ) from error
    return listener
