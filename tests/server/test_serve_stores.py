"""The explorer of several stores, and what it says of whether a store is sound."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import UsageError

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from ghoststore.server.checks import Listener, StoppedError
from ghoststore.server.stores import stores_of
from tests.support.explorers import answered, events, got
from tests.support.score_runs import append, make

if TYPE_CHECKING:
    from tests.conftest import Lab

QUESTION = {"val_set": ["the old dog runs"], "top_k": 3}


@pytest.fixture(scope="module")
def other(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another store, of a model with another seed."""
    folder = tmp_path_factory.mktemp("other")
    checkpoint = lab.model(folder / "model", seed=5)
    ghoststore.build(checkpoint=checkpoint, data=lab.corpus, store=folder / "store", name="second")
    return folder / "store"


@pytest.fixture(scope="module")
def explorer(built: Path, other: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve([str(built), f"small={other}"]) as explorer:
        yield explorer


def test_each_store_answers_by_its_name(explorer: ghoststore.Explorer, built: Path, other: Path) -> None:
    """Asked in turn, because only one model is kept."""
    stores = {"built": built, "small": other}
    listed = got(explorer, "/api/stores")["stores"]
    assert listed == [{"name": name, "store": str(path)} for name, path in stores.items()]
    for name in ("built", "small", "built"):
        assert got(explorer, f"/api/stores/{name}/store") == ghoststore.info(stores[name]).to_json()
        answer = got(explorer, f"/api/stores/{name}/query", QUESTION)
        assert f"--store {stores[name]}" in answer.pop("explorer")["command"]
        wanted = ghoststore.query(store=stores[name], val_set=[{"text": QUESTION["val_set"][0]}], top_k=3)
        assert answer == wanted.to_json()
        open_models = [asked for asked in explorer._asked.values() if asked._session is not None]
        assert open_models == [explorer._asked[name]]


def test_choosing_lets_go_of_the_model_of_any_store(explorer: ghoststore.Explorer) -> None:
    got(explorer, "/api/stores/built/query", QUESTION)
    got(explorer, "/api/stores/small/select", {"val_set": QUESTION["val_set"], "count": 2})
    assert [name for name, asked in explorer._asked.items() if asked._session is not None] == []


def test_stores_are_asked_at_once(explorer: ghoststore.Explorer) -> None:
    """From two threads: each gets the answer of its store."""
    wanted = {name: got(explorer, f"/api/stores/{name}/query", QUESTION) for name in ("built", "small")}
    answers: list[tuple[str, Any]] = []

    def ask(name: str) -> None:
        answers.extend((name, got(explorer, f"/api/stores/{name}/query", QUESTION)) for _ in range(4))

    threads = [threading.Thread(target=ask, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer["results"] == wanted[name]["results"] for name, answer in answers)


def test_several_have_no_address_without_a_name(explorer: ghoststore.Explorer) -> None:
    for path in ("/api/store", "/api/runs", "/api/sample/part/0"):
        assert "/api/stores/NAME" in got(explorer, path, status=400)["error"]["message"]
    assert "built, small" in got(explorer, "/api/query", QUESTION, status=400)["error"]["message"]
    got(explorer, "/api/stores/nonesuch/store", status=404)
    got(explorer, "/api/stores/..%2fbuilt/store", status=404)


def test_one_store_has_both_addresses(built: Path) -> None:
    with ghoststore.serve({"mine": built}) as explorer:
        assert got(explorer, "/api/stores/mine/store") == got(explorer, "/api/store")
        assert got(explorer, "/api/stores")["stores"] == [{"name": "mine", "store": str(built)}]


def test_names(tmp_path: Path) -> None:
    assert stores_of("a/store") == {"store": "a/store"}
    assert stores_of(["a/store", "b=c/store"]) == {"store": "a/store", "b": "c/store"}
    assert stores_of(["./a=b"]) == {"a-b": "./a=b"}
    assert stores_of(["s3://bucket/my store"]) == {"my-store": "s3://bucket/my store"}
    assert stores_of("x=s3://bucket/store") == {"x": "s3://bucket/store"}
    assert stores_of({"x": tmp_path}) == {"x": tmp_path}
    for wrong, message in (
        (["a/store", "b/store"], "two stores are called 'store', a/store and b/store: name one, `store=other=b/store`"),
        ({"a/b": tmp_path}, "'a/b' is no name of a store"),
        ([], "`store` is empty"),
        (7, "`store` is a path, a list of them, or a dict"),
        ("a=https://example.org/store", "is no place for a store"),
    ):
        with pytest.raises(UsageError) as caught:
            stores_of(wrong)  # type: ignore[arg-type]
        assert message in str(caught.value)


def test_options_of_one_store(built: Path, other: Path, lab: Lab) -> None:
    with pytest.raises(UsageError, match="`checkpoint` is that of one store, and these are 2"):
        ghoststore.serve([built, f"small={other}"], checkpoint=lab.checkpoint)
    with pytest.raises(UsageError):
        ghoststore.serve([built, "nonesuch"])


def test_verify_is_what_the_command_says(built: Path, other: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built, store)
    append(make(store, "run"), 0, 10)
    with ghoststore.serve(store) as explorer:
        with answered(explorer, "/api/verify/events") as answer:
            seen = list(events(answer))
        assert [name for name, _ in seen if name != "progress"] == ["report"]
        assert seen[0][0] == "progress"
        assert json.loads(json.dumps(ghoststore.verify(store).to_json())) == seen[-1][1]
        assert seen[-1][1]["sound"]
        chunk = next(path for path in (store / "parts/part/vectors").rglob("*") if path.is_file() and path.suffix == "")
        chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
        with answered(explorer, "/api/verify/events?part=part") as answer:
            report = list(events(answer))[-1][1]
        assert (report["sound"], report["runs"], len(report["damage"])) == (False, [], 1)
        with answered(explorer, "/api/verify/events?part=nonesuch") as answer:
            last = list(events(answer))[-1]
        assert (last[0], last[1]["error"]["type"]) == ("problem", "UsageError")
        assert "no parameter 'prat'" in got(explorer, "/api/verify/events?prat=part", status=400)["error"]["message"]


class StopsAfter(Listener):
    """Its reader goes at the third sign of progress."""

    signs = 0

    def check(self) -> None:
        self.signs += 1
        if self.signs == 3:
            self.stopped.set()
        super().check()


def test_verify_stops(built: Path) -> None:
    for ended in (False, True):
        end = threading.Event()
        listener = StopsAfter(end)
        if ended:
            end.set()
        with pytest.raises(StoppedError):
            ghoststore.verify(built, progress=listener)
        assert listener.signs == (1 if ended else 3)


def test_one_verifies_at_a_time_and_one_who_goes_makes_room(built: Path) -> None:
    with ghoststore.serve(built) as explorer:
        for _ in range(3):
            with answered(explorer, "/api/verify/events") as answer:
                assert answer.status in (200, 503)
        while True:
            with answered(explorer, "/api/verify/events") as answer:
                if answer.status == 200 and list(events(answer))[-1][0] == "report":
                    break
                assert "is being verified already" in json.loads(answer.read())["error"]["message"]


def test_the_command_takes_several(lab: Lab, built: Path, other: Path) -> None:
    outcome = lab.run("serve", "--store", built, "--store", built)
    assert outcome.code == 2
    assert "two stores are called 'built'" in outcome.err
    assert f"--store other={built}" in outcome.err
