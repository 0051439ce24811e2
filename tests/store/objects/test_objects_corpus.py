"""Corpora in object storage: the rows of the same files on a disk, read by ranges. A failing network is no damage."""

from __future__ import annotations

import csv
import gzip
import http.client
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from ghoststore.corpus import Corpus, Fields, Position, absolute
from ghoststore.corpus.formats.megatron import MegatronForm
from ghoststore.corpus.source_rows import SourceRows
from ghoststore.errors import CorpusError, MismatchError, StorageError, UsageError
from ghoststore.store.base import object_ranges
from ghoststore.store.base.object_path import ObjectPath, location
from ghoststore.store.base.object_ranges import AHEAD, LARGEST, SMALLEST, RangedFile
from ghoststore.store.base.objects import Objects
from tests.support.object_server import KEY, SECRET, Request, first

if TYPE_CHECKING:
    from tests.store.objects.conftest import Bucket

ROWS = 2500
TREE = "s3://bucket/corpora"


@dataclass
class Corpora:
    """One corpus in many forms, in ``folder`` and, with the same names, in :data:`TREE`."""

    folder: Path
    files: dict[str, bytes]

    def here(self, name: str, **fields: Any) -> Corpus:
        return Corpus.open(str(self.folder / name), Fields(**fields))

    def there(self, name: str, **fields: Any) -> Corpus:
        return Corpus.open(f"{TREE}/{name}", Fields(**fields))


def put(name: str, data: bytes) -> None:
    location(f"{TREE}/{name}").write_bytes(data)


def made_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"r{number}", "text": f"{number} é " + rng.bytes(int(rng.integers(9, 500))).hex() + "\n word"}
        for number in range(ROWS)
    ]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    whole = b"".join(lines)
    cells = io.StringIO()
    table = csv.DictWriter(cells, ["id", "text"])
    table.writeheader()
    table.writerows(rows)
    columns = pyarrow.table({name: [row[name] for row in rows] for name in ("id", "text")})
    parquet, stream, feather, coded = (io.BytesIO() for _ in range(4))
    pyarrow.parquet.write_table(columns, parquet, row_group_size=600)
    with pyarrow.ipc.new_stream(stream, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=400)
    pyarrow.feather.write_feather(columns, feather, compression="zstd", chunksize=500)
    named = columns.append_column("domain", pyarrow.array([f"d{n % 3}" for n in range(ROWS)]).dictionary_encode())
    with pyarrow.ipc.new_stream(coded, named.schema) as writer:
        writer.write_table(named, max_chunksize=400)
    lengths = rng.integers(2, 40, 300).astype("<i4")
    index = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08"
    index += np.array([300, 301], "<u8").tobytes() + lengths.tobytes()
    index += (2 * (np.cumsum(lengths, dtype="<i8") - lengths)).astype("<i8").tobytes()
    index += np.arange(301, dtype="<i8").tobytes()
    return {
        "all.jsonl": whole,
        "all.jsonl.gz": gzip.compress(whole),
        "all.jsonl.zst": zstandard.ZstdCompressor().compress(whole),
        "all.json": json.dumps(rows).encode(),
        "keyed.json": json.dumps({"version": 1, "rows": rows[:40]}).encode(),
        "all.csv": cells.getvalue().encode(),
        "all.parquet": parquet.getvalue(),
        "all.arrow": stream.getvalue(),
        "all.feather": feather.getvalue(),
        "coded.arrow": coded.getvalue(),
        "wide.txt": "zwölf\nBoxkämpfer\n".encode("utf-16"),
        "ids.bin": (np.arange(9000) % 500).astype("<u2").tobytes(),
        "megatron/docs.bin": rng.integers(0, 500, int(lengths.sum())).astype("<u2").tobytes(),
        "megatron/docs.idx": index,
        "folder/b-1.jsonl": b"".join(lines[1000:1700]),
        "folder/a.jsonl": b"".join(lines[:1000]),
        "folder/b.jsonl": b"".join(lines[1700:]),
        "folder/notes.md": b"not data",
        "folder/deep/c.jsonl": b"".join(lines[:9]),
        "folder/.hidden/d.jsonl": b"".join(lines[:9]),
        "folder/.e.jsonl": b"".join(lines[:9]),
    }


