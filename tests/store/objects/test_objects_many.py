"""Corpora of many small files in object storage: several are asked for ahead of the one that is read."""

from __future__ import annotations

import json
import threading
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghoststore.corpus import Corpus
from ghoststore.errors import CorpusError, StorageError
from ghoststore.store.base import object_ranges
from ghoststore.store.base.object_path import location
from tests.support.object_server import Request

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

TREE = "s3://bucket/many"
FILES, ROWS = 40, 6


@pytest.fixture(scope="module")
def folder(bucket_of_session: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files on a disk; :data:`TREE` has the same. Some are empty, one is far longer than the others."""
    folder = tmp_path_factory.mktemp("many")
    with bucket_of_session.used_here():
        for number in range(FILES):
            rows = 0 if number % 13 == 12 else 900 if number == 5 else ROWS
            texts = [f"{number} {row} " + "word " * (40 * (number % 7)) for row in range(rows)]
            data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
            (folder / f"{number:03d}.jsonl").write_bytes(data)
            location(f"{TREE}/{number:03d}.jsonl").write_bytes(data)
    return folder


@pytest.fixture
def moving(bucket: Bucket, folder: Path) -> str:
    """A copy of :data:`TREE` to harm."""
    place = "s3://bucket/many-moving"
    for path in folder.iterdir():
        location(f"{place}/{path.name}").write_bytes(path.read_bytes())
    bucket.server.reset()
    return place


def texts(corpus: Corpus) -> list[tuple[int, int, int, str]]:
    return [(each.source_row, each.file, each.offset, each.texts()[0]) for each in corpus.samples()]


def gets(bucket: Bucket, name: str = "/bucket/many") -> int:
    return sum(line.startswith("GET") and name in line and "list-type" not in line for line in bucket.server.log)


def test_rows_and_order_are_those_of_a_disk(bucket: Bucket, folder: Path) -> None:
    corpus = Corpus.open(TREE)
    _ = corpus.resolved
    bucket.server.reset()
    assert texts(corpus) == texts(Corpus.open(str(folder)))
    empty = sum(not path.stat().st_size for path in folder.iterdir())
    assert bucket.server.requests["HEAD"] <= 2 * empty
    assert bucket.server.most_at_once <= object_ranges.IN_FLIGHT + object_ranges.AHEAD
    assert gets(bucket) <= FILES + 6  # one each, but for the long one; none of an empty one


@pytest.mark.parametrize(("requests", "most_bytes"), [(4, 1 << 20), (16, 12_000), (16, 1)])
def test_no_more_than_the_bound_is_under_way(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch, requests: int, most_bytes: int
) -> None:
    """Requests and bytes of the files behind the one that is read, and nothing before one of them is needed."""
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    monkeypatch.setattr(object_ranges, "IN_FLIGHT", requests)
    monkeypatch.setattr(object_ranges, "BEGINNINGS", most_bytes)
    corpus = Corpus.open(TREE)
    _ = corpus.resolved
    bucket.server.reset()
    samples = corpus.samples()
    assert len(list(islice(samples, ROWS))) == ROWS
    assert gets(bucket) == 1
    allowed, begun = _allowed(sizes[1:], requests, most_bytes), threading.Semaphore(0)
    gate = threading.Event()

    def seen(request: Request) -> None:
        begun.release()
        gate.wait(20)

    bucket.server.seen = seen
    reading = threading.Thread(target=next, args=(samples,))
    reading.start()
    for _ in range(allowed):
        assert begun.acquire(timeout=20)
    gate.set()
    reading.join(20)
    assert gets(bucket) == 1 + allowed
    samples.close()


def _allowed(sizes: list[int], requests: int, most_bytes: int) -> int:
    """Files whose beginnings are asked for, of these sizes, when the first of them is read."""
    count = total = 0
    for place, size in enumerate(sizes):
        if place and (place == requests or total + size > most_bytes):
            break
        total += size
        count += size > 0
    return count


@pytest.mark.parametrize("harm", ["no json", "gone", "a network"])
def test_what_fails_in_the_middle_is_named_at_its_place(
    bucket: Bucket, folder: Path, moving: str, harm: str, tmp_path: Path
) -> None:
    """After all rows before it, by the message that it has alone; though others behind it were asked for already."""
    corpus, whole = Corpus.open(moving), texts(Corpus.open(str(folder)))
    _ = corpus.resolved
    name = f"{moving}/020.jsonl"
    if harm == "no json":
        location(name).write_bytes(b'{"text": "one"}\n{"text": \n')
        error, words = CorpusError, rf"^{name}, line 2: "
    elif harm == "gone":
        location(name).unlink()
        error, words = CorpusError, rf"^{name}: cannot be read: "
    else:
        bucket.server.refuse = lambda request: "020.jsonl" in request.path
        error, words = StorageError, rf"^cannot read {name}: "
    found: list[str] = []
    with pytest.raises(error, match=words) as raised:
        found.extend(sample.texts()[0] for sample in corpus.samples())
    before = [text for _, file, _, text in whole if file < 20]
    assert found == before + (["one"] if harm == "no json" else [])
    with pytest.raises(error) as alone:
        list(Corpus.open(name).samples() if harm != "gone" else corpus._form.rows(corpus.files[20], None, 0))
    assert str(raised.value) == str(alone.value)


def test_pointers_of_git_lfs_are_looked_for_side_by_side(bucket: Bucket, moving: str) -> None:
    for number in (7, 20):
        location(f"{moving}/{number:03d}.jsonl").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    bucket.server.reset()
    both = threading.Barrier(2)  # each of the first two is answered when the other one is there

    def seen(request: Request) -> None:
        if request.path.endswith(("/000.jsonl", "/007.jsonl")):
            both.wait(20)

    bucket.server.seen = seen
    with pytest.raises(CorpusError, match=r"many-moving/007\.jsonl: the data are not here"):
        Corpus.open(moving)
