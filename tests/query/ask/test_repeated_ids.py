"""Samples of the same id: each is itself, by its place; and every summary says that there are such."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

import ghoststore
from ghoststore.cli.watch import render
from ghoststore.corpus.repeated import RepeatedIds
from ghoststore.store import RowTable
from indexer.session.samples import Samples
from query.training_scores.watch import Watcher
from tests.support.notes import Notes
from tests.support.score_runs import DOMAINS, LAYOUT, append, make, row_table, run_on, values
from tests.support.selecting import listed, select

if TYPE_CHECKING:
    from tests.conftest import Lab

IDS = ("a", "b", "a", "c", "7", "c", "c", "d", "e", "f", "g", "h")
"""Of the corpus; the fifth is the number 7 in the file, and one of the last a string."""
REPEATED = {"ids": 3, "samples": 7}
WORDS = "3 id(s) occur more than once, in 7 samples"


def rows_of(lab: Lab) -> list[dict[str, Any]]:
    rows = [row | {"id": name} for row, name in zip(lab.sample_rows(13, 1), [*IDS, "7"], strict=True)]
    rows[4]["id"] = 7
    return rows


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a part and a run of one corpus, in which ids repeat."""
    folder = tmp_path_factory.mktemp("repeated")
    data = lab.write(folder / "train.jsonl", rows_of(lab))
    val = lab.write(folder / "val.jsonl", [row | {"id": "same"} for row in lab.sample_rows(3, 3)])
    ghoststore.build(
        checkpoint=lab.checkpoint, data=data, store=folder / "store", name="part", span_rows=4, device="cpu"
    )
    ghoststore.train(
        data=data,
        val_set=val,
        checkpoint=lab.checkpoint,
        output_dir=folder / "run",
        store=folder / "store",
        name="run",
        max_steps=6,
        batch_size=5,
        overlong="truncate",
        device="cpu",
    )
    return folder


# Each row its own sum.


def table_of(ids: dict[int, str]) -> RowTable:
    """One row a sample, of these ids at these rows, and of its own elsewhere."""
    rows = LAYOUT.rows
    names = [ids.get(row, f"own-{row}") for row in range(rows)]
    return row_table(rows, rows, sample_id=np.array(names, dtype=object))


def sums_of(row: int, steps: int) -> list[tuple[int, float]]:
    """(step, Σ score ÷ mean |score| up to there) of every time that a row of the run was trained on, one by one."""
    found, total = [], 0.0
    for step in range(steps):
        given = values(step)
        score = given["score"].astype(np.float32).astype(np.float64)
        mean = np.abs(score[np.isfinite(score)]).mean()
        for place in zip(*np.nonzero(given["sample"] == row), strict=True):
            weighted = score[place] / mean
            total += weighted if np.isfinite(weighted) else 0.0
            found.append((step, total))
    return found


def test_each_row_has_its_own_sum(tmp_path: Path) -> None:
    append(make(tmp_path / "store", table=table_of({0: "a", 3: "a", 9: "a"})), 0, 10)
    notes = Notes()
    found = ghoststore.scores(store=tmp_path / "store", sample="a", progress=notes)
    assert notes.said == ["3 samples have the id 'a', each with its own sum: tell them apart by row"]
    assert found.history is not None
    assert [one.step for one in found.history] == sorted(one.step for one in found.history)
    for row in (0, 3, 9):
        mine = [(one.step, one.cumulative) for one in found.history if one.source_row == row]
        assert mine == [(step, pytest.approx(total)) for step, total in sums_of(row, 10)]
        assert mine
    ranked = {hit.source_row: hit.value for hit in ghoststore.scores(store=tmp_path / "store", top_k=50).hits}
    for row in (0, 3, 9):
        assert ranked[row] == pytest.approx(sums_of(row, 10)[-1][1])


def test_windows_of_one_sample_share_a_sum(tmp_path: Path) -> None:
    """Rows 0 and 1 are windows of one sample, rows 2 and 3 of another of the same id."""
    table = row_table(sample_id=np.array(["a"] * 4 + ["b"] * (LAYOUT.rows - 4), dtype=object))
    append(make(tmp_path / "store", table=table), 0, LAYOUT.steps)
    found = ghoststore.scores(store=tmp_path / "store", sample="a")
    assert found.history is not None
    assert len({one.window_start for one in found.history}) == 2
    for source in (0, 1):
        mine = [one for one in found.history if one.source_row == source]
        assert mine
        total = 0.0
        for one in mine:
            total += one.weighted or 0.0
            assert one.cumulative == pytest.approx(total)


def test_the_command_shows_a_table_a_row(lab: Lab, tmp_path: Path) -> None:
    append(make(tmp_path / "store", table=table_of({0: "a", 3: "a"})), 0, 10)
    shown = lab.run("scores", "--store", tmp_path / "store", "--sample", "a").out
    assert "sample a, row 0" in shown
    assert "sample a, row 3" in shown
    alone = lab.run("scores", "--store", tmp_path / "store", "--sample", "own-1").out
    assert "sample own-1" in alone
    assert "sample own-1, row" not in alone


