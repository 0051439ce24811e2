"""What a page of somebody else can do to the explorer from the user's own browser: nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import ghoststore
from tests.support.browser import chromium, new_page

pytestmark = pytest.mark.slow
EVIL = "evil.example"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """For it, the name of the attacker leads to this machine: DNS that was rebound."""
    with chromium(f"--host-resolver-rules=MAP {EVIL} 127.0.0.1") as browser:
        yield browser


@pytest.fixture(scope="module")
def explorer(built: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve(built) as explorer:
        yield explorer


@pytest.fixture(scope="module")
def foreign() -> Iterator[str]:
    """The address of the attacker's page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>free kittens</title>")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{EVIL}:{server.server_address[1]}/"
        server.shutdown()


ATTACKS = {
    "read": "fetch(store).then(r => r.text())",
    "read, with the token": "fetch(store, {headers: {Authorization: `Bearer ${token}`}}).then(r => r.text())",
    "read blindly": "fetch(store, {mode: 'no-cors', credentials: 'include'}).then(r => r.text() || r.type)",
    "ask, with the token": """fetch(query, {method: "POST", body: '{"val_set": ["x"]}',
        headers: {Authorization: `Bearer ${token}`, "Content-Type": "application/json"}}).then(r => r.text())""",
    "ask blindly": """fetch(query, {method: "POST", mode: "no-cors", body: '{"val_set": ["x"]}'})
        .then(r => r.text())""",
    "run its script": """new Promise((done, failed) => document.head.append(Object.assign(
        document.createElement("script"), {type: "module", src: script, onload: done, onerror: failed})))""",
    "watch": "new Promise((done, failed) => Object.assign(new EventSource(events), {onopen: done, onerror: failed}))",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_a_foreign_page_gets_nothing(browser: Any, explorer: ghoststore.Explorer, foreign: str, attack: str) -> None:
    """Not even with the token, should it have leaked."""
    base = f"http://127.0.0.1:{explorer.port}"
    names = {"store": "/api/store", "query": "/api/query", "script": "/static/app.js", "events": "/api/verify/events"}
    given = {name: base + path for name, path in names.items()} | {"token": explorer.token}
    with new_page(browser) as page:
        page.goto(foreign)
        outcome = page.evaluate(
            f"({{{', '.join(given)}}}) => ({attack}).then(said => ['got', said], error => ['refused', String(error)])",
            given,
        )
        assert outcome[0] == "refused" or not outcome[1], outcome
        assert page.evaluate("document.cookie") == ""


def test_a_foreign_page_frames_nothing(browser: Any, explorer: ghoststore.Explorer, foreign: str) -> None:
    with new_page(browser) as page:
        page.goto(foreign)
        page.set_content(f"<iframe src='{explorer.url}'></iframe>")
        page.wait_for_load_state("networkidle")
        assert not page.frames[1].url.startswith(f"http://127.0.0.1:{explorer.port}")
        assert any("frame-ancestors" in said for said in page.said)


def test_a_name_that_was_rebound_is_refused(browser: Any, explorer: ghoststore.Explorer) -> None:
    """The browser takes the explorer for the attacker's own server, and would let its page read the answers."""
    with new_page(browser) as page:
        for path in (f"/?token={explorer.token}", "/api/store", "/static/app.js"):
            answer = page.goto(f"http://{EVIL}:{explorer.port}{path}")
            assert answer.status == 403
            assert json.loads(page.locator("body").text_content())["error"]["type"] == "Refused"
