"""Reading a store in object storage: the answers of a local one, damage named, and a failing network is no damage."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import CorruptError, StorageError, UsageError
from ghoststore.store import Store
from ghoststore.store.base.object_path import NoFileError, ObjectPath, local_cache, location
from ghoststore.store.base.objects import objects_of
from query.ann.rows import ROW, CheckedRows, digest_of
from tests.support.made_parts import clustered, make_part
from tests.support.object_server import KEY, SECRET, Request, first

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket


def local_copy(bucket: Bucket, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bucket.lab.folder / "whole", tmp_path / "whole"))


def made(bucket: Bucket, name: str, **options: Any) -> str:
    make_part(Path(f"s3:/bucket/{name}"), clustered(), **options)
    bucket.server.reset()
    return f"s3://bucket/{name}"


def test_info_and_query_are_those_of_a_local_store(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    local = local_copy(bucket, tmp_path)
    assert ghoststore.info(remote).to_json()["parts"] == ghoststore.info(local).to_json()["parts"]
    val = bucket.lab.write(tmp_path / "val.jsonl", bucket.lab.sample_rows(5, seed=9))
    for options in ({}, {"each": True}, {"metric": "dot"}, {"where": "n_tokens > 3"}):
        asked = {"val_set": val, "checkpoint": bucket.lab.checkpoint, **options}
        assert (
            ghoststore.query(store=remote, **asked).to_json()["results"]
            == (ghoststore.query(store=local, **asked).to_json()["results"])
        )


@pytest.mark.slow
def test_nothing_is_written_where_a_query_reads(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    before = bucket.tree("remote")
    val = bucket.lab.write(tmp_path / "val.jsonl", bucket.lab.sample_rows(5, seed=9))
    bucket.server.reset()
    asked = {"val_set": val, "checkpoint": bucket.lab.checkpoint, "precondition": "second-moment", "damping": 1.0}
    first_time, second = (ghoststore.query(store=remote, **asked).to_json()["results"] for _ in range(2))
    assert first_time == second
    assert not set(bucket.server.requests) - {"GET", "HEAD"}
    assert list((local_cache(location(f"{remote}/parts/part")) / "second_moment").glob("*.json"))  # type: ignore[arg-type]
    assert bucket.tree("remote") == before


def test_every_array_reads_as_locally(bucket: Bucket, remote: str) -> None:
    there, here = Store.open(remote).part(), Store.open(bucket.lab.folder / "whole").part()
    for spec in here.layout.arrays():
        np.testing.assert_array_equal(there.read(spec.name, 2, 17), here.read(spec.name, 2, 17))
        np.testing.assert_array_equal(there.read_rows(spec.name, [20, 3, 3]), here.read_rows(spec.name, [20, 3, 3]))


@pytest.mark.thin(2)
@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "record"])
def test_damage_is_named(bucket: Bucket, harm: str) -> None:
    store = made(bucket, f"damage-{harm}")
    objects, key = objects_of("s3", "bucket"), f"damage-{harm}/parts/part/vectors/c/3/0"
    data = bytearray(bucket.tree(f"damage-{harm}")["parts/part/vectors/c/3/0"])
    if harm == "record":
        objects.delete([f"damage-{harm}/parts/part/commits/00000001.json"])
    elif harm == "missing":
        objects.delete([key])
    else:
        data[5] ^= 1
        objects.put(key, bytes(data if harm == "flip" else data[:-9]))
    report = ghoststore.verify(store)
    name = "commits/00000001.json" if harm == "record" else "vectors/c/3/0"
    assert [damage.file for damage in report.damage] == [name]
    with pytest.raises(CorruptError, match=name if harm != "flip" else "vectors, 75 to 80"):
        Store.open(store).part().read("vectors", 75, 80)


def test_answers_that_break_off_are_continued(bucket: Bucket, remote: str) -> None:
    here = Store.open(bucket.lab.folder / "whole").part()
    there = Store.open(remote).part()
    bucket.server.cut = first(5, lambda request: "/vectors/c/" in request.path)
    np.testing.assert_array_equal(there.column("vectors"), here.column("vectors"))
    np.testing.assert_array_equal(there.column("loss"), here.column("loss"))


def test_a_network_that_fails_is_no_damage(bucket: Bucket, remote: str) -> None:
    bucket.server.refuse = lambda request: "/vectors/c/" in request.path
    outcome = bucket.lab.run("verify", "--store", remote)
    assert outcome.code == 6, outcome.err
    assert "cannot read s3://bucket/remote/parts/part/vectors/c/" in outcome.err
    assert "damage" not in outcome.out
    for secret in (SECRET, KEY, bucket.server.address):
        assert secret not in outcome.err + outcome.out


def test_credentials_are_written_nowhere(bucket: Bucket, remote: str) -> None:
    for name, data in bucket.tree("remote").items():
        assert SECRET.encode() not in data, name
        assert KEY.encode() not in data, name
        assert bucket.server.address.encode() not in data, name


@pytest.mark.parametrize(
    "address",
    [
        "http://host/x",
        "hdfs://x/y",
        "s3://",
        "s3:///key",
        "s3://bucket/a/../b",
        "s3://key:word@bucket/x",
        "S3://key:word@bucket/x",
        "https://key:word@bucket/x",
        "gs://b/x?sig=1",
        "s3:bucket/key",
        "s3://bucket/a\tb",
        "s3://bucket/a\nb",
    ],
)
def test_other_addresses_are_refused(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"s3://|gs://") as refused:
        ghoststore.info(address)
    assert "word" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_does_not_exist(bucket: Bucket) -> None:
    with pytest.raises(UsageError, match="no bucket s3://nothing"):
        ghoststore.info("s3://nothing/store")
    with pytest.raises(UsageError, match="there is no store at s3://bucket/nowhere"):
        ghoststore.info("s3://bucket/nowhere")


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'ghoststore\[object\]'"):
        ghoststore.info("s3://another-bucket/store")


def test_functions_of_the_system_refuse_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was not made for objects ends, and makes no local folder called ``s3:``."""
    monkeypatch.chdir(tmp_path)
    path = location("s3://bucket/store") / "file"
    assert isinstance(path, ObjectPath)
    assert str(path) == "s3://bucket/store/file"
    assert str(path.parent.parent) == "s3://bucket"
    for use in (
        lambda: Path.open(path, "wb"),
        lambda: path.touch(),
        lambda: os.listdir(path),
        lambda: os.path.exists(path),
        lambda: shutil.rmtree(path),
    ):
        with pytest.raises(NoFileError, match="object storage"):
            use()
    assert not list(tmp_path.iterdir())


