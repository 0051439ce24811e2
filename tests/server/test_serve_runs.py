"""The explorer's runs: what `watch` and `scores` say, as it grows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.store import RunLayout, RunWriter

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from ghoststore.server.streams import MOST_STREAMS
from query.training_scores.spread import BINS, QUANTILES
from query.training_scores.watch import Watcher
from tests.support.explorers import answered, events, got
from tests.support.score_runs import GROUPS, LAYOUT, Reference, append, committed, make, whole

if TYPE_CHECKING:
    from tests.conftest import Lab

TIMES = ("commit_age", "silent", "writer")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "store"
    whole(folder, "first")
    append(make(folder, "second"), 0, 10)
    return folder


@pytest.fixture(scope="module")
def explorer(store: Path) -> Iterator[ghoststore.Explorer]:
    with ghoststore.serve(store) as explorer:
        yield explorer


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in TIMES}


def test_the_list(explorer: ghoststore.Explorer, store: Path) -> None:
    runs = got(explorer, "/api/runs")["runs"]
    described = ghoststore.info(store).to_json()["runs"]
    assert [{name: run[name] for name in described[0]} for run in runs] == described
    assert [(run["name"], run["state"]) for run in runs] == [("first", "finished"), ("second", "stopped")]


def test_a_run_is_what_watch_says(explorer: ghoststore.Explorer, store: Path) -> None:
    found = got(explorer, "/api/runs/first")
    beside, spread = found.pop("explorer"), found.pop("spread")
    frame = next(iter(ghoststore.watch(store=store, run="first", once=True))).to_json()
    frame = json.loads(json.dumps(frame))
    assert "spread" not in frame
    assert timeless(found) == timeless(frame)
    assert beside["part"] is None
    assert beside["commands"][0] == f"ghoststore watch --store {store} --run first"
    assert set(spread["groups"]) == set(GROUPS)


@pytest.mark.parametrize(("name", "status"), [("nonesuch", 404), ("..%2ffirst", 404), ("..", 404)])
def test_runs_that_are_none(explorer: ghoststore.Explorer, name: str, status: int) -> None:
    for path in (f"/api/runs/{name}", f"/api/runs/{name}/events"):
        got(explorer, path, status=status)


def scores_in(step: int, array: str = "score", places: tuple[int, ...] | None = None) -> list[float]:
    """The scores of a step that count: those of the whole val set say which."""
    reference = Reference([step])
    counting = [reference.counts(score, reference.factor(step)) for _, _, score, _, _ in reference.places_of(step)]
    of_array = [score for _, _, score, _, _ in Reference([step], array, places).places_of(step)]
    return [score for score, counts in zip(of_array, counting, strict=True) if counts and np.isfinite(score)]


def test_the_spread_of_scores(store: Path) -> None:
    """One step a bin here: quantiles, and the means for all and for each group."""
    spread = Watcher(store, "first", spread=True).look().spread
    assert spread is not None
    assert spread.quantiles == list(QUANTILES)
    assert spread.kept_share is None
    assert spread.steps == [step + 0.5 for step in range(LAYOUT.steps)]
    for step in range(LAYOUT.steps):
        bands = [band[step] for band in spread.bands]
        if step not in committed():
            assert bands == [None] * len(QUANTILES)
            assert spread.mean[step] is None
            continue
        scores = scores_in(step)
        wanted = [float(np.quantile(scores, quantile, method="inverted_cdf")) for quantile in QUANTILES]
        np.testing.assert_allclose(np.array(bands, dtype=float), wanted, rtol=1 / 64)
        assert spread.mean[step] == pytest.approx(np.mean(scores))
        for place, name in enumerate(GROUPS):
            assert spread.groups[name][step] == pytest.approx(np.mean(scores_in(step, "group_score", (place,))))


def test_the_spread_by_domain(store: Path) -> None:
    """Of one step a bin, what `watch` has as the trend of each domain."""
    frame = Watcher(store, "first", spread=True).look()
    assert frame.spread is not None
    trends = {domain.domain: domain.trend for domain in frame.domains}
    assert {domain.domain: domain.mean for domain in frame.spread.domains} == trends


def test_the_spread_folds(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bins for 23 steps: each of eight steps, and no score is lost."""
    assert BINS == 64
    monkeypatch.setattr("query.training_scores.spread.BINS", 4)
    spread = Watcher(store, "first", spread=True).look().spread
    assert spread is not None
    assert spread.steps == [4.0, 12.0, 20.0]
    for place, steps in enumerate((range(8), range(8, 16), range(16, 23))):
        scores = [score for step in steps if step in committed() for score in scores_in(step)]
        assert spread.mean[place] == pytest.approx(np.mean(scores))
        median = float(np.quantile(scores, 0.5, method="inverted_cdf"))
        assert spread.bands[2][place] == pytest.approx(median, rel=1 / 64)


