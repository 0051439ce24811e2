"""Builds into object storage: the same bytes as on a disk, whatever is killed, lost, or at work beside."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.errors import BusyError, StorageError
from ghoststore.processes import this_process
from ghoststore.store import Store
from ghoststore.store.base.disk import create_whole
from ghoststore.store.base.object_path import location
from ghoststore.store.base.objects import objects_of
from ghoststore.store.spans.commits import read_commit
from ghoststore.store.spans.writer import SpanData, write_span
from tests.support.made_parts import clustered, make_part
from tests.support.object_server import Request, first
from tests.support.zarr_failures import half_written

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

MOMENTS = random.Random(17).sample(range(1, 181), 20)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer is given up after the repetitions of the library; ours are those of lost answers below."""
    monkeypatch.setattr("ghoststore.store.base.objects.PAUSES", ())


def resumes(bucket: Bucket, name: str) -> None:
    """The next build ends, and everything is as if nothing had happened; at most staged objects are left beside."""
    outcome = bucket.build(name)
    assert outcome.code == 0, outcome.err
    found = bucket.tree(name)
    left = sorted(found.keys() - bucket.whole.keys())
    assert all(key.startswith("parts/part/commits/.0") and key.endswith(".tmp") for key in left), left
    assert {key: found[key] for key in bucket.whole} == bucket.whole
    assert ghoststore.verify(f"s3://bucket/{name}").sound


def test_a_build_makes_the_bytes_of_a_local_one(bucket: Bucket) -> None:
    assert bucket.build("plain").code == 0
    assert bucket.tree("plain") == bucket.whole
    again = bucket.lab.build("s3://bucket/plain", "--json")  # type: ignore[arg-type]
    assert again.json["resumed_rows"] == len(bucket.lab.rows)