def test_the_row_of_an_id_of_which_one_sample_was_seen(lab: Lab, tmp_path: Path) -> None:
    """Step 0 trains some rows alone; the id of one of them is that of a row which it does not."""
    seen = values(0)["sample"]
    mine = int(seen[0, 0])
    other = min(set(range(LAYOUT.rows)) - set(seen.ravel().tolist()))
    append(make(tmp_path / "store", table=table_of({mine: "a", other: "a"})), 0, 10)
    outcome = lab.run("scores", "--store", tmp_path / "store", "--sample", "a", "--steps", "0:1")
    assert f"sample a, row {mine}" in outcome.out
    assert f"row {other}" not in outcome.out
    assert "2 samples have the id 'a', each with its own sum: tell them apart by row" in outcome.err


# Where a row is shown.

LONG = "train-python-of-a-long-name-"


@pytest.mark.thin(3)
@pytest.mark.parametrize("width", [40, 80, 84, 120, 200])
def test_a_row_is_shown_beside_an_id_that_repeats(width: int, tmp_path: Path) -> None:
    """Whole, however long the id is; of other ids nothing is said."""
    names = {row: f"{LONG}{row // 2 if row % 4 < 2 else row}" for row in range(LAYOUT.rows)}
    table = row_table(LAYOUT.rows, LAYOUT.rows, sample_id=np.array(list(names.values()), dtype=object))
    count = RepeatedIds.of(names.values())
    run = make(
        tmp_path / "store", table=table, corpus={"fingerprint": "c", "domains": list(DOMAINS), "repeated_ids": count}
    )
    append(run, 0, 10)
    frame = Watcher(tmp_path / "store").look()
    shown = [*frame.best[:5], *frame.worst[:5]]
    alone = [one for one in shown if list(names.values()).count(one.id) == 1]
    assert 0 < len(alone) < len(shown)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(frame, width))
    words = console.export_text().replace("│", " ").split()
    rows = {int(number) for word, number in itertools.pairwise(words) if word == "row" and number.isdigit()}
    assert rows == {one.source_row for one in shown if one not in alone}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_windows_of_one_sample_are_no_repeated_id(width: int, tmp_path: Path) -> None:
    """Nor is anything said of rows where nothing repeats but the id of a sample that is not shown."""
    corpus = {"fingerprint": "c", "domains": list(DOMAINS), "repeated_ids": {"ids": 1, "samples": 2}}
    append(make(tmp_path / "store", corpus=corpus), 0, 10)
    frame = Watcher(tmp_path / "store").look()
    assert not any(one.id_repeats for one in (*frame.best, *frame.worst))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(frame, width))
    assert "row " not in console.export_text().split("note:")[0]


# By place, not by id.


def test_values_go_to_the_rows_of_their_places(lab: Lab, tmp_path: Path) -> None:
    """``--with-scores`` of a part in which every sample is called the same."""
    data = lab.write(tmp_path / "train.jsonl", [row | {"id": "same"} for row in lab.sample_rows(12, 1)])
    ghoststore.build(checkpoint=lab.checkpoint, data=data, store=tmp_path / "store", name="part", device="cpu")
    part = ghoststore.Store.open(tmp_path / "store").part()
    source, digest = (part.read(name, 0, 12) for name in ("source_row", "source_digest"))
    expected = run_on(tmp_path / "store", "run", source, digest)
    found = ghoststore.query(
        store=tmp_path / "store", val_set=data, with_scores="run", score_weight=0.0, top_k=12, text=False, device="cpu"
    )
    values = {hit.source_row: hit.value for hit in found.results[0].hits}  # type: ignore[attr-defined]
    assert values == {row: pytest.approx(value) if np.isfinite(value) else None for row, value in enumerate(expected)}


def test_a_selection_is_of_rows(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """One sample called ``c`` leaks, and it alone is left out; quotas and the rows written are those of places."""
    rows = rows_of(lab)
    leak = {"id": "same", "text": rows[5]["text"]}
    val = lab.write(tmp_path / "val.jsonl", [{"id": "same", "text": "something else entirely"}, leak])
    notes = Notes()
    made = select(folder / "store", val, tmp_path / "out.jsonl", fraction=1.0, progress=notes)
    assert [entry["source_row"] for entry in listed(made)] == [row for row in range(13) if row != 5]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        row for place, row in enumerate(rows) if place != 5
    ]
    (found,) = made.leaks["rows"]
    assert (found["id"], found["source_row"], found["val_id"], found["val_row"]) == ("c", 5, "same", 1)
    assert made.settings["repeated_ids"] == REPEATED
    assert any(WORDS in note for note in notes.said)
    few = select(folder / "store", val, tmp_path / "few.jsonl", count=6, quotas={"sky": 4}, leaks="keep")
    by_domain = {share.domain: share.chosen for share in few.domains}
    assert by_domain == {"sky": 4, "earth": 2}
    assert len({entry["source_row"] for entry in listed(few)}) == 6


