"""A build that reads its corpus once, in order: the vectors of an ordinary build, resumed without reading again what
was read.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import CorpusError, MismatchError
from ghoststore.store import Store
from tests.conftest import tree, write_jsonl
from tests.support.notes import Notes
from tests.support.parts import vectors_of
from tests.support.streams import ROWS, SPAN, Broken, Cut, Living, Rows, StatefulRows, build, cut, part_of

if TYPE_CHECKING:
    from tests.conftest import Lab


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


@pytest.mark.thin(1)
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


@pytest.mark.thin(2)
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


@pytest.mark.thin(1)
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


@pytest.mark.thin
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


@pytest.mark.slow
def test_like_a_part_of_a_sample(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", ROWS[:24], name="sample", projection=None)
    ghoststore.build(store=tmp_path / "store", like="sample", data=Rows(ROWS[24:]), name="part", device="cpu")
    sample, part = (Store.open(tmp_path / "store").part(name) for name in ("sample", "part"))
    assert part.manifest["projection"] == sample.manifest["projection"]
    result = ghoststore.query(
        store=tmp_path / "store", part=["sample", "part"], val_set=lab.corpus, top_k=100, device="cpu"
    )
    assert sorted(hit.id for hit in result.results[0].hits) == sorted(row["id"] for row in ROWS)


@pytest.mark.slow
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
    late = [{**row, "stars": None if place < SPAN else 1} for place, row in enumerate(ROWS)]
    with pytest.raises(CorpusError, match=r"none of the 4 rows at the head of the stream, .* has a value in .*'stars'"):
        build(lab, tmp_path / "late", Rows(late), keep_fields=("stars",))


def test_memory_holds_a_few_spans(lab: Lab, tmp_path: Path) -> None:
    gc.collect()
    stream = Living(150)
    build(lab, tmp_path / "store", stream, span_rows=10)
    # One that is read, one in the queue, one that waits for it, one that is computed; and those at the head.
    assert stream.most <= 75
