"""A build that reads its corpus once, in order: the vectors of an ordinary build, resumed without reading again what
was read, and an ordinary part once the end is seen.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.corpus import Corpus
from ghoststore.corpus.locate import load_from_hub, named_on_hub
from ghoststore.corpus.scan import SampleScan
from ghoststore.errors import CorpusError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import Part, Store
from ghoststore.store.part.part import span_table
from tests.conftest import sample_rows, tree, write_jsonl
from tests.support.notes import Notes
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

PLAIN = ProjectionConfig(precondition="none", rank_total=64)
SPAN = 4
ROWS = sample_rows(42, seed=3)


def build(lab: Lab, store: Path, data: Any, **settings: Any) -> ghoststore.BuildReport:
    given = {"checkpoint": lab.checkpoint, "name": "part", "span_rows": SPAN, "device": "cpu", "projection": PLAIN}
    return ghoststore.build(store=store, data=data, **(given | settings))


def part_of(store: Path) -> Part:
    return Store.open(store).part("part")


class Rows:
    """Rows that may be iterated over again, and nothing more. ``read`` has the number of every row that was read."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows, self.read = list(rows), list[int]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows):
            self.read.append(number)
            yield row


class StatefulRows(Rows):
    """Rows that say where they stand."""

    at = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> StatefulRows:
        twin = type(self)(self.rows)
        twin.at, twin.read = self.at, self.read  # what copies of it read is counted with it
        return twin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.rows):
            self.read.append(self.at)
            self.at += 1
            yield self.rows[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Broken(Rows):
    """It breaks off behind 30 rows, and says nothing of where it stands."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(super().__iter__()):
            if number == 30:
                raise Cut
            yield row


class Cut(Exception):
    """The stream breaks off."""


class Breaking:
    """``stream``, which breaks off behind ``at`` rows."""

    def __init__(self, stream: Any, at: int) -> None:
        self.stream, self.at = stream, at

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.stream):
            if number == self.at:
                raise Cut
            yield row

    def state_dict(self) -> Any:
        return self.stream.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.stream.load_state_dict(state)


def cut(lab: Lab, store: Path, stream: Any, at: int, **settings: Any) -> None:
    """A build that breaks off where ``at`` rows were read."""
    with pytest.raises(Cut):
        build(lab, store, Breaking(stream, at), **settings)


def _louder(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["text"].upper()}


def _late(row: dict[str, Any]) -> bool:
    return len(row["id"]) > 5


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, datasets.IterableDataset]:
    """Streams of `datasets`, of files on the disk."""
    folder = tmp_path_factory.mktemp("streams")
    shards = [ROWS[:15], ROWS[15:30], ROWS[30:]]
    files = [str(write_jsonl(folder / f"{place}.jsonl", shard)) for place, shard in enumerate(shards)]
    tables = []
    for place, shard in enumerate(shards):
        tables.append(str(folder / f"{place}.parquet"))
        datasets.Dataset.from_list(shard).to_parquet(tables[-1])

    def load(kind: str, data_files: list[str]) -> datasets.IterableDataset:
        return datasets.load_dataset(kind, data_files=data_files, split="train", streaming=True)

    return {
        "jsonl": load("json", files),
        "parquet": load("parquet", tables),
        "interleaved": datasets.interleave_datasets([load("json", files[:1]), load("json", files[1:])]),
        "drawn": datasets.interleave_datasets(
            [load("json", files[:2]), load("json", files[2:])], probabilities=[0.6, 0.4], seed=2
        ),
        "mapped": load("json", files)
        .map(lambda row: {"text": row["text"].upper()})
        .filter(lambda row: len(row["id"]) > 5),
        "shuffled": load("json", files).shuffle(seed=1, buffer_size=10),
    }


KINDS = ("jsonl", "parquet", "interleaved", "drawn", "mapped", "shuffled")


@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_of_an_ordinary_build(
    lab: Lab, streams: dict[str, datasets.IterableDataset], tmp_path: Path, kind: str
) -> None:
    rows = list(streams[kind])
    build(lab, tmp_path / "ordinary", rows)
    report = build(lab, tmp_path / "store", streams[kind])
    ordinary, part = part_of(tmp_path / "ordinary"), part_of(tmp_path / "store")
    assert (report.rows, report.rows_built, report.resumed_rows) == (len(rows), len(rows), 0)
    assert np.array_equal(vectors_of(part), vectors_of(ordinary))
    for name in ("sample_id", "source_row", "source_digest", "loss", "n_tokens", "status", "norm", "text"):
        same = [each.read(name, 0, len(rows)) for each in (part, ordinary)]
        assert np.array_equal(*same), name
    domains = [[each.domains[code] for code in each.column("domain")] for each in (part, ordinary)]
    assert domains[0] == domains[1]
    assert list(streams[kind]) == rows, "the stream is as it was given"
    hits = [
        ghoststore.query(store=tmp_path / store, val_set=lab.corpus, device="cpu").results[0].hits
        for store in ("store", "ordinary")
    ]
    assert hits[0] == hits[1]
    assert all(hit.text for hit in hits[0])


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_where_it_was_cut_off(
    lab: Lab, streams: dict[str, datasets.IterableDataset], tmp_path: Path, kind: str
) -> None:
    build(lab, tmp_path / "whole", streams[kind])
    # The second begins to read at row 12, that with a shuffle buffer at the first.
    for at, rows in ((19, 16), (26 if kind == "shuffled" else 14, 24)):
        cut(lab, tmp_path / "store", streams[kind], at)
        part = part_of(tmp_path / "store")
        assert (part.rows, part.complete, part.open) == (rows, False, True)
    notes = Notes()
    report = build(lab, tmp_path / "store", streams[kind], progress=notes)
    assert (report.resumed_rows, report.rows_built) == (24, report.rows - 24)
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
    # What `datasets` says of a shuffle buffer does not lead back to the rows that came before.
    assert any("read again" in note for note in notes.said) == (kind == "shuffled")


def test_each_row_is_read_once(lab: Lab, tmp_path: Path) -> None:
    stream = StatefulRows(ROWS)
    build(lab, tmp_path / "store", stream)
    assert stream.read == list(range(42))
    assert stream.at == 0, "the object is as it was given"


def test_what_came_before_is_not_read_again(lab: Lab, tmp_path: Path) -> None:
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30)
    stream, notes = StatefulRows(ROWS), Notes()
    build(lab, tmp_path / "store", stream, progress=notes)
    first, *others = stream.read  # the first row says which fields there are
    assert first == 0
    assert others == list(range(24, 42)), "from the last committed span on"
    assert not notes.said


@pytest.mark.parametrize("at", [24, 30])
def test_bounds_hold_where_it_goes_on(lab: Lab, tmp_path: Path, at: int) -> None:
    bounds: dict[str, Any] = {"skip_samples": 3, "max_samples": 31}
    build(lab, tmp_path / "whole", StatefulRows(ROWS), **bounds)
    cut(lab, tmp_path / "store", StatefulRows(ROWS), at, **bounds)
    stream, notes = StatefulRows(ROWS), Notes()
    report = build(lab, tmp_path / "store", stream, progress=notes, **bounds)
    assert (report.resumed_rows, report.rows) == ((at - 4) // SPAN * SPAN, 31)
    assert not notes.said
    assert stream.read[-1] == 33
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_a_stream_without_a_state_is_read_from_its_beginning(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "whole", Rows(ROWS))
    with pytest.raises(Cut):
        build(lab, tmp_path / "store", Broken(ROWS))
    stream, notes = Rows(ROWS), Notes()
    report = build(lab, tmp_path / "store", stream, progress=notes)
    assert report.resumed_rows == 28
    assert stream.read == list(range(42))
    (note,) = notes.said
    assert "has no state to go on with: its first 28 rows are read again, and not computed again" in note
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


@pytest.mark.parametrize("kind", [Rows, StatefulRows])
@pytest.mark.parametrize(("row", "found"), [(25, "24 to 28"), (3, "0 to 4")])
def test_other_rows_are_refused(lab: Lab, tmp_path: Path, kind: type[Rows], row: int, found: str) -> None:
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30)
    if kind is Rows:
        (tmp_path / "store" / "parts" / "part" / "stream.json").unlink()
    changed = [*ROWS[:row], {**ROWS[row], "text": "another text"}, *ROWS[row + 1 :]]
    before = tree(tmp_path / "store")
    if kind is StatefulRows and row == 3:  # before the span that is read again: nobody looks
        build(lab, tmp_path / "store", kind(changed))
        return
    with pytest.raises(MismatchError, match=rf"is not the stream that part 'part' .*rows {found}"):
        build(lab, tmp_path / "store", kind(changed))
    assert tree(tmp_path / "store") == before


def test_a_shorter_stream_is_refused(lab: Lab, tmp_path: Path) -> None:
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30)
    with pytest.raises(MismatchError, match="is not the stream"):
        build(lab, tmp_path / "store", StatefulRows(ROWS[:28]))


def test_another_seed_is_refused(lab: Lab, streams: dict[str, datasets.IterableDataset], tmp_path: Path) -> None:
    cut(lab, tmp_path / "store", streams["jsonl"].shuffle(seed=1, buffer_size=10), 30)
    with pytest.raises(MismatchError, match="the same files, order and seed"):
        build(lab, tmp_path / "store", streams["jsonl"].shuffle(seed=2, buffer_size=10))


def test_an_ordinary_part_at_the_end(lab: Lab, tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0]]
    build(lab, tmp_path / "ordinary", rows)
    notes = Notes()
    report = build(lab, tmp_path / "store", Rows(rows), progress=notes)
    part, ordinary = part_of(tmp_path / "store"), part_of(tmp_path / "ordinary")
    assert part.complete
    assert not part.open
    assert part.layout.rows == part.array("vectors").shape[0] == 43
    assert np.array_equal(span_table(part), span_table(ordinary))
    assert part.repeated_ids == ordinary.repeated_ids == {"ids": 1, "samples": 2}
    assert any("occur more than once" in note for note in notes.said)
    assert report.manifest == part.manifest
    scan = SampleScan(Corpus.open(rows).samples(), link=SPAN).finish()
    assert (part.manifest["corpus"]["samples"], part.manifest["corpus"]["fingerprint"]) == (43, scan.fingerprint)
    assert part.manifest["corpus"]["head"]["samples"] == SPAN
    assert not (part.path / "stream.json").exists()
    checked = ghoststore.verify(store=tmp_path / "store")
    assert checked.sound
    assert not checked.unknown
    ghoststore.copy(store=tmp_path / "store", part="part", to_name="copy")
    assert tree(tmp_path / "store" / "parts" / "copy") == tree(part.path)
    again = build(lab, tmp_path / "store", Rows(rows))
    assert (again.rows, again.resumed_rows, again.rows_built) == (43, 43, 0)


def test_the_end_falls_between_two_spans(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", Rows(ROWS[:40]))
    part = part_of(tmp_path / "store")
    assert (part.rows, len(part.spans), part.complete) == (40, 10, True)
    build(lab, tmp_path / "bounded", Rows(ROWS), max_samples=22, skip_samples=3)
    bounded = part_of(tmp_path / "bounded")
    assert bounded.column("source_row").tolist() == list(range(3, 25))
    assert np.array_equal(vectors_of(bounded), vectors_of(part, 3, 25))


@pytest.mark.parametrize("end", ["nothing", "arrays"])
def test_a_build_that_ended_before_the_end_was_written(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    build(lab, tmp_path / "whole", Rows(ROWS))

    def stop(*given: Any, **words: Any) -> None:
        raise Cut

    where = {"nothing": "indexer.build.stream.end_stream", "arrays": "ghoststore.store.part.stream.attributes_of"}[end]
    with monkeypatch.context() as patched:
        patched.setattr(where, stop)
        with pytest.raises(Cut):
            build(lab, tmp_path / "store", Rows(ROWS))
    part = part_of(tmp_path / "store")
    assert (part.rows, part.complete) == (42, True)
    assert np.array_equal(vectors_of(part), vectors_of(part_of(tmp_path / "whole")))
    assert ghoststore.verify(store=tmp_path / "store").sound
    stream = Rows(ROWS)
    build(lab, tmp_path / "store", stream)
    assert stream.read == [0], "no row but the one that says which fields there are"
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


def test_an_open_part_answers(lab: Lab, tmp_path: Path) -> None:
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30)
    part, notes = part_of(tmp_path / "store"), Notes()
    result = ghoststore.query(
        store=tmp_path / "store", val_set=lab.corpus, top_k=100, where="domain = 'sky'", device="cpu", progress=notes
    )
    assert "part 'part' is not complete: 28 rows of a stream whose end was not seen yet are searched" in notes.said
    hits = result.results[0].hits
    assert sorted(hit.id for hit in hits) == sorted(row["id"] for row in ROWS[:28:2])
    assert all(hit.text == ROWS[hit.source_row]["text"] for hit in hits)
    (described,) = ghoststore.info(store=tmp_path / "store").parts
    assert (described.open, described.complete, described.committed) == (True, False, 28)
    checked = ghoststore.verify(store=tmp_path / "store")
    assert checked.sound
    assert not checked.unknown
    ghoststore.copy(store=tmp_path / "store", part="part", to_name="copy")
    copied = Store.open(tmp_path / "store").part("copy")
    assert np.array_equal(vectors_of(copied, 0, 28), vectors_of(part, 0, 28))
    build(lab, tmp_path / "store", StatefulRows(ROWS), name="copy")  # without its state: from the beginning
    assert Store.open(tmp_path / "store").part("copy").rows == 42
    ghoststore.gc(store=tmp_path / "store")
    stream = StatefulRows(ROWS)
    build(lab, tmp_path / "store", stream)
    assert stream.read[1] == 24, "gc leaves the state"


def test_the_head_is_learned_from(lab: Lab, tmp_path: Path) -> None:
    """By default; of a stream with no more rows than that the projection is that of an ordinary build."""
    build(lab, tmp_path / "ordinary", ROWS, projection=None)
    report = build(lab, tmp_path / "store", StatefulRows(ROWS), projection=None)
    assert report.head == 42
    part, ordinary = part_of(tmp_path / "store"), part_of(tmp_path / "ordinary")
    assert part.manifest["projection"] == ordinary.manifest["projection"]
    assert np.array_equal(vectors_of(part), vectors_of(ordinary))
    few = ProjectionConfig(calibration_samples=10)
    cut(lab, tmp_path / "few", StatefulRows(ROWS), 30, projection=few)
    report = build(lab, tmp_path / "few", StatefulRows(ROWS), projection=few)
    assert (report.head, report.resumed_rows) == (10, 28)
    build(lab, tmp_path / "ten", ROWS[:10], projection=few)
    ten, whole = part_of(tmp_path / "ten"), part_of(tmp_path / "few")
    assert whole.manifest["projection"]["hash"] == ten.manifest["projection"]["hash"]
    assert np.array_equal(vectors_of(whole, 0, 8), vectors_of(ten, 0, 8))


def test_like_a_part_of_a_sample(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", ROWS[:24], name="sample", projection=None)
    ghoststore.build(store=tmp_path / "store", like="sample", data=Rows(ROWS[24:]), name="part", device="cpu")
    sample, part = (Store.open(tmp_path / "store").part(name) for name in ("sample", "part"))
    assert part.manifest["projection"] == sample.manifest["projection"]
    result = ghoststore.query(
        store=tmp_path / "store", part=["sample", "part"], val_set=lab.corpus, top_k=100, device="cpu"
    )
    assert sorted(hit.id for hit in result.results[0].hits) == sorted(row["id"] for row in ROWS)


def test_kept_fields_have_the_types_of_the_head(lab: Lab, tmp_path: Path) -> None:
    rows = [{**row, "stars": place + 0.5, "source": f"s{place}"} for place, row in enumerate(ROWS)]
    rows[20]["stars"] = 7
    build(lab, tmp_path / "store", Rows(rows), keep_fields=("stars", "source"))
    hits = ghoststore.query(
        store=tmp_path / "store", val_set=lab.corpus, top_k=100, where="stars = 7 OR source = 's3'", device="cpu"
    ).results[0]
    assert sorted(hit.source_row for hit in hits.hits) == [3, 20]
    rows[30]["stars"] = "many"
    with pytest.raises(CorpusError, match=r"'stars' of `keep_fields` was float .* and is string in .*'row-30'.*'many'"):
        build(lab, tmp_path / "other", Rows(rows), keep_fields=("stars", "source"))


class Living(Rows):
    """Rows that are made as they are read. ``most`` is the largest number of them that lived at once."""

    def __init__(self, count: int) -> None:
        super().__init__(())
        self.count, self.most = count, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        living: weakref.WeakSet[Any] = weakref.WeakSet()
        for number in range(self.count):
            text = Text(f"{ROWS[number % 42]['text']} {number}")
            living.add(text)
            self.most = max(self.most, len(living))
            yield {"id": str(number), "text": text}


class Text(str):
    """A text that can be counted while it lives."""

    __hash__ = object.__hash__  # equal texts are two


def test_memory_does_not_grow(lab: Lab, tmp_path: Path) -> None:
    most = []
    for count in (60, 240):
        gc.collect()
        stream = Living(count)
        build(lab, tmp_path / str(count), stream)
        most.append(stream.most)
    assert most[1] <= most[0] <= 12 * SPAN


def test_what_needs_the_rows_takes_them_as_data(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", Rows(ROWS))
    asked: dict[str, Any] = {"store": tmp_path / "store", "val_set": lab.corpus, "device": "cpu"}
    chosen = {**asked, "fraction": 0.2, "out": tmp_path / "chosen.jsonl"}
    with pytest.raises(UsageError, match="data in memory, which cannot be read again: give `data`"):
        ghoststore.select(**chosen)
    ghoststore.select(**chosen, data=ROWS)
    kept = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < 42
    assert all(row in ROWS for row in kept)
    with pytest.raises(UsageError, match="cannot be read again"):
        ghoststore.query(**asked, rerank=10)
    build(lab, tmp_path / "ordinary", ROWS)
    for how in ({"rerank": 10}, {"lexical": 0.3}):
        streamed, ordinary = (
            ghoststore.query(**{**asked, **how, "store": tmp_path / store}, data=ROWS).results[0].hits
            for store in ("store", "ordinary")
        )
        assert streamed == ordinary


def test_without_texts(lab: Lab, tmp_path: Path) -> None:
    notes = Notes()
    build(lab, tmp_path / "store", Rows(ROWS), store_text=False)
    hits = ghoststore.query(store=tmp_path / "store", val_set=lab.corpus, device="cpu", progress=notes).results[0].hits
    assert all(hit.id and hit.text is None for hit in hits)
    assert any("texts are not shown" in note for note in notes.said)


def test_repair_leaves_a_damaged_span(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", Rows(ROWS))
    chunk = tmp_path / "store" / "parts" / "part" / "vectors" / "c" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9] + b"damaged!!")
    report = ghoststore.repair(store=tmp_path / "store", data=ROWS)
    assert not report.sound
    assert "was built from a stream, which is read once, in order" in report.unmended[0].why


def test_a_reader_that_opened_it_before_the_end(lab: Lab, tmp_path: Path) -> None:
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30)
    part = part_of(tmp_path / "store")
    build(lab, tmp_path / "store", StatefulRows(ROWS))
    assert np.array_equal(vectors_of(part, 0, 28), vectors_of(part_of(tmp_path / "store"), 0, 28))
    assert list(part.read("sample_id", 0, 28)) == [row["id"] for row in ROWS[:28]]


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (Rows(ROWS), {"workers": 2}, "a stream is read once, in order, by one process: leave out `worker`"),
        (Rows(ROWS), {"worker": "1/2"}, "a stream is read once, in order, by one process"),
        (Rows(ROWS), {"engine": "ray"}, "a stream is read once, in order, by one process"),
        (Rows(ROWS), {"overlong": "window"}, "`overlong=window` makes several rows of a sample"),
        (Rows(ROWS), {"dry_run": True}, "`dry_run` counts rows and tokens, and a stream is read once"),
        ("-", {"stream": True}, "standard input cannot be read again"),
        ((row for row in ROWS), {}, r"generator can be read only once.*IterableDataset\.from_generator"),
        ("org/name:train", {"stream": True}, "the Hugging Face hub could not be reached"),
        (Rows([]), {}, "has no rows"),
        (Rows(ROWS), {"skip_samples": 50}, "has no rows beyond the first 50"),
        (Rows([{"text": "one"}, 7]), {}, r"a stream \(Rows\), row 2: expected a text or a dict, found 7"),
    ],
)
def test_refused_before_work_begins(
    lab: Lab, tmp_path: Path, data: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(GhostStoreError, match=message):
        build(lab, tmp_path / "store", data, **settings)
    assert not (tmp_path / "store" / "parts" / "part").exists()


def test_a_stream_is_no_val_set_and_no_part_of_files(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", Rows(ROWS))
    with pytest.raises(UsageError, match="can be read only once"):
        ghoststore.query(store=tmp_path / "store", val_set=Rows(ROWS), device="cpu")
    with pytest.raises(MismatchError, match="was built from a stream: give `stream` to continue it"):
        build(lab, tmp_path / "store", ROWS)
    build(lab, tmp_path / "ordinary", ROWS)
    with pytest.raises(MismatchError, match="was built from no stream: leave `stream` out"):
        build(lab, tmp_path / "ordinary", Rows(ROWS))


def test_a_dataset_of_the_hub(lab: Lab, tmp_path: Path) -> None:
    """As `load_dataset` gives it; here of a folder, since no hub is reached."""
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    streamed = load_from_hub("org/name:train", str(tmp_path / "set"), None, "train", streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    assert build(lab, tmp_path / "store", streamed).rows == 42
    assert named_on_hub("org/name:part:train") == ("org/name", "part", "train")
    assert named_on_hub(str(tmp_path / "set")) is None


def test_files_are_read_as_a_stream(lab: Lab, tmp_path: Path) -> None:
    """By a pattern, killed at a commit; texts are read where the files lie."""
    for place, shard in enumerate((ROWS[:15], ROWS[15:30], ROWS[30:])):
        write_jsonl(tmp_path / f"{place}.jsonl", shard)
    words = ["--data", tmp_path / "*.jsonl", "--stream", "--span-rows", "4"]
    whole = lab.build(tmp_path / "whole", *words)
    assert whole.code == 0, whole.err
    assert "read once, in order" in whole.out
    part = part_of(tmp_path / "whole")
    assert not part.layout.store_text
    hits = ghoststore.query(store=tmp_path / "whole", val_set=lab.corpus, device="cpu").results[0].hits
    assert all(hit.text == ROWS[hit.source_row]["text"] for hit in hits)
    ghoststore.select(
        store=tmp_path / "whole", val_set=lab.corpus, fraction=0.2, out=tmp_path / "chosen.jsonl", device="cpu"
    )
    chosen = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert [row for row in chosen if row in ROWS] == chosen
    words = {"store": tmp_path / "whole", "val_set": lab.corpus, "lexical": 0.3, "device": "cpu"}
    assert all(hit.text for hit in ghoststore.query(**words).results[0].hits)
    write_jsonl(tmp_path / "2.jsonl", [*ROWS[30:41], {**ROWS[41], "text": "another"}])
    with pytest.raises(MismatchError, match=r"has changed since part 'part' was built on it: stored sha256/4:"):
        ghoststore.query(**words)