def test_rankings_of_val_samples_of_one_id(folder: Path) -> None:
    """``val_row`` says which is which."""
    found = ghoststore.query(
        store=folder / "store", val_set=folder / "val.jsonl", each=True, top_k=3, text=False, device="cpu"
    )
    assert [(one.query, one.val_row) for one in found.results] == [("same", 0), ("same", 1), ("same", 2)]
    assert [row["val_row"] for row in found.rows()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    mean = ghoststore.query(store=folder / "store", val_set=folder / "val.jsonl", top_k=3, text=False, device="cpu")
    assert [one.val_row for one in mean.results] == [None]


# Every summary says so.


def test_what_is_made_says_so(lab: Lab, folder: Path, tmp_path: Path) -> None:
    notes, data = Notes(), folder / "train.jsonl"
    settings: dict[str, Any] = {"data": data, "progress": notes}
    built = ghoststore.build(checkpoint=lab.checkpoint, store=tmp_path / "s", dry_run=True, device="cpu", **settings)
    assert built.to_json()["manifest"]["corpus"]["repeated_ids"] == REPEATED
    assert [note for note in notes.said if WORDS in note] == [f"{data}: {WORDS}: tell them apart by row"]
    notes.said.clear()
    shards = ghoststore.tokenize(tokenizer=lab.checkpoint, out=tmp_path / "tokens", **settings)
    assert shards.repeated_ids == REPEATED
    assert [note for note in notes.said if WORDS in note]
    trained = ghoststore.train(
        data=tmp_path / "tokens",
        checkpoint=lab.checkpoint,
        output_dir=tmp_path / "run",
        method="Regular",
        max_steps=1,
        batch_size=2,
        overlong="truncate",
        device="cpu",
    )
    assert trained.repeated_ids == REPEATED
    few = ghoststore.train(
        data=tmp_path / "tokens",
        checkpoint=lab.checkpoint,
        output_dir=tmp_path / "few",
        method="Regular",
        max_steps=1,
        batch_size=2,
        overlong="truncate",
        domains=("sky",),
        device="cpu",
    )
    sky = [str(row["id"]) for row in rows_of(lab) if row["domain"] == "sky"]
    twice = [name for name in set(sky) if sky.count(name) > 1]
    assert few.repeated_ids == {"ids": len(twice), "samples": sum(sky.count(name) for name in twice)}


def test_what_is_asked_says_so(lab: Lab, folder: Path) -> None:
    store, val = folder / "store", folder / "val.jsonl"
    for answer in (
        lambda notes: ghoststore.query(store=store, val_set=val, text=False, device="cpu", progress=notes),
        lambda notes: ghoststore.self_influence(store=store, text=False, device="cpu", progress=notes),
    ):
        notes = Notes()
        assert answer(notes).settings["repeated_ids"] == REPEATED
        assert [note for note in notes.said if WORDS in note]
    scores = ghoststore.scores(store=store, text=False)
    assert scores.to_json()["summary"]["repeated_ids"] == REPEATED
    (frame,) = ghoststore.watch(store=store, once=True)
    assert frame.repeated_ids == REPEATED
    assert [one.source_row for one in frame.best[:10]] == [hit.source_row for hit in scores.hits[:10]]
    held = ghoststore.info(store)
    assert [one.repeated_ids for one in (*held.parts, *held.runs)] == [REPEATED, REPEATED]
    shown = lab.run("watch", "--once", "--store", store).out
    assert {one.id_repeats for one in frame.best} == {one.id in ("a", "c", "7") for one in frame.best}
    on_screen = (*frame.best[:5], *frame.worst[:5])
    assert all((f"row {one.source_row} " in shown) == one.id_repeats for one in on_screen)
    for words in (["scores"], ["watch", "--once"], ["info", "--part", "part"], ["info", "--run", "run"]):
        assert "occur more than once" in " ".join(lab.run(*words, "--store", store).out.split()), words


def test_a_loop_of_ones_own_says_so() -> None:
    """The manager and the callback are told ids, or how many samples there are."""
    assert RepeatedIds.of(Samples.of(["x", "y", "x"]).ids) == {"ids": 1, "samples": 2}
    assert RepeatedIds.of(Samples.of(3).ids) is None


def test_ids_that_are_places_never_repeat(lab: Lab, tmp_path: Path) -> None:
    """Without an id field nothing is counted, nor said; and unique ids are null."""
    rows = lab.sample_rows(4, 1)
    bare = lab.write(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in rows])
    named = lab.write(tmp_path / "named.jsonl", rows)
    for data in (bare, named):
        notes = Notes()
        built = ghoststore.build(
            checkpoint=lab.checkpoint, data=data, store=tmp_path / "s", dry_run=True, device="cpu", progress=notes
        )
        assert built.manifest["corpus"]["repeated_ids"] is None
        assert notes.said == []
