"""`build --engine ray`: actors of a real cluster, of one node and of several, of which one dies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import MismatchError, UsageError
from tests.support.ray_clusters import Striking, kill_one
from tests.support.ray_clusters import cluster as cluster

if TYPE_CHECKING:
    from tests.conftest import Lab


def build(lab: Lab, store: Path, **settings: Any) -> ghoststore.BuildReport:
    given = {"checkpoint": lab.checkpoint, "data": lab.corpus, "name": "part", "span_rows": 6, "device": "cpu"}
    return ghoststore.build(store=store, **(given | {"engine": "ray"} | settings))


@pytest.mark.slow
@pytest.mark.ddp
def test_as_one_process(lab: Lab, built: Path, tmp_path: Path, cluster: Any) -> None:
    store = tmp_path / "store"
    report = build(lab, store)
    assert report.rows_built == len(lab.rows)
    assert lab.tree(store) == lab.tree(built)
    assert build(lab, store).rows_built == 0
    with pytest.raises(MismatchError, match="rank_total"):
        build(lab, store, projection=ghoststore.ProjectionConfig(rank_total=16))
    with pytest.raises(UsageError, match="has room for 3 workers"):
        build(lab, store, workers=4)
    with pytest.raises(UsageError, match="has joined another cluster"):
        build(lab, store, ray_address="127.0.0.1:1")


@pytest.mark.slow
@pytest.mark.kill
def test_a_node_dies(lab: Lab, built: Path, tmp_path: Path, cluster: Any) -> None:
    """Raylet and all: its actor is begun elsewhere, once there is room."""
    store = tmp_path / "store"
    listener = Striking(lambda: cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False))
    build(lab, store, workers=2, progress=listener)
    assert listener.strike is None
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.slow
@pytest.mark.kill
def test_an_actor_dies(lab: Lab, built: Path, tmp_path: Path, cluster: Any) -> None:
    store = tmp_path / "store"

    listener = Striking(lambda: kill_one(b"ray::Builder"))
    build(lab, store, workers=2, progress=listener)
    assert any("(a Ray actor) ended" in note and "another takes its place" in note for note in listener.notes)
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"worker": "1/2"}, "leave out `worker`"),
        ({"devices": ["0"], "workers": 2}, "leave out `worker` and `devices`"),
        ({"engine": None, "ray_address": "here:1"}, "`ray_address` belongs to `engine=ray`"),
        ({"engine": None, "num_gpus": 1}, "`num_gpus` belongs to `engine=ray`"),
        ({"engine": "dask"}, "known: ray"),
        ({"data": ["a text"]}, "save what is in memory"),
    ],
)
def test_refused(lab: Lab, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(lab, tmp_path / "store", **settings)


def test_not_installed(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'ghoststore\[ray\]'"):
        build(lab, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.kill
def test_tokenize_and_evaluate(lab: Lab, built: Path, tmp_path: Path, cluster: Any) -> None:
    """The shards and the correlations of one process, though an actor dies at each."""
    given = {"data": lab.corpus, "tokenizer": lab.checkpoint, "shard_samples": 3}
    ghoststore.tokenize(out=tmp_path / "alone", **given, workers=1)

    listener = Striking(lambda: kill_one(b"ray::ShardActor"), at="tokenizing")
    report = ghoststore.tokenize(out=tmp_path / "shards", **given, engine="ray", workers=2, progress=listener)
    assert listener.strike is None
    assert report.workers == 2
    assert lab.tree(tmp_path / "shards") == lab.tree(tmp_path / "alone")

    question = {"store": built, "val_set": lab.corpus, "device": "cpu", "halves": 4, "max_steps": 2, "methods": ["dot"]}
    alone = ghoststore.evaluate(out=tmp_path / "one", workers=1, **question)
    listener = Striking(lambda: kill_one(b"ray::TrainingActor"), at="training")
    by_ray = ghoststore.evaluate(out=tmp_path / "ray", engine="ray", progress=listener, **question)
    assert listener.strike is None
    assert lab.tree(tmp_path / "ray") == lab.tree(tmp_path / "one")
    assert by_ray.to_json()["lds"] == alone.to_json()["lds"]