@pytest.mark.thin(3)
@pytest.mark.kill
@pytest.mark.parametrize(("number", "after"), [(9, False), (47, True), (80, False), (110, True)])
def test_a_killed_build_goes_on(bucket: Bucket, number: int, after: bool) -> None:
    name = f"killed-{number}-{after}"
    assert bucket.killed(name, number, after=after) >= number
    resumes(bucket, name)


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("moment", range(20))
def test_builds_killed_at_random_moments_go_on(bucket: Bucket, moment: int) -> None:
    name = f"random-{moment}"
    bucket.killed(name, MOMENTS[moment], after=moment % 2 == 1)
    bucket.killed(name, 1 + MOMENTS[-moment] // 2, after=moment % 4 > 1)  # the next is killed as well
    resumes(bucket, name)


@pytest.mark.thin(2)
@pytest.mark.parametrize("what", ["intent", "record", "zarr.json", "staged", "copy"])
def test_lost_answers_lose_nothing(bucket: Bucket, what: str) -> None:
    """The server did what it was asked, and nobody heard: the request that is sent again finds its own bytes."""
    names = {"intent": ".intent", "record": "/00000002.json", "zarr.json": "part/zarr.json", "staged": ".tmp"}
    end = names.get(what, "vectors/c/1/0")
    bucket.server.lose = first(
        3, lambda request: request.method == "PUT" and request.path.partition("?")[0].endswith(end)
    )
    outcome = bucket.build(f"lost-{what}")
    assert outcome.code == 0, outcome.err
    assert bucket.tree(f"lost-{what}") == bucket.whole


@pytest.mark.slow
def test_connections_that_close_are_made_again(bucket: Bucket) -> None:
    number = [0]

    def seventh(_: object) -> bool:
        number[0] += 1
        return number[0] % 7 == 0

    bucket.server.refuse = seventh
    outcome = bucket.build("closing")
    assert outcome.code == 0, outcome.err
    bucket.server.reset()
    assert bucket.tree("closing") == bucket.whole


@pytest.mark.kill
def test_two_builds_at_once_lose_nothing(bucket: Bucket) -> None:
    words = ["build", "--store", "s3://bucket/two", "--checkpoint", str(bucket.lab.checkpoint), "--quiet"]
    words += ["--data", str(bucket.lab.corpus), "--span-rows", "6", "--name", "part"]
    bucket.server.delay = 0.002
    outcomes = [bucket.lab.wait(pid) for pid in [bucket.lab.start(*words) for _ in range(2)]]
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    bucket.server.reset()
    assert bucket.tree("two") == bucket.whole


def test_the_later_writer_of_other_bits_changes_nothing(bucket: Bucket) -> None:
    store = "s3://bucket/bits"
    part = make_part(store, clustered(), spans=[0])  # type: ignore[arg-type]
    other = make_part(bucket.lab.folder / "bits", clustered(seed=1))
    before, record = bucket.tree("bits"), read_commit(part.path, 0)
    values = {spec.name: other.read(spec.name, *part.layout.span_of(0)) for spec in part.layout.arrays()}
    with pytest.raises(BusyError, match="with other content"):
        write_span(part, SpanData(0, values))
    assert bucket.tree("bits") == before
    assert read_commit(part.path, 0) == record


def test_a_decided_span_is_finished_by_the_next_writer(bucket: Bucket, impatient: None) -> None:
    """A writer that ends between its intent and its record: what it decided is what the record says."""
    store = "s3://bucket/decided"
    part = make_part(store, clustered(), spans=[])  # type: ignore[arg-type]
    other = make_part(bucket.lab.folder / "decided", clustered(seed=1))
    ours = make_part(bucket.lab.folder / "decided-0", clustered())
    values = {spec.name: ours.read(spec.name, *part.layout.span_of(0)) for spec in part.layout.arrays()}
    others = {spec.name: other.read(spec.name, *part.layout.span_of(0)) for spec in part.layout.arrays()}
    bucket.server.refuse = lambda request: request.path.endswith("commits/00000000.json") and request.writes
    with pytest.raises(StorageError, match="did not answer"):
        write_span(part, SpanData(0, values))
    bucket.server.reset()
    with pytest.raises(BusyError, match="with other content"):
        write_span(part, SpanData(0, others))
    assert read_commit(part.path, 0) == read_commit(ours.path, 0)
    found = bucket.tree("decided")
    assert all(found[f"parts/part/{key}"] == (ours.path / key).read_bytes() for key in part.layout.span_keys(0))
    assert not [key for key in found if "/commits/." in key]


def test_other_content_under_the_name_is_refused(bucket: Bucket, impatient: None) -> None:
    """Of two builds of one name that differ, the first to say what it makes makes it."""
    bucket.server.refuse = lambda request: request.path.endswith("parts/part/zarr.json") and request.writes
    with pytest.raises(StorageError):
        make_part("s3://bucket/names", clustered())  # type: ignore[arg-type]
    bucket.server.reset()
    assert Store.open("s3://bucket/names").part_names() == []
    with pytest.raises(BusyError, match="ghoststore rm"):
        make_part("s3://bucket/names", clustered(dimension=48))  # type: ignore[arg-type]
    ghoststore.remove("s3://bucket/names", part="part")
    make_part("s3://bucket/names", clustered(dimension=48))  # type: ignore[arg-type]
    assert ghoststore.verify("s3://bucket/names").sound


def test_conditional_puts_are_enforced_by_the_server(bucket: Bucket) -> None:
    objects = objects_of("s3", "bucket")
    assert objects.create("conditional", b"1")
    assert objects.create("conditional", b"1")  # its own bytes: a repeated request
    assert not objects.create("conditional", b"2")
    found, pieces = objects.get("conditional")
    assert (found.size, b"".join(map(bytes, pieces))) == (1, b"1")


def test_a_store_that_ignores_conditions_is_refused_before_work(bucket: Bucket) -> None:
    bucket.server.ignore_conditions = True
    outcome = bucket.build("unconditional")
    assert outcome.code == 6
    assert "conditional put" in outcome.err
    bucket.server.reset()
    assert bucket.tree("unconditional") == {}


def test_several_requests_are_under_way(bucket: Bucket) -> None:
    bucket.server.delay = 0.02
    make_part("s3://bucket/several", clustered(), spans=[0])  # type: ignore[arg-type]
    assert bucket.server.most_at_once > 4


def test_an_object_is_made_where_another_was_removed_meanwhile(bucket: Bucket) -> None:
    """As two workers do with the claim of one that died: it was an error that nobody could follow."""
    objects = objects_of("s3", "bucket")
    objects.put("claimed", b"another's")

    def removed(request: Request) -> None:
        if request.method == "GET" and request.path.endswith("/claimed"):
            bucket.server.seen = None
            objects.delete(["claimed"])

    bucket.server.seen = removed
    assert objects.create("claimed", b"ours")
    assert bytes(next(iter(objects.get("claimed")[1]))) == b"ours"


def test_workers(bucket: Bucket) -> None:
    """One begins the part, and learns; what a worker that died had claimed is free."""
    part = location("s3://bucket/workers/parts/part")
    claim = part.with_name(".part.begin.tmp")
    ended = {**this_process(), "pid": 2**22 + 1}  # beyond the largest id of a process
    claim.write_bytes(json.dumps(ended).encode())
    words = ["build", "--store", "s3://bucket/workers", "--checkpoint", bucket.lab.checkpoint, "--json", "--quiet"]
    words += ["--data", bucket.lab.corpus, "--span-rows", "6", "--name", "part", "--worker"]
    outcomes = [bucket.lab.wait(pid) for pid in [bucket.lab.start(*words, f"{number}/2") for number in (1, 2)]]
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert sum(outcome.json["seconds"]["learning"] > 0 for outcome in outcomes) == 1
    assert bucket.tree("workers") == bucket.whole


def test_a_store_is_made_while_another_process_looks_whether_it_can_be_written(bucket: Bucket) -> None:
    """An object that is gone a moment later is no store of anybody, and no error."""
    objects = objects_of("s3", "bucket")

    def vanish(request: Request) -> None:
        if request.method == "GET" and "prefix=vanishing" in request.path and "delimiter" in request.path:
            bucket.server.seen = None
            objects.delete(["vanishing/parts/.writable.host-1-00000000.0.tmp"])
            bucket.server.seen = vanish

    objects.put("vanishing/parts/.writable.host-1-00000000.0.tmp", b"1")
    bucket.server.seen = vanish
    assert Store.create("s3://bucket/vanishing").part_names() == []


def test_nothing_is_left_here_of_what_cannot_be_filled(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, _, written = half_written(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StorageError, match="Input/output error"):
        create_whole(location("s3://bucket/unfilled"), fill)
    assert written.wait(60)
    assert list(tmp_path.iterdir()) == []
    assert bucket.tree("unfilled") == {}
