"""The explorer's JSON on a real uvicorn: it answers as the library does, and nobody but the one who has the token."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import UsageError

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from ghoststore.server.app import pages
from ghoststore.server.guard import HEADERS, MOST_BODY
from ghoststore.server.openapi import document
from ghoststore.server.problems import STATUSES
from ghoststore.server.questions import MOST_ROWS, MOST_WAITING, OFFERED

if TYPE_CHECKING:
    from tests.conftest import Lab

Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def built(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: words are kept in it."""
    return Path(shutil.copytree(built, tmp_path_factory.mktemp("own") / built.name))


@pytest.fixture(scope="module")
def explorer(built: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve(built) as explorer:
        yield explorer


def ask(
    explorer: ghoststore.Explorer, path: str, body: Any = None, method: str | None = None, **headers: str | None
) -> Reply:
    """(status, headers, body). A header that is None is left out; ``body`` is sent as JSON, bytes as they are."""
    given: dict[str, str | None] = {
        "host": f"127.0.0.1:{explorer.port}",
        "authorization": f"Bearer {explorer.token}",
        "content-type": "application/json",
    }
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = HTTPConnection("127.0.0.1", explorer.port, timeout=60)
    try:
        connection.putrequest(method or ("GET" if data is None else "POST"), path, skip_host=True)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        if data is not None and "content-length" not in given:
            connection.putheader("content-length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def problem(reply: Reply) -> tuple[int, str, int | None, str]:
    """(status, type, exit code, message) of an answer that says what is wrong."""
    error = json.loads(reply[2])["error"]
    return reply[0], error["type"], error["exit_code"], error["message"]


QUESTIONS: list[dict[str, Any]] = [
    {"val_set": ["the old dog runs"], "top_k": 3},
    {"val_set": ["the old dog runs", "a river"], "top_k": 4, "bottom_k": 2, "each": True, "metric": "cosine"},
    {"val_set": [{"prompt": "the old", "completion": " dog 'runs'"}], "where": "domain = 'sky'"},
    {"val_set": [{"id": "v", "text": '100% \\n\u202e"it\'s"'}], "lexical": 0.1, "top_k": 2},
]


@pytest.mark.thin(2)
@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_the_library(explorer: ghoststore.Explorer, built: Path, question: dict[str, Any]) -> None:
    status, _, body = ask(explorer, "/api/query", question)
    assert status == 200, body
    answer = json.loads(body)
    beside = answer.pop("explorer")
    as_rows = [row if isinstance(row, dict) else {"text": row} for row in question["val_set"]]
    assert answer == ghoststore.query(store=built, **{**question, "val_set": as_rows}).to_json()
    assert ("nats" in str(beside["unit"])) == (answer["settings"]["unit"] is not None)


@pytest.mark.thin(1)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_command_line_gives_the_same(
    lab: Lab, explorer: ghoststore.Explorer, question: dict[str, Any], tmp_path: Path
) -> None:
    answer = json.loads(ask(explorer, "/api/query", question)[2])
    rows, pipe, line = answer["explorer"]["command"].rpartition(" | ghoststore query ")
    assert pipe
    # A shell reads both sides; the words of the right one are for a process that has everything imported.
    words = subprocess.run(["bash", "-c", rf"printf '%s\0' {line}"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "rows").write_bytes(subprocess.run(["bash", "-c", rows], capture_output=True, check=True).stdout)
    done = lab.run("query", *words.split("\0")[:-1], "--json", "--quiet", stdin=str(tmp_path / "rows"))
    assert done.code == 0, done.err
    assert done.json["results"] == answer["results"]


def test_the_store_and_a_sample(explorer: ghoststore.Explorer, built: Path, lab: Lab) -> None:
    assert json.loads(ask(explorer, "/api/store")[2]) == ghoststore.info(built).to_json()
    found = json.loads(ask(explorer, "/api/sample/part/4")[2])
    assert {name: found[name] for name in ("id", "text", "domain")} == lab.rows[4]
    assert [row["status"] for row in found["rows"]] == ["ok"]
    assert problem(ask(explorer, "/api/sample/part/4000"))[0] == 404
    assert problem(ask(explorer, "/api/sample/nonesuch/4"))[:3] == (400, "UsageError", 2)


def test_kept_fields_and_rows_without_a_vector(lab: Lab, tmp_path: Path) -> None:
    rows = [{"text": "the cat sees the dog", "year": 1999, "tag": None}, {"text": "", "year": None, "tag": "x"}]
    corpus = lab.write(tmp_path / "corpus.jsonl", [*rows, {"text": "a bird", "year": 3, "tag": "y"}])
    ghoststore.build(checkpoint=lab.checkpoint, data=corpus, store=tmp_path / "store", keep_fields=("year", "tag"))
    name = ghoststore.info(tmp_path / "store").parts[0].name
    with ghoststore.serve(tmp_path / "store") as explorer:
        first, second = (json.loads(ask(explorer, f"/api/sample/{name}/{row}")[2]) for row in range(2))
    assert (first["fields"], first["rows"][0]["status"]) == ({"year": 1999, "tag": None}, "ok")
    assert (second["fields"], second["rows"][0]["status"]) == ({"year": None, "tag": "x"}, "empty")


WRONG: list[tuple[Any, str]] = [
    ({}, "needs a `val_set`"),
    ({"val_set": "/etc/passwd"}, "`val_set` is a list of texts, or of rows"),
    ({"val_set": []}, "`val_set` is a list of texts, or of rows"),
    ({"val_set": ["x", {"text": "y"}]}, "`val_set` is a list of texts, or of rows"),
    ({"val_set": ["a cat"], "minus": "minus.jsonl"}, "`minus` is a list of texts, or of rows"),
    ({"val_set": ["a cat"], "report": "x.html"}, "a question to the explorer has no keyword 'report'"),
    ({"val_set": ["a cat"], "data": "/etc/passwd"}, "no keyword 'data'"),
    ({"val_set": ["a cat"], "part": ["part"]}, "`part` is the name of one part"),
    ({"val_set": ["a cat"], "part": "../part"}, "part"),
    ({"val_set": ["a cat"], "top_k": MOST_ROWS + 1}, "at most 1,000 rows"),
    ({"val_set": ["a cat"], "top_k": "3"}, "`top_k` is a whole number"),
    ({"val_set": ["a cat"], "metric": "nearness"}, "`metric` 'nearness' is unknown"),
    ({"val_set": ["a cat"], "where": "nonesuch = 1"}, "`where"),
    ({"val_set": ["a cat"], "where": "id IN (SELECT * FROM read_text('/etc/passwd'))"}, "`where"),
    ({"val_set": [""]}, "no row of the val set"),
    ([], "a question is an object"),
    (b"{", "the question is no JSON"),
    (b"[" * 100_000, "the question is no JSON"),
    (b"\xff", "the question is no JSON"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_wrong_questions(explorer: ghoststore.Explorer, body: Any, message: str) -> None:
    status, kind, code, said = problem(ask(explorer, "/api/query", body))
    assert (status, code) == (400, 2), said
    assert kind.endswith("Error")
    assert message in said


def test_a_path_is_a_text(explorer: ghoststore.Explorer, built: Path, lab: Lab) -> None:
    question = {"val_set": [str(lab.corpus)], "top_k": 2}
    status, _, body = ask(explorer, "/api/query", question)
    assert status == 200, body
    assert json.loads(body)["settings"]["val_rows"] == 1


def test_another_checkpoint_and_damage(lab: Lab, built: Path, tmp_path: Path) -> None:
    other = lab.model(tmp_path / "other", seed=7)
    with ghoststore.serve(built, checkpoint=other) as explorer:
        reply = problem(ask(explorer, "/api/query", QUESTIONS[0]))
    assert reply[:3] == (409, "MismatchError", 3)
    store = tmp_path / "store"
    shutil.copytree(built, store)
    manifest = store / "parts/part/zarr.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with ghoststore.serve(store, checkpoint=lab.checkpoint, data=lab.corpus) as explorer:
        assert problem(ask(explorer, "/api/query", QUESTIONS[0]))[:3] == (500, "CorruptError", 4)
        assert problem(ask(explorer, "/api/store"))[:3] == (500, "CorruptError", 4)


def test_a_part_that_took_the_place_of_another(lab: Lab, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert lab.build(store).code == 0
    with ghoststore.serve(store, checkpoint=lab.checkpoint, data=lab.corpus) as explorer:
        first = json.loads(ask(explorer, "/api/query", QUESTIONS[0])[2])
        ghoststore.remove(store=store, part="part")
        assert lab.build(store, "--proj-seed", "5").code == 0
        second = json.loads(ask(explorer, "/api/query", QUESTIONS[0])[2])
    assert second["results"] != first["results"]
    assert second["results"] == ghoststore.query(store=store, **QUESTIONS[0]).to_json()["results"]


GUARDED = (
    *(path.format(store="built", part="part", row=0, run="run") for path in document()["paths"]),
    "/openapi.json",
    "/nonesuch",
    "/static/../app.py",
)


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("given", [None, "Bearer", "Bearer x", "Basic {0}", "Bearer {0}x", "Bearer {0:.20}", "{0}"])
def test_nothing_without_the_token(explorer: ghoststore.Explorer, path: str, given: str | None) -> None:
    word = None if given is None else given.format(explorer.token)
    status, headers, body = ask(explorer, path, authorization=word)
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert explorer.token.encode() not in body
    assert ask(explorer, f"{path}?token={explorer.token}", authorization=word)[0] == 401


FOREIGN = (
    "evil.example",
    "evil.example:{0}",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.0.0.1.evil.example:{0}",
    "",
    "0.0.0.0:{0}",
)


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/api/store", "/api/verify/events", "/api/runs/run/events"])
def test_other_hosts_and_origins(explorer: ghoststore.Explorer, path: str) -> None:
    for word in FOREIGN:
        name = word.format(explorer.port)
        assert ask(explorer, path, host=name)[0] == 403, name
        assert ask(explorer, path, origin=f"http://{name}")[0] == 403, name
    assert ask(explorer, path, host=None)[0] in (400, 403)
    for origin in ("null", f"https://127.0.0.1:{explorer.port}", f"http://127.0.0.1:{explorer.port}.evil.example"):
        assert ask(explorer, path, origin=origin)[0] == 403, origin
    for own in (f"127.0.0.1:{explorer.port}", f"localhost:{explorer.port}"):
        assert ask(explorer, path, host=own, origin=f"http://{own}")[0] == (404 if "run/events" in path else 200)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static//etc/passwd",
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/static/app.js/",
        "/static/",
        "/api/sample/..%2f..%2fparts/0",
        "/api/sample/part/-1",
        "/api/sample/part/1e3",
        "/api/sample/part/99999999999999999999999999",
    ],
)
def test_paths_reach_no_file(explorer: ghoststore.Explorer, path: str) -> None:
    status, _, body = ask(explorer, path)
    assert status == 404, body
    assert json.loads(body)["error"]["type"] == "Refused"


def test_large_bodies_are_refused(explorer: ghoststore.Explorer) -> None:
    reply = ask(explorer, "/api/query", b" ", content_length=str(MOST_BODY + 1))
    assert reply[0] == 413
    connection = HTTPConnection("127.0.0.1", explorer.port, timeout=60)
    headers = {"authorization": f"Bearer {explorer.token}", "content-type": "application/json"}
    pieces = (b"x" * 65_536 for _ in range(MOST_BODY // 65_536 + 1))  # of unknown length
    connection.request("POST", "/api/query", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert ask(explorer, "/api/store")[0] == 200


def test_an_asker_who_leaves_within_the_question_is_no_bug(
    explorer: ghoststore.Explorer, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"POST /api/query HTTP/1.1\r\nHost: 127.0.0.1:{explorer.port}\r\nAuthorization: Bearer {explorer.token}\r\n"
    with socket.create_connection(("127.0.0.1", explorer.port), timeout=60) as asker:
        asker.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        asker.shutdown(socket.SHUT_WR)
        while asker.recv(65_536):
            pass
    assert ask(explorer, "/api/store")[0] == 200
    assert caplog.records == []


def test_other_methods_and_types(explorer: ghoststore.Explorer) -> None:
    assert ask(explorer, "/api/query")[0] == 405
    assert ask(explorer, "/api/store", {}, method="POST")[0] == 405
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        assert ask(explorer, "/api/query", QUESTIONS[0], content_type=kind)[0] == 415


def test_headers_of_every_answer(explorer: ghoststore.Explorer) -> None:
    for path in (*pages(), *GUARDED):
        headers = ask(explorer, path)[1]
        assert {name: headers[name] for name in HEADERS} == HEADERS, path
        assert "set-cookie" not in headers
    policy = HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(rb"https?://(?!www\.w3\.org)", b"".join(content for _, content in pages().values()))


def test_pages_have_no_inline_code() -> None:
    html = pages()["/"][1].decode()
    assert re.findall(r"<script[^>]*>[^<]", html) == []
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", html) == []
    code = b"".join(content for path, (_, content) in pages().items() if path.endswith(".js")).decode()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    assert re.findall(sinks, code) == []


def test_the_openapi_document(explorer: ghoststore.Explorer) -> None:
    described = json.loads(ask(explorer, "/openapi.json")[2])
    assert described == json.loads(json.dumps(document()))
    query = described["paths"]["/api/query"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(query["properties"]) == set(OFFERED)
    assert set(query["properties"]["metric"]["enum"]) == {"dot", "cosine"}
    assert {str(status) for status in STATUSES.values()} < set(described["paths"]["/api/query"]["post"]["responses"])


def test_every_address_is_described(explorer: ghoststore.Explorer) -> None:
    """And nothing is described that is not there."""
    routes = {
        route.path.replace("/stores/built/", "/stores/{store}/"): "post" if "POST" in route.methods else "get"
        for route in explorer._server.config.app._app.routes
        if route.path.startswith("/api/") and not route.path.endswith("{rest:path}")
    }
    assert routes == {path: "post" if "post" in item else "get" for path, item in document()["paths"].items()}


def test_a_question_that_runs_is_given_up_at_the_end(built: Path) -> None:
    """Its asker is told; the end does not wait for the answer."""
    replies: list[Reply] = []
    question = {"val_set": ["the old dog runs"] * 100_000}
    with ghoststore.serve(built) as explorer:
        asker = threading.Thread(target=lambda: replies.append(ask(explorer, "/api/query", question)))
        asker.start()
        while not explorer._questions._waiting:  # until it has begun
            assert asker.is_alive()
    asker.join()
    assert replies[0][0] == 503
    assert "the server ends" in problem(replies[0])[3]


def test_so_many_questions_wait(explorer: ghoststore.Explorer) -> None:
    replies: list[Reply] = []
    question = {"val_set": ["the old dog runs"] * 30, "top_k": 3}
    askers = [
        threading.Thread(target=lambda: replies.append(ask(explorer, "/api/query", question)))
        for _ in range(3 * MOST_WAITING)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    answered = [json.loads(body)["results"] for status, _, body in replies if status == 200]
    refused = [reply for reply in replies if reply[0] != 200]
    assert len(answered) >= MOST_WAITING
    assert all(answer == answered[0] for answer in answered)
    assert all(problem(reply)[:3] == (503, "BusyError", 5) for reply in refused)


def test_ports_and_stores_that_are_none(explorer: ghoststore.Explorer, built: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"`port={explorer.port}` cannot be listened on"):
        ghoststore.serve(built, port=explorer.port)
    with pytest.raises(UsageError, match="`port=70000` is none"):
        ghoststore.serve(built, port=70000)
    with pytest.raises(UsageError):
        ghoststore.serve(tmp_path / "nonesuch")


@pytest.mark.thin(1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_prints_its_address_and_ends(built: Path, number: int, code: int) -> None:
    words = [sys.executable, "-m", "ghoststore", "serve", "--store", str(built)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", url)
        address, _, token = url.partition("?token=")
        request = urllib.request.Request(f"{address}api/store", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["parts"][0]["name"] == "part"
        os.kill(process.pid, number)
        out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert err.strip() == {130: "Interrupted.", 143: "Terminated."}[code]
