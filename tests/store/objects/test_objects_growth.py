"""Parts like others, unions and Ray in object storage: the bytes and the answers of a local store."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.support.object_server import KEY, SECRET

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

SPAN = 8
CUT = 16
STORE = "s3://bucket/grown"


LEARNED_LATER = {"index", "second_moment"}
"""Folders of a part for what other tests ask for."""


@pytest.fixture(scope="module")
def grown(bucket_of_session: Bucket) -> Path:
    """A local store whose ``first`` and ``second`` have the rows of one corpus; :data:`STORE` has the same."""
    lab = bucket_of_session.lab
    folder = lab.folder / "grown"
    folder.mkdir()
    rows = [dict(row) | {"source": f"s{place % 3}"} for place, row in enumerate(lab.sample_rows(30, 1))]
    lab.write(folder / "val.jsonl", lab.sample_rows(4, 3))
    lab.write(folder / "first.jsonl", rows[:CUT])
    lab.write(folder / "second.jsonl", rows[CUT:])
    return folder


def build_first(bucket: Bucket, store: Path | str, folder: Path) -> None:
    ghoststore.build(
        checkpoint=bucket.lab.checkpoint,
        data=folder / "first.jsonl",
        store=store,
        name="first",
        span_rows=SPAN,
        projection=ghoststore.ProjectionConfig(compress=512, calibration_samples=10),
        proj_dtype="int8",
        keep_fields=("source",),
        device="cpu",
    )


def build_second(store: Path | str, folder: Path, **settings: Any) -> None:
    ghoststore.build(like="first", data=folder / "second.jsonl", store=store, name="second", device="cpu", **settings)


@pytest.fixture
def both(bucket: Bucket, grown: Path) -> tuple[Path, str]:
    """(the local store, its address in the bucket): made once."""
    local = grown / "store"
    if not local.exists():
        for store in (local, STORE):
            build_first(bucket, store, grown)
            build_second(store, grown)
    bucket.server.reset()
    return local, STORE


def ask(folder: Path, store: Path | str, **settings: Any) -> Any:
    settings = {"top_k": 9, "bottom_k": 4, "part": ("first", "second"), "device": "cpu"} | settings
    return ghoststore.query(store=store, val_set=folder / "val.jsonl", **settings).to_json()["results"]


def test_a_part_like_another_has_the_bytes_of_a_local_one(bucket: Bucket, both: tuple[Path, str]) -> None:
    assert bucket.tree("grown") == bucket.lab.tree(both[0])


@pytest.mark.slow
def test_answers_of_a_union_are_those_of_a_local_one(bucket: Bucket, grown: Path, both: tuple[Path, str]) -> None:
    local, remote = both
    for settings in (
        {},
        {"metric": "dot", "each": True},
        {"where": "source = 's1'"},
        {"precondition": "second-moment"},
        {"lexical": 0.3},
        {"rerank": 12, "top_k": 5, "bottom_k": 0},
    ):
        assert ask(grown, remote, **settings) == ask(grown, local, **settings), settings
    out = []
    for number, store in enumerate(both):
        out.append(grown / f"chosen-{number}.jsonl")
        ghoststore.select(
            store=store, part=("first", "second"), val_set=grown / "val.jsonl", out=out[-1], count=7, device="cpu"
        )
    assert out[0].read_bytes() == out[1].read_bytes()


def test_a_union_reads_each_chunk_once(bucket: Bucket, grown: Path, both: tuple[Path, str]) -> None:
    """What is read ahead is what is scanned, and nothing that is not there."""
    ask(grown, both[1])
    keys = Counter(line.partition("/bucket/grown/")[2] for line in bucket.server.log if "/vectors/c/" in line)
    present = {key for key in bucket.tree("grown") if "/vectors/c/" in key}
    assert set(keys) == present
    assert set(keys.values()) == {1}


def test_an_index_over_a_union(bucket: Bucket, grown: Path, both: tuple[Path, str]) -> None:
    pytest.importorskip("faiss")
    local, remote = both
    before = bucket.tree("grown")
    for store in both:
        ghoststore.index(store=store, part=("first", "second"))
    assert bucket.tree("grown") == before
    assert ask(grown, remote, index="ann") == ask(grown, local, index="ann") == ask(grown, local)


@pytest.mark.slow
@pytest.mark.ddp
def test_by_a_ray_cluster(bucket: Bucket, grown: Path, both: tuple[Path, str], tmp_path: Path) -> None:
    """Built and searched by actors, in a bucket and on the disk; those of a session ask for no vector again."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    try:
        for store, tree in (
            (tmp_path / "store", lambda: bucket.lab.tree(tmp_path / "store")),
            ("s3://bucket/by-ray", lambda: bucket.tree("by-ray")),
        ):
            build_first(bucket, store, grown)
            build_second(store, grown, engine="ray", workers=2)
            local = {
                name: x for name, x in bucket.lab.tree(both[0]).items() if not set(name.split("/")) & LEARNED_LATER
            }
            assert tree() == local
        whole, first = ask(grown, both[0]), ask(grown, both[0], part="first", each=True)
        assert ask(grown, both[1], engine="ray") == whole
        with ghoststore.open(both[1], part="first", device="cpu", engine="ray") as session:
            settings = {"top_k": 9, "bottom_k": 4, "each": True}
            counts = []
            while len(counts) < 10 and (not counts or counts[-1]):  # an actor that is there late begins with nothing
                bucket.server.reset()
                assert session.query(grown / "val.jsonl", **settings).to_json()["results"] == first
                counts.append(sum("/vectors/c/" in line for line in bucket.server.log))
            assert counts[0] > 0
            assert counts[-1] == 0
        logs = Path(ray._private.worker._global_node.get_session_dir_path())
    finally:
        ray.shutdown()
    for file in (path for path in logs.rglob("*") if path.is_file()):
        for secret in (SECRET, KEY):
            assert secret.encode() not in file.read_bytes(), file