def test_what_was_kept(tmp_path: Path) -> None:
    """Of each step the share of its candidates that it trained on; means are over these alone."""
    layout = RunLayout.saving(2, steps=9, ranks=2, batch=4, rows=24, weights=True, groups=GROUPS)
    drawn = {}
    with RunWriter(make(tmp_path / "store", layout=layout, scoring={"choosing": {"policy": "top-k"}})) as writer:
        for step in range(8):
            rng = np.random.default_rng([7, step])
            given = {"sample": rng.permutation(24)[:8].reshape(2, 4), "score": rng.standard_normal((2, 4))}
            given |= {"weight": rng.integers(0, 3, (2, 4)).astype(float), "group_score": rng.standard_normal((2, 4, 2))}
            if step == 3:
                given["sample"][1, 3] = -1
                given["score"][1, 3] = given["weight"][1, 3] = given["group_score"][1, 3] = np.nan
            drawn[step] = given
            writer.append(step, {**given, "loss": given["score"] * 0 + 2, "learning_rate": 0.1})
    frame = Watcher(tmp_path / "store", spread=True).look()
    assert frame.spread is not None
    assert frame.spread.kept_share is not None
    for step, given in drawn.items():
        trained = (given["sample"] >= 0) & (np.nan_to_num(given["weight"]) > 0)
        assert frame.spread.kept_share[step] == trained.sum() / (given["sample"] >= 0).sum()
        assert frame.spread.mean[step] == pytest.approx(given["score"][trained].mean())
        assert frame.spread.groups["code"][step] == pytest.approx(given["group_score"][trained][:, 1].mean())


def test_events_of_a_run_that_grows(tmp_path: Path) -> None:
    """A frame for what is there, one more as soon as steps are committed, and the end with the last step."""
    run = make(tmp_path / "store")
    append(run, 0, 5)
    with ghoststore.serve(tmp_path / "store") as explorer, answered(explorer, "/api/runs/run/events") as answer:
        stream = events(answer)
        name, first = next(stream)
        assert (name, first["steps"]) == ("frame", 5)
        append(run, 5, 10)
        steps = 5
        while steps < 10:
            name, frame = next(stream)
            assert name == "frame"
            steps = frame["steps"]
        append(run, 15, LAYOUT.steps)
        rest = list(stream)
        assert [name for name, _ in rest[-2:]] == ["frame", "end"]
        whole_frame = rest[-2][1]
        assert timeless(whole_frame) == timeless(got(explorer, "/api/runs/run"))


def test_a_run_that_is_removed_while_it_is_watched(tmp_path: Path) -> None:
    append(make(tmp_path / "store"), 0, 5)
    with ghoststore.serve(tmp_path / "store") as explorer, answered(explorer, "/api/runs/run/events") as answer:
        stream = events(answer)
        assert next(stream)[0] == "frame"
        ghoststore.remove(store=tmp_path / "store", run="run")
        last = list(stream)[-1]
        assert last[0] == "problem"
        assert "run" in last[1]["error"]["message"]
        assert got(explorer, "/api/runs")["runs"] == []