def test_copies_go_both_ways(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    report = ghoststore.copy(remote, part="part", to_store=here)
    assert report.complete
    assert bucket.lab.tree(here) == bucket.whole
    ghoststore.copy(here, part="part", to_store="s3://bucket/back")
    assert bucket.tree("back") == bucket.whole
    ghoststore.copy("s3://bucket/back", part="part", to_name="twin")
    assert ghoststore.info("s3://bucket/back", part="twin").parts[0].complete
    with pytest.raises(UsageError, match="already"):
        ghoststore.copy(here, part="part", to_store="s3://bucket/back")
    ghoststore.remove("s3://bucket/back", part="part")
    assert Store.open("s3://bucket/back").part_names() == ["twin"]
    assert not [name for name in bucket.tree("back") if name.startswith("parts/part/")]


def test_a_removal_that_is_cut_short_is_no_damage(bucket: Bucket, remote: str) -> None:
    """The part is gone with its first object; the same command removes the rest."""
    store = "s3://bucket/going"
    ghoststore.copy(remote, part="part", to_store=store)
    before = bucket.tree("going")
    removed: list[Request] = []

    def later(request: Request) -> bool:
        removed.extend([request] * (request.method == "POST"))
        return request.method == "POST" and len(removed) > 1

    bucket.server.refuse = later
    with pytest.raises(StorageError, match="cannot remove"):
        ghoststore.remove(store, part="part")
    bucket.server.reset()
    assert len(bucket.tree("going")) == len(before)  # without its zarr.json, with an intent
    assert Store.open(store).part_names() == []
    assert ghoststore.verify(store).damage == []
    ghoststore.remove(store, part="part")
    assert not [name for name in bucket.tree("going") if name.startswith("parts/part/")]


def test_a_damaged_file_is_not_copied(bucket: Bucket, tmp_path: Path) -> None:
    make_part(tmp_path / "store", clustered())
    file = tmp_path / "store/parts/part/vectors/c/3/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="vectors/c/3/0"):
        ghoststore.copy(tmp_path / "store", part="part", to_store="s3://bucket/damaged-copy")
    assert Store.open("s3://bucket/damaged-copy").part_names() == []


def test_a_run_is_read_where_it_was_copied(bucket: Bucket, run_store: Path) -> None:
    ghoststore.copy(run_store, run="run", to_store="s3://bucket/runs")
    here, there = Store.open(run_store).run(), Store.open("s3://bucket/runs").run()
    np.testing.assert_array_equal(there.read("score", 0, here.length), here.read("score", 0, here.length))
    assert ghoststore.info("s3://bucket/runs").to_json()["runs"] == ghoststore.info(run_store).to_json()["runs"]
    assert ghoststore.verify("s3://bucket/runs").sound


def test_what_is_not_done_there_is_refused_by_name(remote: str) -> None:
    with pytest.raises(UsageError, match="renaming is not done in object storage"):
        ghoststore.rename(remote, part="part", to_name="other")
    with pytest.raises(UsageError, match="repairing is not done in object storage"):
        ghoststore.repair(remote)


@pytest.mark.slow
def test_an_index_is_kept_on_this_machine(bucket: Bucket, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    store = made(bucket, "indexed")
    make_part(tmp_path / "store", clustered())
    report = ghoststore.index(store=store)
    assert (
        report.manifest.to_json()["recall"] == ghoststore.index(store=tmp_path / "store").manifest.to_json()["recall"]
    )
    assert not bucket.server.requests["PUT"]
    assert [index["state"] for index in ghoststore.info(store).parts[0].indexes] == ["current"]
    (file,) = (local_cache(location(f"{store}/parts/part")) / "index").glob("*/*.faiss")  # type: ignore[arg-type]
    file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    assert [index["state"] for index in ghoststore.info(store).parts[0].indexes] == ["damaged"]


@pytest.mark.slow
def test_gc_removes_what_a_dead_writer_staged(bucket: Bucket) -> None:
    name = "collected"
    assert bucket.killed(name, 35) >= 35
    assert bucket.build(name).code == 0
    if bucket.tree(name).keys() == bucket.whole.keys():
        pytest.fail("the kill left nothing: choose another moment")
    ghoststore.gc(f"s3://bucket/{name}")
    assert bucket.tree(name) == bucket.whole


def test_requests_of_a_query_do_not_wait_for_each_other(bucket: Bucket) -> None:
    store = made(bucket, "side-by-side")
    part = Store.open(store).part()
    bucket.server.reset()
    bucket.server.delay = 0.1
    part.column("norm")
    assert bucket.server.most_at_once >= 8 == bucket.server.requests["GET"]


def test_an_error_names_what_the_server_said(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ALLOW_HTTP", "false")
    objects_of.cache_clear()
    try:
        with pytest.raises(StorageError, match="AWS_ALLOW_HTTP=true"):
            ghoststore.info("s3://bucket/remote")
    finally:
        objects_of.cache_clear()


def test_a_selection_and_a_table_are_those_of_a_local_store(bucket: Bucket, remote: str, tmp_path: Path) -> None:
    val = bucket.lab.write(tmp_path / "val.jsonl", bucket.lab.sample_rows(5, seed=9))
    written = []
    for store in (remote, local_copy(bucket, tmp_path)):
        out = tmp_path / f"chosen-{len(written)}.jsonl"
        asked = {"val_set": val, "checkpoint": bucket.lab.checkpoint, "data": bucket.lab.corpus, "fraction": 0.3}
        ghoststore.select(store=store, out=out, **asked)
        table = tmp_path / f"table-{len(written)}.parquet"
        ghoststore.export(store=store, part="part", out=table)
        written.append((out.read_bytes(), table.read_bytes()))
    assert written[0] == written[1]


def test_plain_zarr_reads_it(bucket: Bucket, remote: str) -> None:
    import obstore.store
    import zarr
    from zarr.storage import ObjectStore

    store = obstore.store.from_url(remote, client_options={"allow_http": True})
    array = zarr.open(ObjectStore(store, read_only=True), mode="r")["parts/part/vectors"]
    np.testing.assert_array_equal(array[:9], Store.open(bucket.lab.folder / "whole").part().read("vectors", 0, 9))


def test_a_run_that_is_not_at_its_end_is_not_copied(bucket: Bucket, half: Path) -> None:
    with pytest.raises(UsageError, match="copy it when the training has ended"):
        ghoststore.copy(half, run="run", to_store="s3://bucket/half")
    assert Store.open("s3://bucket/half").run_names() == []


def test_an_index_asks_for_the_rows_that_it_ranks_again(bucket: Bucket, tmp_path: Path) -> None:
    store = made(bucket, "ranked")
    here = make_part(tmp_path / "store", clustered())
    there = Store.open(store).part()
    rows = [3, 3, 77, 399, 210]
    table = np.zeros(len(rows), dtype=ROW)
    table["row"], table["digest"] = rows, [digest_of(here.read("vectors", row, row + 1)[0]) for row in rows]
    bucket.server.reset()
    read = CheckedRows(there, table).read(range(len(rows)))
    assert bucket.server.requests == {"GET": len(rows)}
    assert bucket.server.received == len(rows) * 4 * here.layout.dimension
    np.testing.assert_array_equal(read.numpy(), CheckedRows(here, table).read(range(len(rows))).numpy())
    bucket.server.cut = first(2, lambda request: "/vectors/" in request.path)
    np.testing.assert_array_equal(read.numpy(), CheckedRows(there, table).read(range(len(rows))).numpy())
    with pytest.raises(UsageError, match="leave `store` out"):
        ghoststore.doctor(checkpoint=bucket.lab.checkpoint, store="s3://bucket/trained")
