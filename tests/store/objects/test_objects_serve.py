"""The explorer of a store in object storage: what it says of the same store on a disk, also of a run as it grows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.store.base.object_path import location
from query.training_scores.watch import writer_fields

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from tests.support.explorers import answered, events, got
from tests.support.object_server import KEY, SECRET, Request
from tests.support.score_runs import LAYOUT, append, make, opened_before_its_span

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

TEXTS = ["the old dog runs", "a river under the moon"]
ASKED: dict[str, Any] = {
    "/store": None,
    "/runs": None,
    "/sample/part/4": None,
    "/sample/part/4/runs": None,
    "/sample/part/4/duplicates": None,
    "/query": {"val_set": TEXTS, "top_k": 5, "bottom_k": 2, "each": True, "histogram": True, "tokens": True},
}
"""Addresses, and what is sent to them."""
MOVING = {"state", "commit_age", "silent", "writer", "seconds_left"}
"""Of a run: what a bucket does not show, and what no two looks have the same."""


def without_place(document: Any, store: Path | str) -> str:
    return json.dumps(document, sort_keys=True).replace(str(store), "STORE")


def until(stream: Iterator[tuple[str, Any]], steps: int) -> dict[str, Any]:
    """The first frame with so many steps."""
    for name, frame in stream:
        assert name == "frame", frame
        if frame["steps"] == steps:
            return dict(frame)
    pytest.fail(f"the stream ended before step {steps}")


def test_parts_questions_and_samples(bucket: Bucket, remote: str) -> None:
    stores = {"here": str(bucket.lab.folder / "whole"), "there": remote}
    before = bucket.tree("remote")
    bucket.server.reset()
    with ghoststore.serve(stores) as explorer:
        for path, body in ASKED.items():
            here, there = (
                without_place(got(explorer, f"/api/stores/{name}{path}", body), stores[name]) for name in stores
            )
            assert there == here, path
            for secret in (SECRET, KEY, bucket.server.address):
                assert secret not in there
        near = {"part": "part", "near": 3, "top_k": 4}
        hits = [got(explorer, f"/api/stores/{name}/query", near)["results"] for name in stores]
        assert hits[0] == hits[1]
        with answered(explorer, "/api/stores/there/verify/events") as answer:
            *progress, (name, report) = events(answer)
        assert {event for event, _ in progress} == {"progress"}
        assert (name, report["sound"]) == ("report", True)
    assert not set(bucket.server.requests) - {"GET", "HEAD"}
    assert bucket.tree("remote") == before


@pytest.mark.slow
def test_rows_to_train_on(bucket: Bucket, remote: str) -> None:
    chosen = []
    for store in (bucket.lab.folder / "whole", remote):
        with ghoststore.serve(store) as explorer:
            chosen.append(without_place(got(explorer, "/api/select", {"val_set": TEXTS, "count": 4}), store))
    assert chosen[0] == chosen[1]


def test_a_network_that_fails_is_told(bucket: Bucket, remote: str) -> None:
    """An answer for the page, without an address or a key in it, and no end of the server."""
    with ghoststore.serve(remote) as explorer:
        bucket.server.refuse = lambda request: "/vectors/c/" in request.path
        error = got(explorer, "/api/query", {"val_set": TEXTS}, status=507)["error"]
        assert (error["type"], error["exit_code"]) == ("StorageError", 6)
        assert "cannot read s3://bucket/remote/parts/part/vectors/c/" in error["message"]
        for secret in (SECRET, KEY, bucket.server.address):
            assert secret not in error["message"]
        bucket.server.reset()
        assert got(explorer, "/api/query", {"val_set": TEXTS})["results"]


def test_a_run_that_grows(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its journal and from spans; each commit brings the rows that it scored, as on a disk."""
    monkeypatch.setattr("ghoststore.server.runs.SECONDS", 0.1)
    layout = replace(LAYOUT, span_steps=10, save_steps=5)
    stores = {"here": tmp_path / "store", "there": location("s3://bucket/served")}
    runs = {name: make(store, layout=layout) for name, store in stores.items()}
    with (
        ghoststore.serve({name: str(store) for name, store in stores.items()}) as explorer,
        answered(explorer, "/api/stores/here/runs/run/events") as of_here,
        answered(explorer, "/api/stores/there/runs/run/events") as of_there,
    ):
        streams = {"here": events(of_here), "there": events(of_there)}
        committed, seen = 0, 0
        for start, stop in ((0, 5), (5, 10), (15, 20), (20, 23)):
            committed += stop - start
            frames = {}
            for name, run in runs.items():
                append(run, start, stop)
                frames[name] = until(streams[name], committed)
                assert f"--store {stores[name]} " in frames[name].pop("explorer")["commands"][0]
            here, there = (
                without_place({key: frame[key] for key in frame.keys() - MOVING}, stores[name])
                for name, frame in frames.items()
            )
            assert there == here
            assert frames["there"]["state"] == ("finished" if stop == 23 else None)
            assert frames["there"]["silent"] is None
            assert frames["there"]["commit_age"] >= 0
            assert seen < frames["there"]["scored"]
            seen = frames["there"]["scored"]
        assert [name for name, _ in streams["there"]] == ["end"]
        listed = got(explorer, "/api/stores/there/runs")["runs"]
        assert [(run["name"], run["state"]) for run in listed] == [("run", "finished")]


