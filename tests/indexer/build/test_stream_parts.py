"""Parts of streams: open until the end is seen, ordinary ones then; what they show, and what they do not allow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest

import ghoststore
from ghoststore.corpus import Corpus
from ghoststore.corpus.locate import load_from_hub, named_on_hub
from ghoststore.corpus.scan import SampleScan
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import Store
from ghoststore.store.part.part import span_table
from tests.conftest import tree, write_jsonl
from tests.support.notes import Notes
from tests.support.parts import unbuild, vectors_of
from tests.support.streams import ROWS, SPAN, Cut, Rows, StatefulRows, build, cut, part_of

if TYPE_CHECKING:
    from tests.conftest import Lab


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


@pytest.mark.thin(1)
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
    assert stream.read == list(range(SPAN + 1)), "no row but those of the first span, which are compared, and one ahead"
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")


@pytest.mark.parametrize("length", [42, 3])
def test_another_stream_is_refused_by_a_part_that_is_whole(lab: Lab, tmp_path: Path, length: int) -> None:
    """Both would have the same name by default."""
    rows = ROWS[:length]
    build(lab, tmp_path / "store", Rows(rows))
    before = tree(tmp_path / "store")
    for other in (rows[:2], [*rows[:2], {**rows[2], "text": "another"}, *rows[3:]]):
        with pytest.raises(MismatchError, match=rf"is not the stream .*rows 0 to {min(length, SPAN)} \(span 0\)"):
            build(lab, tmp_path / "store", Rows(other))
    with pytest.raises(MismatchError, match=r"corpus\.skip_samples: stored None, asked for 1"):
        build(lab, tmp_path / "store", Rows(rows), skip_samples=1)
    assert tree(tmp_path / "store") == before
    assert build(lab, tmp_path / "store", Rows(rows)).rows_built == 0


def test_a_part_with_gaps_is_not_gone_on_with(lab: Lab, tmp_path: Path) -> None:
    """As of a copy by another tool that was cut off."""
    build(lab, tmp_path / "store", Rows(ROWS[:12]))
    cut(lab, tmp_path / "open", StatefulRows(ROWS), 30)
    for store in (tmp_path / "store", tmp_path / "open"):
        unbuild(part_of(store), 1)
        left = tree(store)
        with pytest.raises(CorruptError, match=r"has \d spans, and not all .* remove the part"):
            build(lab, store, StatefulRows(ROWS))
        assert tree(store) == left


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


@pytest.mark.slow
def test_a_session_sees_it_grow(lab: Lab, tmp_path: Path) -> None:
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30)
    with ghoststore.open(tmp_path / "store", device="cpu") as session:
        counts = [len(session.query(lab.corpus, top_k=100).results[0].hits)]
        build(lab, tmp_path / "store", StatefulRows(ROWS))
        counts.append(len(session.query(lab.corpus, top_k=100).results[0].hits))
    assert counts == [28, 42]


@pytest.mark.slow
def test_an_open_part_beside_another(lab: Lab, tmp_path: Path) -> None:
    """Ranked as one, in the order of the parts, and refused where both have the same rows."""
    build(lab, tmp_path / "store", ROWS[:12], name="first")
    begun: dict[str, Any] = {"like": "first", "projection": None, "span_rows": None}
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 34, skip_samples=12, **begun)
    asked: dict[str, Any] = {"store": tmp_path / "store", "val_set": lab.corpus, "top_k": 100, "device": "cpu"}
    hits = ghoststore.query(part=["first", "part"], **asked).results[0].hits
    assert sorted(hit.id for hit in hits) == sorted(row["id"] for row in ROWS[:32])
    cut(lab, tmp_path / "store", StatefulRows(ROWS), 30, name="same", **begun)
    with pytest.raises(MismatchError, match="both have samples 0 to 3 of their corpora"):
        ghoststore.query(part=["first", "same"], **asked)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_stream_is_no_val_set_and_no_part_of_files(lab: Lab, tmp_path: Path) -> None:
    build(lab, tmp_path / "store", Rows(ROWS))
    with pytest.raises(UsageError, match="can be read only once"):
        ghoststore.query(store=tmp_path / "store", val_set=Rows(ROWS), device="cpu")
    with pytest.raises(MismatchError, match="was built from a stream: give `stream` to continue it"):
        build(lab, tmp_path / "store", ROWS)
    build(lab, tmp_path / "ordinary", ROWS)
    with pytest.raises(MismatchError, match="was built from no stream: leave `stream` out"):
        build(lab, tmp_path / "ordinary", Rows(ROWS))


@pytest.mark.slow
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
    assert ghoststore.query(**words).results[0].hits  # by the words that are kept, which are those of the rows
    shutil.rmtree(part.path / "second_moment")
    with pytest.raises(MismatchError, match=r"has changed since part 'part' was built on it: stored sha256/4:"):
        ghoststore.query(**words)
