"""``query --server``: what it prints is, byte for byte, what a query of the store prints; the token is not printed."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import CorruptError, MismatchError, UsageError

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from query.answer.remote import Address

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="module")
def built(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: words are kept in it."""
    return Path(shutil.copytree(built, tmp_path_factory.mktemp("own") / built.name))


@pytest.fixture(scope="module")
def explorer(built: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve(built) as explorer:
        yield explorer


@pytest.fixture(scope="module")
def val(lab: Lab) -> dict[str, Path]:
    rows = [{"text": "the old dog runs", "topic": "a"}, {"id": "v", "text": "a river\u202e", "topic": "b"}]
    plain = lab.folder / "asked.txt"
    plain.write_text("the old dog runs\na river\n")
    return {"jsonl": lab.write(lab.folder / "asked.jsonl", rows), "txt": plain}


QUESTIONS = [
    ("jsonl", "--top-k", "3"),
    ("txt", "--each", "--bottom-k", "2", "--metric", "cosine"),
    ("jsonl", "--group-field", "topic", "--combine", "max", "--where", "domain = 'sky'"),
    ("jsonl", "--lexical", "0.2", "--max-samples", "1"),
    ("jsonl", "--tokens", "--top-k", "2"),
    ("jsonl", "--histogram", "--each"),
    ("jsonl", "--minus", "MINUS", "--top-k", "4"),
]


def words_of(question: tuple[str, ...], val: dict[str, Path]) -> list[str | Path]:
    words = [val["txt"] if word == "MINUS" else word for word in question[1:]]
    return ["query", "--val-set", val[question[0]], *words, "--quiet"]


PRINTED = [
    *((question, how) for how in ("--json", "table") for question in QUESTIONS),
    # Files hold what a document does: each form of two questions.
    *((question, how) for how in ("out.csv", "out.json", "out.parquet") for question in QUESTIONS[1:5:3]),
]


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("question", "how"), PRINTED, ids=lambda value: value if isinstance(value, str) else "_".join(value)
)
def test_it_prints_what_a_query_prints(
    lab: Lab,
    explorer: ghoststore.Explorer,
    built: Path,
    val: dict[str, Path],
    tmp_path: Path,
    question: tuple[str, ...],
    how: str,
) -> None:
    printed, written = [], []
    for number, source in enumerate((("--store", built), ("--server", explorer.url))):
        out = tmp_path / f"{number}-{how}"
        more = {"--json": ["--json"], "table": []}.get(how, ["--out", out])
        outcome = lab.run(*words_of(question, val), *source, *more)
        assert outcome.code == 0, outcome.err
        assert explorer.token not in outcome.out + outcome.err
        printed.append((outcome.out, outcome.err.replace(str(out), "OUT")))
        written.append(out.read_bytes() if how.startswith("out") else b"")
    assert printed[0] == printed[1]
    assert written[0] == written[1]


def test_from_python(explorer: ghoststore.Explorer, built: Path) -> None:
    for val_set in (["the old dog"], [{"text": "a river", "id": "x"}]):
        for more in ({}, {"tokens": True, "each": True, "bottom_k": 1}, {"lexical": 0.5}):
            asked: dict[str, Any] = {"val_set": val_set, "top_k": 2, **more}
            here = ghoststore.query(store=built, **asked)
            there = ghoststore.query(server=explorer.url, **asked)
            assert there == here
            assert repr(there[0][0]) == repr(here[0][0])
            assert there.to_arrow() == here.to_arrow()


def test_near_a_row(explorer: ghoststore.Explorer, built: Path) -> None:
    here = ghoststore.query(store=built, near=3, top_k=4)
    assert ghoststore.query(server=explorer.url, near=3, top_k=4) == here


def test_notes_are_those_of_the_server(
    explorer: ghoststore.Explorer, built: Path, lab: Lab, val: dict[str, Path]
) -> None:
    words = words_of(("jsonl", "--where", "domain = 'sky'"), val)[:-1]
    here, there = (lab.run(*words, *source) for source in (("--store", built), ("--server", explorer.url)))
    notes = [[line for line in outcome.err.splitlines() if line.startswith("note: ")] for outcome in (here, there)]
    assert len(notes[0]) == 1
    assert notes[0] == notes[1]


