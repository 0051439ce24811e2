"""Training with its run in object storage: what a training with a local store commits, whatever kills it."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

import ghoststore
from ghoststore.errors import BusyError
from ghoststore.store import Store
from ghoststore.store.base.object_path import location
from ghoststore.store.base.objects import objects_of
from ghoststore.store.run.journal import append_entry
from ghoststore.store.run.pieces import side_by_side
from query.training_scores.watch import Watcher, newest_of
from tests.support.loops import plan
from tests.support.managed_loops import config_of
from tests.support.managed_loops import train as managed
from tests.support.object_server import KEY, SECRET, Request, first
from tests.support.score_runs import LAYOUT, append, make
from tests.support.trainings import Gym, arrays_of, open_gym, same_bits, without_times

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

OPTIONS = ("--per-layer", "--keep-gradients", "2", "--proj-rank-total", "16")
MOMENTS = random.Random(23).sample(range(1, 60), 20)
ENTRY = "/run/journal/00000000.log/"


@pytest.fixture(scope="module")
def gym(bucket_of_session: Bucket) -> Gym:
    folder = bucket_of_session.lab.folder / "gym"
    folder.mkdir()
    return open_gym(bucket_of_session.lab, folder)


@pytest.fixture(scope="module")
def whole(gym: Gym) -> Path:
    """The folder of an undisturbed training with a local store."""
    folder = gym.folder / "whole"
    outcome = gym.run(folder, *OPTIONS)
    assert outcome.code == 0, outcome.err
    return folder


def words(gym: Gym, folder: Path, name: str, *options: str) -> list[str]:
    return ["train", *gym.words(folder, *OPTIONS, "--store", f"s3://bucket/{name}", *options)]


def train(gym: Gym, folder: Path, name: str, *options: str) -> Any:
    return gym.lab.run(*words(gym, folder, name, *options))


def ends_like(bucket: Bucket, folder: Path, name: str, whole: Path) -> None:
    """Weights, optimizer and run are those of the local training, bit for bit; `gc` removes what kills have left."""
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        path = Path("out") / "checkpoint-12" / file
        assert same_bits(load_file(folder / path), load_file(whole / path)) == []
    there, here = Store.open(f"s3://bucket/{name}").run("run"), Store.open(whole / "store").run("run")
    assert there.complete
    assert same_bits(arrays_of(there), arrays_of(here)) == []
    ghoststore.gc(f"s3://bucket/{name}")
    tree, local = bucket.tree(name), bucket.lab.tree(whole / "store")
    manifests = [json.loads(files.pop("runs/run/zarr.json"))["attributes"] for files in (tree, local)]
    for manifest in manifests:
        manifest["manifest"]["source"].pop("output_dir")
        manifest.pop("manifest_sha256")
    assert manifests[0] == manifests[1]
    assert tree.keys() == local.keys()
    assert without_times(tree) == without_times(local)
    assert ghoststore.verify(f"s3://bucket/{name}").sound


def test_a_run_has_the_bytes_of_a_local_one(bucket: Bucket, gym: Gym, whole: Path, tmp_path: Path) -> None:
    outcome = train(gym, tmp_path, "trained")
    assert outcome.code == 0, outcome.err
    ends_like(bucket, tmp_path, "trained", whole)
    for name, data in bucket.tree("trained").items():
        for secret in (SECRET, KEY, bucket.server.address):
            assert secret.encode() not in data, name
    asked: dict[str, Any] = {"run": "run", "device": "cpu"}
    there, here = (ghoststore.query(store=store, **asked) for store in ("s3://bucket/trained", whole / "store"))
    assert there.to_json()["results"] == here.to_json()["results"]


@pytest.mark.thin(3)
@pytest.mark.kill
@pytest.mark.parametrize(("number", "after"), [(4, True), (22, False), (30, True), (45, False)])
def test_a_killed_training_goes_on(
    bucket: Bucket, gym: Gym, whole: Path, tmp_path: Path, number: int, after: bool
) -> None:
    name = f"train-{number}"
    assert bucket.killed_command(words(gym, tmp_path, name), number, after=after) >= number
    outcome = train(gym, tmp_path, name)
    assert outcome.code == 0, outcome.err
    ends_like(bucket, tmp_path, name, whole)


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("moment", range(20))
def test_trainings_killed_at_random_moments_go_on(
    bucket: Bucket, gym: Gym, whole: Path, tmp_path: Path, moment: int
) -> None:
    name = f"train-random-{moment}"
    bucket.killed_command(words(gym, tmp_path, name), MOMENTS[moment], after=moment % 2 == 1)
    bucket.killed_command(words(gym, tmp_path, name), 1 + MOMENTS[-moment] // 2, after=moment % 4 > 1)
    outcome = train(gym, tmp_path, name)
    assert outcome.code == 0, outcome.err
    ends_like(bucket, tmp_path, name, whole)


def test_lost_answers_lose_nothing(bucket: Bucket, gym: Gym, whole: Path, tmp_path: Path) -> None:
    bucket.server.lose = first(3, lambda request: request.method == "PUT" and ENTRY in request.path)
    bucket.server.cut = first(3, lambda request: request.method == "GET" and ENTRY in request.path)
    outcome = train(gym, tmp_path, "train-lost")
    assert outcome.code == 0, outcome.err
    ends_like(bucket, tmp_path, "train-lost", whole)


@pytest.fixture
def half(bucket: Bucket, gym: Gym, tmp_path: Path) -> tuple[Path, str]:
    """(folder, name) of a training that was killed with two save intervals in the journal of its only span."""
    name = f"half-{tmp_path.name}"
    pids: list[int] = []
    started = threading.Event()

    def kill(request: Request) -> bool:
        if request.method != "PUT" or f"{ENTRY}00000002" not in request.path:
            return False
        started.wait()
        os.kill(pids[0], signal.SIGKILL)
        return True

    bucket.server.refuse = kill
    pids.append(gym.lab.start(*words(gym, tmp_path, name)))
    started.set()
    assert gym.lab.wait(pids[0]).code == -signal.SIGKILL
    bucket.server.reset()
    assert Store.open(f"s3://bucket/{name}").run("run").ranges == [(0, 8)]
    return tmp_path, name


def test_an_open_journal_reads_as_a_local_one(
    bucket: Bucket, gym: Gym, whole: Path, half: tuple[Path, str], tmp_path: Path
) -> None:
    """Scores so far, a copy to a disk, and a training that goes on."""
    folder, name = half
    store = f"s3://bucket/{name}"
    run, done = Store.open(store).run("run"), Store.open(whole / "store").run("run")
    np.testing.assert_array_equal(run.read_committed("score"), done.read_committed("score")[:8])
    report = ghoststore.verify(store)
    assert (report.damage, report.leftovers, report.unknown) == ([], [], [])
    assert ghoststore.gc(store).removed == []
    scores = ghoststore.scores(store=store, run="run").to_json()
    ghoststore.copy(store, run="run", to_store=tmp_path / "copied")
    copied = ghoststore.scores(store=tmp_path / "copied", run="run").to_json()
    assert {**copied, "store": None} == {**scores, "store": None}
    outcome = train(gym, folder, name)
    assert outcome.code == 0, outcome.err
    ends_like(bucket, folder, name, whole)


@pytest.mark.thin(1)
@pytest.mark.parametrize("left", [(), ("00000001",)])
def test_a_journal_that_goes_while_it_is_read(
    bucket: Bucket, gym: Gym, half: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    """Its span is committed in between: each step is read once, also where entries are there still."""
    folder, name = half
    monkeypatch.setattr("ghoststore.store.run.journal_files.IN_FLIGHT", 1)
    monkeypatch.setattr("ghoststore.store.run.pieces.PIECE_BYTES", 1)
    key = f"{name}/runs/run/journal/00000000.log/"
    entries = {file: bucket.tree(name)[f"runs/run/journal/00000000.log/{file}"] for file in left}
    run, late = (Store.open(f"s3://bucket/{name}").run("run") for _ in range(2))
    expected = run.read_committed("score")
    pieces = side_by_side(run, ["score"], run.ranges)
    first = next(pieces)
    assert (first.start, first.stop) == (0, 4)
    outcome = train(gym, folder, name)
    assert outcome.code == 0, outcome.err
    for file, data in entries.items():
        objects_of("s3", "bucket").put(f"{key}{file}", data)
    found = [np.array(first.data["score"]), *(np.array(piece.data["score"]) for piece in pieces)]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    np.testing.assert_array_equal(late.read_committed("score"), expected)
    report = ghoststore.verify(f"s3://bucket/{name}")
    assert (report.damage, report.unknown) == ([], [])
    assert [file.file for file in report.leftovers] == [f"journal/00000000.log/{file}" for file in left]
    assert ghoststore.gc(f"s3://bucket/{name}").removed == report.leftovers
    assert ghoststore.verify(f"s3://bucket/{name}").leftovers == []


@pytest.mark.thin(2)
@pytest.mark.parametrize("harm", ["flip", "cut", "first", "swap", "as on a disk"])
def test_damage_of_a_journal_is_named(bucket: Bucket, gym: Gym, half: tuple[Path, str], harm: str) -> None:
    """Nothing is taken for the unfinished end of a writer that died: an object is whole, or damaged."""
    folder, name = half
    objects = objects_of("s3", "bucket")
    key = f"{name}/runs/run/journal/00000000.log"
    one, two = (bytearray(bucket.tree(name)[f"runs/run/journal/00000000.log/{n:08d}"]) for n in (0, 1))
    if harm == "flip":
        two[-60] ^= 1
        objects.put(f"{key}/00000001", bytes(two))
    elif harm == "cut":
        objects.put(f"{key}/00000001", bytes(two[:-9]))
    elif harm == "first":
        objects.delete([f"{key}/00000000"])
    elif harm == "as on a disk":
        objects.put(key, bytes(one + two))
        objects.delete([f"{key}/{number:08d}" for number in (0, 1)])
    else:
        objects.put(f"{key}/00000000", bytes(two))
        objects.put(f"{key}/00000001", bytes(one))
    report = ghoststore.verify(f"s3://bucket/{name}")
    assert [damage.file for damage in report.damage] == ["journal/00000000.log"]
    before = bucket.tree(name)
    outcome = train(gym, folder, name)
    assert outcome.code == 4, outcome.err
    assert "journal/00000000.log" in outcome.err
    assert bucket.tree(name) == before


def test_a_journal_that_another_tool_brought_is_left(bucket: Bucket, half: tuple[Path, str], tmp_path: Path) -> None:
    """Moved out of the way its steps would be gone without a word; what the repair says brings them."""
    store, (_, name) = tmp_path / "brought", half
    for key, data in bucket.tree(name).items():
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).write_bytes(data)
    before = bucket.lab.tree(store)
    for settings in ({}, {"drop_damaged": True}):
        (left,) = ghoststore.repair(store=store, **settings).unmended
        assert left.file == "journal/00000000.log"
        assert f"`ghoststore cp --store ADDRESS --run run --to-store {store}`" in left.why
        assert bucket.lab.tree(store) == before
    ghoststore.remove(store, run="run")
    ghoststore.copy(f"s3://bucket/{name}", run="run", to_store=store)
    assert Store.open(store).run("run").ranges == [(0, 8)]


def test_another_training_of_other_numbers_is_refused(bucket: Bucket, gym: Gym, half: tuple[Path, str]) -> None:
    """Of two that write one run, one has each save interval: equal ones are one truth, others end the later writer."""
    _, name = half
    run = Store.open(f"s3://bucket/{name}").run("run")
    journal, late = run.journals[0], Store.open(f"s3://bucket/{name}").run("run").journals[0]
    data = {spec.name: run.read_committed(spec.name)[:4] for spec in run.layout.arrays() if spec.every == 1}
    sparse = {
        spec.name: run.read_committed(spec.name)[: spec.count(4)] for spec in run.layout.arrays() if spec.every > 1
    }
    append_entry(run, journal, 8, {**data, **sparse})
    append_entry(run, late, 8, {**data, **sparse})
    late.entries.pop()
    with pytest.raises(BusyError, match="another training writes s3://bucket/"):
        append_entry(run, late, 8, {**data, **sparse, "train_loss": data["train_loss"] + 1})


def test_a_loop_with_scores(bucket: Bucket, tmp_path: Path) -> None:
    """The manager's run, which the callback and plain loops write alike."""
    steps = plan(7)
    stores: tuple[Any, ...] = ("s3://bucket/loops", tmp_path / "loops")
    for store in stores:
        managed(steps, config_of(store))
    there, here = (Store.open(store).run("run") for store in stores)
    assert there.complete
    assert same_bits(arrays_of(there), arrays_of(here)) == []


def test_a_growing_run_is_watched(bucket: Bucket, tmp_path: Path) -> None:
    """As on a disk, from a journal and from spans; who writes it nothing shows, so it is not called stopped."""
    layout = replace(LAYOUT, span_steps=10, save_steps=5)
    stores = (location("s3://bucket/watched"), tmp_path / "store")
    runs, watchers = [make(store, layout=layout) for store in stores], [Watcher(store) for store in stores]
    for start, stop in ((0, 5), (5, 10), (15, 23)):
        for run in runs:
            append(run, start, stop)
        there, here = (watcher.look() for watcher in watchers)
        assert there.commit_age is not None
        assert there.state == ("finished" if stop == 23 else None)
        assert there.silent is None
        same = {"store": "", "state": None, "commit_age": None, "silent": None, "seconds_left": None, "writer": None}
        assert replace(there, **same) == replace(here, **same)
        assert newest_of(["run"], Store.open(stores[0])) == "run"