def test_a_stream_ends_with_the_server(tmp_path: Path) -> None:
    append(make(tmp_path / "store"), 0, 5)
    rest: list[Any] = []
    with ghoststore.serve(tmp_path / "store") as explorer, answered(explorer, "/api/runs/run/events") as answer:
        stream = events(answer)
        assert next(stream)[0] == "frame"
        reader = threading.Thread(target=lambda: rest.extend(stream))
        reader.start()
        explorer.close()
        reader.join()
    assert "end" not in [name for name, _ in rest]


def test_so_many_streams(tmp_path: Path) -> None:
    """One more is refused, until one of them is let go of."""
    append(make(tmp_path / "store"), 0, 5)
    path = "/api/runs/run/events"
    with ghoststore.serve(tmp_path / "store") as explorer:
        opened = [answered(explorer, path) for _ in range(MOST_STREAMS)]
        streams = [events(one.__enter__()) for one in opened]
        for stream in streams:
            assert next(stream)[0] == "frame"
        error = got(explorer, path, status=503)["error"]
        assert (error["type"], error["exit_code"]) == ("BusyError", 5)
        opened.pop().__exit__(None, None, None)
        while True:  # until the server has seen that it went
            with answered(explorer, path) as answer:
                if answer.status == 200:
                    assert next(events(answer))[0] == "frame"
                    break
        for one in opened:
            one.__exit__(None, None, None)


def test_no_more_streams_when_all_are_asked_for_at_once(tmp_path: Path) -> None:
    append(make(tmp_path / "store"), 0, 5)
    with ghoststore.serve(tmp_path / "store") as explorer, ExitStack() as opened:
        connections = [HTTPConnection("127.0.0.1", explorer.port, timeout=60) for _ in range(2 * MOST_STREAMS)]
        for connection in connections:
            opened.callback(connection.close)
            connection.request("GET", "/api/runs/run/events", headers={"authorization": f"Bearer {explorer.token}"})
        statuses = [connection.getresponse().status for connection in connections]
    assert sorted(statuses) == [200] * MOST_STREAMS + [503] * MOST_STREAMS


@pytest.mark.slow
def test_a_training_that_is_watched(lab: Lab, tmp_path: Path) -> None:
    """A real `ghoststore train`, in a process of its own."""
    store = tmp_path / "store"
    ghoststore.build(checkpoint=lab.checkpoint, data=lab.corpus, store=store, name="part")
    pid = lab.start(
        *("train", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--val-set", lab.corpus, "--store", store),
        *("--output-dir", tmp_path / "out", "--name", "live", "--max-steps", "40", "--batch-size", "4", "--quiet"),
    )
    with ghoststore.serve(store) as explorer:
        while "live" not in [run["name"] for run in got(explorer, "/api/runs")["runs"]]:
            pass
        with answered(explorer, "/api/runs/live/events") as answer:
            seen = list(events(answer))
        outcome = lab.wait(pid)
        assert outcome.code == 0, outcome.err
        steps = [data["steps"] for name, data in seen if name == "frame"]
        assert steps == sorted(steps)
        assert seen[-1][0] == "end"
        assert seen[-2][1]["explorer"]["part"] == "part"
        assert timeless(seen[-2][1]) == timeless(got(explorer, "/api/runs/live"))


def test_a_run_whose_writer_goes_on(tmp_path: Path) -> None:
    """Steps that are committed between two looks are all read, each once."""
    run = make(tmp_path / "store")
    watcher = Watcher(tmp_path / "store", spread=True)
    with RunWriter(run):
        pass
    for start, stop in ((0, 5), (5, 10), (15, 23)):
        append(run, start, stop)
        frame = watcher.look()
    again = Watcher(tmp_path / "store", spread=True).look()
    assert frame.spread == again.spread