def test_the_token_may_be_in_the_environment(explorer: ghoststore.Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = explorer.url.partition("?")[0]
    with pytest.raises(UsageError, match="`server` has no token"):
        ghoststore.query(server=plain, val_set=["a cat"])
    monkeypatch.setenv("GHOSTSTORE_TOKEN", explorer.token)
    assert len(ghoststore.query(server=plain, val_set=["a cat"], top_k=2)[0]) == 2
    monkeypatch.setenv("GHOSTSTORE_TOKEN", "another")
    with pytest.raises(UsageError, match="the token is missing, or another one") as caught:
        ghoststore.query(server=plain, val_set=["a cat"])
    assert "another one" in str(caught.value)


REFUSED = [
    ({"report": "page.html"}, "`report` is nothing that the server at 127.0.0.1:"),
    ({"index": "ann"}, "`index` is nothing"),
    ({"checkpoint": "model"}, "`checkpoint` is nothing"),
    ({"fields": ghoststore.Fields(text="body")}, "`fields.text` is nothing"),
    ({"text": False}, "`text` is nothing"),
    ({"with_scores": "run"}, "`with_scores` is nothing"),
    ({"run": "run"}, "`run` is nothing"),
    ({"val_set": None}, "give `val_set`"),
    ({"val_set": "nonesuch.jsonl"}, "nonesuch.jsonl"),
    ({"val_set": [{"text": "x", "when": {1, 2}}]}, "`val_set`: its rows cannot be sent as JSON"),
    ({"store": "nonesuch"}, "no store 'nonesuch': it has built"),
    ({"part": "nonesuch"}, "no part 'nonesuch'"),
    ({"where": "nonesuch = 1"}, "`where"),
    ({"top_k": 1001}, "at most 1,000 rows"),
    ({"val_set": ["x" * 100_000] * 100}, "at most 8 MiB"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda value: "")
def test_what_is_refused(explorer: ghoststore.Explorer, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        ghoststore.query(**{"server": explorer.url, "val_set": ["a cat"], **more})
    assert explorer.token not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:80",
        "https://127.0.0.1:80/?token=x",
        "http://example.org/?token=x",
        "http://127.0.0.1.example.org/?token=x",
        "http://user@127.0.0.1/?token=x",
        "http://127.0.0.1:port/?token=x",
        "http://[::1/?token=x",
        "",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="`server` is the address that") as caught:
        ghoststore.query(server=url, val_set=["a cat"])
    assert "token=x" not in str(caught.value)


def test_nobody_answers_and_an_end_in_between(built: Path) -> None:
    with ghoststore.serve(built) as explorer:
        url = explorer.url
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:\d+ does not answer"):
        ghoststore.query(server=url, val_set=["a cat"])


def test_errors_are_those_of_the_library(built: Path, lab: Lab, tmp_path: Path) -> None:
    other = lab.model(tmp_path / "other", seed=7)
    with ghoststore.serve(built, checkpoint=other) as explorer, pytest.raises(MismatchError):
        ghoststore.query(server=explorer.url, val_set=["a cat"])
    store = tmp_path / "store"
    shutil.copytree(built, store)
    manifest = store / "parts/part/zarr.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with ghoststore.serve(store, checkpoint=lab.checkpoint, data=lab.corpus) as explorer, pytest.raises(CorruptError):
        ghoststore.query(server=explorer.url, val_set=["a cat"])


def test_a_store_by_name(built: Path, lab: Lab, val: dict[str, Path]) -> None:
    with ghoststore.serve({"one": built, "two": built}) as explorer:
        with pytest.raises(UsageError, match="several stores"):
            ghoststore.query(server=explorer.url, val_set=["a cat"])
        with pytest.raises(UsageError, match="no store 'three': it has one, two"):
            ghoststore.query(server=explorer.url, store="three", val_set=["a cat"])
        here = ghoststore.query(store=built, val_set=["a cat"])
        assert ghoststore.query(server=explorer.url, store="two", val_set=["a cat"]) == here
        assert ghoststore.query(server=f"{explorer.url}&store=one#/ask", val_set=["a cat"]) == here
        outcome = lab.run(*words_of(("jsonl", "--json"), val), "--server", explorer.url, "--store", "one")
        assert json.loads(outcome.out)["store"] == str(built)


def test_neither_store_nor_server(lab: Lab, val: dict[str, Path]) -> None:
    outcome = lab.run(*words_of(("jsonl",), val))
    assert (outcome.code, outcome.out) == (2, "")
    assert "give --store, whose rows are ranked; or --server" in outcome.err


def test_a_session_has_no_server(built: Path, explorer: ghoststore.Explorer) -> None:
    with ghoststore.open(built) as session, pytest.raises(UsageError, match="`server`"):
        session.query(["a cat"], server=explorer.url)


def test_an_address_shows_no_token() -> None:
    address = Address.of("http://localhost:81/?token=secret", "")
    assert str(address) == "the server at localhost:81"
    assert "secret" not in repr(address)


def test_another_who_listens_on_the_same_port_gets_no_token(
    explorer: ghoststore.Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`localhost` may be ::1, where anybody can listen on the port of an explorer; and port 0 is not port 80."""
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def recorded(host: str, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", recorded)
    address = explorer.url.replace("127.0.0.1", "localhost")
    assert len(ghoststore.query(server=address, val_set=["a cat"], top_k=2)[0]) == 2
    assert set(asked) == {"127.0.0.1"}
    assert Address.of("http://127.0.0.1:0/?token=secret", "").port == 0