def test_the_last_commit_of_a_run_that_was_opened_before_it(bucket: Bucket) -> None:
    """Its journal, a folder here, is gone when it is looked at: the span that holds it now has an age."""
    age = writer_fields(opened_before_its_span(location("s3://bucket/aged")), finished=False)["commit_age"]
    assert age is not None
    assert age >= 0


@pytest.mark.slow
def test_a_training_that_is_watched(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    """A real `ghoststore train` into a bucket: each save interval is on the page before the next one is committed."""
    store = "s3://bucket/live"
    ghoststore.copy(remote, part="part", to_store=store)
    on_the_page = [threading.Event() for _ in range(3)]

    def hold(request: Request) -> None:
        _, journal, entry = request.path.partition("/runs/live/journal/00000000.log/")
        if request.method == "PUT" and journal and int(entry[:8]):
            on_the_page[int(entry[:8]) - 1].wait(30)

    bucket.server.seen = hold
    pid = bucket.lab.start(
        *("train", "--checkpoint", bucket.lab.checkpoint, "--data", bucket.lab.corpus, "--val-set", bucket.lab.corpus),
        *("--store", store, "--output-dir", tmp_path / "out", "--name", "live", "--max-steps", "12"),
        *("--batch-size", "4", "--dot-prod-save-interval", "4", "--quiet"),
    )
    frames: list[dict[str, Any]] = []
    with ghoststore.serve(store) as explorer:
        while "live" not in [run["name"] for run in got(explorer, "/api/runs")["runs"]]:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "Z", "the training ended before its run began"
        with answered(explorer, "/api/runs/live/events") as answer:
            for name, frame in events(answer):
                if name == "end":
                    break
                assert name == "frame", frame
                frames.append(frame)
                for event in on_the_page[: frame["steps"] // 4]:
                    event.set()
        outcome = bucket.lab.wait(pid)
        assert outcome.code == 0, outcome.err
        of_sample = got(explorer, "/api/sample/part/0/runs")["runs"]
    assert [steps for steps in dict.fromkeys(frame["steps"] for frame in frames) if steps] == [4, 8, 12]
    assert [frame["state"] for frame in frames if frame["steps"] < 12] == [None] * sum(f["steps"] < 12 for f in frames)
    assert frames[-1]["state"] == "finished"
    assert frames[-1]["explorer"]["part"] == "part"
    assert all(sample["text"] for sample in frames[-1]["best"])
    assert [run["run"] for run in of_sample] == ["live"]
    assert of_sample[0]["history"]