@pytest.fixture(scope="module")
def corpora(bucket_of_session: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    folder = tmp_path_factory.mktemp("corpora")
    with bucket_of_session.used_here():
        files = made_files()
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            put(name, data)
        marker = http.client.HTTPConnection("127.0.0.1", bucket_of_session.server.port)
        marker.request("PUT", "/bucket/corpora/folder/", b"")  # as the consoles of providers make a folder
        assert marker.getresponse().status == 200
        marker.close()
    return Corpora(folder, files)


Ranges: TypeAlias = list[tuple[int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """(first byte, end) of each request that reads, as they are made: the server counts an answer when it was sent."""
    ranges: Ranges = []
    get = Objects.get

    def seen(self: Objects, key: str, start: int = 0, stop: int | None = None) -> Any:
        assert stop is not None
        ranges.append((start, stop))
        return get(self, key, start, stop)

    monkeypatch.setattr(Objects, "get", seen)
    return ranges


def places_of(corpus: Corpus) -> list[tuple[int, int, int, int]]:
    return [(sample.source_row, sample.file, sample.offset, sample.digest()) for sample in corpus.samples()]


SOURCES: dict[str, dict[str, Any]] = {
    "all.jsonl": {},
    "all.jsonl.gz": {},
    "all.jsonl.zst": {},
    "all.json": {},
    "keyed.json:rows": {},
    "all.csv": {},
    "all.parquet": {},
    "all.arrow": {},
    "all.feather": {},
    "coded.arrow": {},
    "wide.txt": {},
    "ids.bin": {"ids_window": 64},
    "megatron/docs.bin": {},
    "megatron/docs.idx": {},
    "folder": {},
    "folder/*.jsonl": {},
    "folder/[!a]*.jsonl": {},
    "*/b*.jsonl": {},
    "folder/**/*.jsonl": {},
    "**/?.jsonl": {},
}


@pytest.mark.thin(6)
@pytest.mark.parametrize("source", [name for name in SOURCES if "?" not in name])
def test_rows_are_those_of_the_files_on_a_disk(bucket: Bucket, corpora: Corpora, source: str) -> None:
    here, there = (opened(source, **SOURCES[source]) for opened in (corpora.here, corpora.there))
    expected = places_of(here)
    assert places_of(there) == expected
    assert there.form == here.form
    names = [str(file.relative_to(corpora.folder)) for file in here.files]
    assert [str(file) for file in there.files] == [f"{TREE}/{name}" for name in names]
    assert there.recorded == f"{TREE}/{source}" == absolute(f"s3:/bucket/corpora/{source}")
    chosen = [expected[place] for place in sorted({0, 7 % len(expected), len(expected) // 2, len(expected) - 1})]
    at = [Position(source_row=row, file=file, offset=offset) for row, file, offset, _ in chosen]
    fetched = there.fetch(at)
    assert {row: sample.digest() for row, sample in fetched.items()} == {row: digest for row, _, _, digest in chosen}
    begin = expected[min(3, len(expected) - 1)]
    later = there.samples(Position(source_row=begin[0], file=begin[1], offset=begin[2]))
    assert [sample.digest() for sample in later] == [digest for *_, digest in expected[begin[0] :]]
    assert not set(bucket.server.requests) - {"GET", "HEAD"}


def test_several_sources_and_paths(corpora: Corpora) -> None:
    names = ("folder/b.jsonl", "folder/a.jsonl")
    here = Corpus.open([corpora.folder / name for name in names])
    for given in ([Path(f"{TREE}/{name}") for name in names], [location(f"{TREE}/{name}") for name in names]):
        there = Corpus.open(given)
        assert places_of(there) == places_of(here)
        assert there.recorded == "\n".join(f"{TREE}/{name}" for name in names)
    mixed = Corpus.open([corpora.folder / names[0], Path(f"{TREE}/{names[1]}")])
    assert places_of(mixed) == places_of(here)
    with pytest.raises(CorpusError, match="given twice"):
        Corpus.open([Path(f"{TREE}/{names[0]}"), Path(f"{TREE}/folder/b*.jsonl")])
    with pytest.raises(UsageError, match=r"give a list of pathlib\.Path"):
        Corpus.open([f"{TREE}/{name}" for name in names])


def test_original_rows_are_those_of_the_files_on_a_disk(corpora: Corpora) -> None:
    for source in ("folder", "all.jsonl.gz", "all.csv", "all.json", "all.parquet", "all.arrow"):
        answers = []
        for corpus in (corpora.here(source), corpora.there(source)):
            samples = [sample for sample in corpus.samples() if sample.source_row % 97 == 0]
            places = [Position(source_row=x.source_row, file=x.file, offset=x.offset) for x in samples]
            rows = SourceRows(corpus, places, [sample.digest() for sample in samples])
            lines = [] if source in ("all.parquet", "all.arrow") else [rows.header(), *rows.lines()]
            answers.append((lines, list(rows.rows())))
        assert answers[0] == answers[1]


def test_texts_of_hits_take_ranges_alone_side_by_side(bucket: Bucket, corpora: Corpora, asked: Ranges) -> None:
    size = len(corpora.files["all.jsonl"])
    places = places_of(corpora.here("all.jsonl"))
    chosen = [places[place] for place in range(100, ROWS, 200)]
    at = [Position(source_row=row, file=file, offset=offset) for row, file, offset, _ in chosen]
    corpus = corpora.there("all.jsonl")
    _ = corpus.resolved
    asked.clear()
    bucket.server.reset()
    bucket.server.delay = 0.1  # longer than it takes to send all of them
    assert len(corpus.fetch(at)) == len(chosen)
    assert bucket.server.requests == {"GET": 1 + len(chosen)}  # one for the encoding
    assert sum(stop - start for start, stop in asked) == (1 + len(chosen)) * SMALLEST < size / 2
    assert bucket.server.most_at_once >= 8


def test_a_pass_reads_each_byte_once_several_requests_at_a_time(bucket: Bucket, asked: Ranges) -> None:
    line = json.dumps({"text": "a" * 4000}).encode() + b"\n"
    data = line * (6 * LARGEST // len(line))
    put("large.jsonl", data)
    corpus = Corpus.open(f"{TREE}/large.jsonl")
    _ = corpus.resolved
    asked.clear()
    bucket.server.reset()
    bucket.server.delay = 0.02
    assert sum(1 for _ in corpus.samples()) == len(data) // len(line)
    ends = [min(stop, len(data)) for _, stop in sorted(asked)]
    assert [start for start, _ in sorted(asked)] == [0, *ends[:-1]]
    assert ends[:4] == [SMALLEST, 5 * SMALLEST, 21 * SMALLEST, 85 * SMALLEST]
    assert ends[-1] == len(data)
    assert len(ends) == 4 + -(-(len(data) - 85 * SMALLEST) // LARGEST)
    assert 2 <= bucket.server.most_at_once <= AHEAD


def test_rows_of_a_table_take_the_batches_that_hold_them(bucket: Bucket, corpora: Corpora, asked: Ranges) -> None:
    for name in ("all.parquet", "all.arrow", "all.feather"):
        corpus, size = corpora.there(name), len(corpora.files[name])
        _ = corpus.resolved
        asked.clear()
        (sample,) = corpus.fetch([Position(source_row=1700, file=0)]).values()
        assert sample.digest() == places_of(corpora.here(name))[1700][3]
        assert sum(min(stop, size) - start for start, stop in asked) < size * 0.7, name


def test_places_that_overlap_or_lie_after_long_rows(bucket: Bucket, tmp_path: Path) -> None:
    """Rows longer than a range, neighbours in one range, and rows across the end of one."""
    rng = np.random.default_rng(1)
    sizes = [5, 3 * SMALLEST, 9, 9, SMALLEST - 200, 300, 300, 5 * SMALLEST, 1, *rng.integers(1, 9000, 60).tolist()]
    data = b"".join(json.dumps({"text": f"{n} " + "x" * size}).encode() + b"\n" for n, size in enumerate(sizes))
    put("uneven.jsonl", data)
    corpus = Corpus.open(f"{TREE}/uneven.jsonl")
    expected = places_of(corpus)
    for chosen in (expected, expected[1::2], expected[::7], [expected[1], expected[7]], expected[-1:]):
        at = [Position(source_row=row, file=file, offset=offset) for row, file, offset, _ in chosen]
        fetched = corpus.fetch(at)
        assert {row: x.digest() for row, x in fetched.items()} == {row: digest for row, _, _, digest in chosen}
    beyond = [Position(source_row=900 + place, file=0, offset=len(data) + place) for place in (0, 9)]
    last = Position(source_row=expected[-1][0], file=0, offset=expected[-1][2])
    assert list(corpus.fetch([*beyond, last])) == [last.source_row]


def test_an_answer_that_breaks_off_is_continued(bucket: Bucket, corpora: Corpora) -> None:
    expected = places_of(corpora.here("all.jsonl"))
    bucket.server.cut = first(3, lambda request: request.method == "GET")
    assert places_of(corpora.there("all.jsonl")) == expected
    bucket.server.reset()
    bucket.server.refuse = first(3, lambda request: request.method == "GET")
    assert places_of(corpora.there("all.parquet")) == places_of(corpora.here("all.parquet"))


def test_a_network_that_fails_is_named_and_no_damage(bucket: Bucket, corpora: Corpora) -> None:
    corpus = corpora.there("all.jsonl")
    bucket.server.refuse = lambda request: request.method == "GET"
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/corpora/all\.jsonl") as raised:
        next(corpus.samples())
    for secret in (KEY, SECRET, "Signature"):
        assert secret not in str(raised.value)


def test_an_object_that_is_written_again_while_it_is_read(bucket: Bucket, corpora: Corpora) -> None:
    put("moving.jsonl", corpora.files["all.jsonl"])
    samples = Corpus.open(f"{TREE}/moving.jsonl").samples()
    next(samples)
    put("moving.jsonl", corpora.files["all.jsonl"].replace(b"word", b"wird"))
    with pytest.raises(MismatchError, match=r"moving\.jsonl was written again while it was read"):
        list(samples)
    assert list(Corpus.open(f"{TREE}/moving.jsonl").samples())


def test_an_object_that_becomes_shorter_is_no_failing_network(bucket: Bucket) -> None:
    """What is asked for next, or where the listing says that it is, there is nothing any more."""
    whole = bytes(range(256)) * 1024
    put("shorter.txt", whole)
    path = location(f"{TREE}/shorter.txt")
    assert isinstance(path, ObjectPath)
    with RangedFile(path) as file, RangedFile(path.looked_up()) as listed:
        assert file.read(SMALLEST) == whole[:SMALLEST]
        put("shorter.txt", b"short")
        assert listed.seek(100) == 100
        for opened in (file, listed):
            with pytest.raises(MismatchError, match=r"shorter\.txt was written again while it was read"):
                opened.read(1)


def test_all_tables_of_an_index_are_of_one_version(bucket: Bucket, corpora: Corpora) -> None:
    """Each is read by a file of its own: the lengths of one version would stand beside the documents of another."""
    index = bytearray(corpora.files["megatron/docs.idx"])
    index[34:38] = (1).to_bytes(4, "little")  # the length of the first document

    def requests(other_at: int | None) -> int:
        """How many requests read the index; another is there from one of them on."""
        for name in ("docs.bin", "docs.idx"):
            put(f"indexed/{name}", corpora.files[f"megatron/{name}"])
        asked: list[str] = []

        def seen(request: Request) -> None:
            if not request.writes and request.path.endswith("docs.idx"):
                asked.append(request.path)
                if len(asked) == other_at:
                    put("indexed/docs.idx", bytes(index))

        bucket.server.seen = seen
        list(MegatronForm().rows(location(f"{TREE}/indexed/docs.bin"), None, 0))
        return len(asked)

    count = requests(None)
    assert count >= 3
    for number in range(2, count + 1):
        with pytest.raises(MismatchError, match=r"docs\.idx was written again while it was read"):
            requests(number)


def test_reading_on_after_the_end_and_backwards(bucket: Bucket) -> None:
    put("some.txt", bytes(range(256)) * 1024)
    path = location(f"{TREE}/some.txt")
    assert isinstance(path, ObjectPath)
    whole = path.read_bytes()
    with RangedFile(path) as file:
        assert file.seek(-5, 2) == len(whole) - 5
        assert file.read() == whole[-5:]
        assert file.read(10) == b""
        assert file.seek(100) == 100
        assert file.read(SMALLEST * 2) == whole[100 : 100 + SMALLEST * 2]
        assert file.seek(0) == 0
        assert file.read(3) == whole[:3]
        assert file.seek(len(whole) + 9) == len(whole) + 9
        assert file.read(1) == b""
        for place in ((-1, 0), (-len(whole) - 1, 2), (-len(whole) - 10, 1)):
            with pytest.raises(OSError, match="Invalid argument"):
                file.seek(*place)
    put("none.txt", b"")
    for opened in (location(f"{TREE}/none.txt"), location(f"{TREE}/none.txt").looked_up()):  # type: ignore[attr-defined]
        with RangedFile(opened) as file:
            assert file.read(5) == b"" == file.read()


def test_places_that_were_not_foreseen(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another place is read while requests for what follows are under way."""
    monkeypatch.setattr(object_ranges, "LARGEST", 64 << 10)
    whole = np.random.default_rng(2).bytes(40 * (64 << 10) + 77)
    put("random.txt", whole)
    path = location(f"{TREE}/random.txt")
    assert isinstance(path, ObjectPath)
    rng = np.random.default_rng(3)
    with RangedFile(path) as file:
        for _ in range(30):
            place = int(rng.integers(0, len(whole)))
            assert file.seek(place) == place
            for count in rng.integers(1, 200_000, 3).tolist():
                assert file.read(count) == whole[place : place + count]
                place = file.tell()


def test_what_is_not_there_is_named(corpora: Corpora) -> None:
    for source, error, words in (
        (f"{TREE}/nothing.jsonl", CorpusError, r"s3://bucket/corpora/nothing\.jsonl: there is no such object"),
        (f"{TREE}/nothing-*.jsonl", CorpusError, r"nothing-\*\.jsonl: no object has such a name"),
        (f"{TREE}/folder/notes.md", CorpusError, "unsupported form '.md'"),
        ("s3://no-such-bucket/a.jsonl", UsageError, "there is no bucket s3://no-such-bucket"),
        ("s3://no-such-bucket/*.jsonl", UsageError, "there is no bucket s3://no-such-bucket"),
        ("s3://key:secret@bucket/a.jsonl", UsageError, "of the corpus cannot be used"),
        (f"{TREE}/a.jsonl?X-Amz-Signature=secret", UsageError, "without credentials"),
        (["s3://key:secret@bucket/a.jsonl"], UsageError, "of the corpus cannot be used"),
        (f"{TREE}/all.jsonl:rows", CorpusError, "a split is for"),
        (f"{TREE}/keyed.json:none", CorpusError, "expected an object with an array of rows under 'none'"),
    ):
        with pytest.raises(error, match=words) as raised:
            list(Corpus.open(source).samples())
        assert "secret" not in str(raised.value)


def test_what_a_library_maps_into_memory_is_refused_by_name(bucket: Bucket, tmp_path: Path) -> None:
    """And the advice of each refusal works."""
    import datasets

    rows = [{"text": f"{number} words", "id": str(number)} for number in range(50)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text("---\nlicense: mit\n---\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub / "data/train-0.parquet")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/shards.json").write_text("{}")
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        put(str(file.relative_to(tmp_path)), file.read_bytes())
    expected = [row["text"] for row in rows]
    for name, source, works in (
        ("saved", f"{TREE}/saved", f"{TREE}/saved/*.arrow"),
        ("splits", f"{TREE}/splits", f"{TREE}/splits/train/*.arrow"),
        ("splits", f"{TREE}/splits:train", f"{TREE}/splits/train/*.arrow"),
        ("hub", f"{TREE}/hub", f"{TREE}/hub/data/*.parquet"),
        ("hub", f"{TREE}/hub:train", f"{TREE}/hub/data/*.parquet"),
    ):
        with pytest.raises(CorpusError, match="object storage") as raised:
            Corpus.open(source)
        assert works.replace("/train/", "/SPLIT/") in str(raised.value)
        assert [sample.content for sample in Corpus.open(works).samples()] == expected, name
    with pytest.raises(CorpusError, match="copy the folder to a local disk"):
        Corpus.open(f"{TREE}/tokens")


def test_a_pattern_asks_for_its_folder_alone(bucket: Bucket, corpora: Corpora) -> None:
    bucket.server.reset()
    corpora.there("folder/*.jsonl")
    listings = [line for line in bucket.server.log if "list-type" in line]
    assert len(listings) == 1
    assert "delimiter" in listings[0]
