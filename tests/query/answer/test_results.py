"""What a query shows and writes: the documented JSON, the texts of the source, the same rows in every form."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet
import pytest

import ghoststore
from tests.support.notes import Notes

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture
def val(lab: Lab, tmp_path: Path) -> Path:
    return lab.write(tmp_path / "val.jsonl", [row | {"id": f"v{i}"} for i, row in enumerate(lab.sample_rows(3, 5))])


@pytest.fixture(scope="module")
def own_built(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``own.jsonl`` and the store of it."""
    folder = tmp_path_factory.mktemp("own")
    outcome = lab.build(folder / "store", "--data", lab.write(folder / "own.jsonl", lab.rows))
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def own(lab: Lab, own_built: Path) -> Path:
    """That folder; its corpus, as the store knows it, may be changed."""
    shutil.rmtree(own_built / "own.jsonl", ignore_errors=True)  # a test may have put something else there
    (own_built / "own.jsonl").unlink(missing_ok=True)
    lab.write(own_built / "own.jsonl", lab.rows)
    return own_built


def texts(own: Path, val: Path) -> tuple[dict[str, str | None], list[str]]:
    """The text shown for each id, and what was noted."""
    notes = Notes()
    found = ghoststore.query(store=own / "store", val_set=val, top_k=27, device="cpu", progress=notes)
    assert len(found.results[0].hits) == 27
    return {hit.id: hit.text for hit in found.results[0].hits}, notes.said


@pytest.mark.thin(1)
@pytest.mark.parametrize("mode", ["--mean", "--each"])
@pytest.mark.parametrize("bottom", [0, 2])
def test_json_has_the_documented_keys(lab: Lab, built: Path, val: Path, mode: str, bottom: int) -> None:
    outcome = lab.run(
        "query", "--store", built, "--val-set", val, mode, "--json", "--top-k", "4", "--bottom-k", str(bottom)
    )
    assert outcome.code == 0, outcome.err
    document = outcome.json
    assert list(document) == ["store", "settings", "results"]
    assert document["store"] == str(built)
    settings = document["settings"]
    assert (settings["top_k"], settings["bottom_k"], settings["metric"]) == (4, bottom, "dot")
    queries = ["mean"] if mode == "--mean" else ["v0", "v1", "v2"]
    assert [result["query"] for result in document["results"]] == queries
    assert [result["val_row"] for result in document["results"]] == ([None] if mode == "--mean" else [0, 1, 2])
    for result in document["results"]:
        assert list(result) == ["query", "val_row", "hits", *(["bottom"] if bottom else [])]
        for hits, count in ((result["hits"], 4), (result.get("bottom", []), bottom)):
            assert [hit["rank"] for hit in hits] == list(range(1, count + 1))
            for hit in hits:
                assert set(hit) == {"rank", "score", "nats", "id", "source_row", "domain", "text", "window_start"}
                row = lab.rows[hit["source_row"]]
                assert (hit["id"], hit["domain"], hit["text"]) == (row["id"], row["domain"], row["text"])
                assert math.isfinite(hit["score"])


def test_texts_are_those_of_the_source(lab: Lab, own: Path, val: Path) -> None:
    assert texts(own, val) == ({row["id"]: row["text"] for row in lab.rows}, [])


def test_a_row_that_changed_is_not_shown(lab: Lab, own: Path, val: Path) -> None:
    """In place: the others still are."""
    rows = [dict(row) for row in lab.rows]
    rows[5]["text"] = rows[5]["text"].swapcase()
    lab.write(own / "own.jsonl", rows)
    shown, said = texts(own, val)
    assert shown == {row["id"]: None if row["id"] == "row-5" else row["text"] for row in lab.rows}
    assert len(said) == 1
    assert "1 of 27 texts" in said[0]
    assert str(own / "own.jsonl") in said[0]


def test_rows_that_were_added_change_nothing(lab: Lab, own: Path, val: Path) -> None:
    lab.write(own / "own.jsonl", lab.rows + lab.sample_rows(3, 8))
    assert texts(own, val) == ({row["id"]: row["text"] for row in lab.rows}, [])


def test_rows_that_vanished_are_not_shown(lab: Lab, own: Path, val: Path) -> None:
    """The others still are."""
    lab.write(own / "own.jsonl", lab.rows[:20])
    shown, said = texts(own, val)
    assert shown == {row["id"]: row["text"] if i < 20 else None for i, row in enumerate(lab.rows)}
    assert len(said) == 1


def test_a_row_that_became_longer(lab: Lab, own: Path, val: Path) -> None:
    """What stands before it is where it was; nothing else may be shown for another row."""
    rows = [dict(row) for row in lab.rows]
    rows[10]["text"] += " and more"
    lab.write(own / "own.jsonl", rows)
    shown, said = texts(own, val)
    for i, row in enumerate(lab.rows):
        assert shown[row["id"]] in ([row["text"]] if i < 10 else [None, row["text"]])
    assert shown["row-10"] is None
    assert len(said) == 1


@pytest.mark.thin(1)
@pytest.mark.parametrize("what", ["gone", "garbage", "empty", "folder"])
def test_a_source_that_is_gone(lab: Lab, own: Path, val: Path, what: str) -> None:
    """The ranking is the same, without texts, and says why."""
    before, _ = texts(own, val)
    (own / "own.jsonl").unlink()
    if what == "folder":
        (own / "own.jsonl").mkdir()
    elif what != "gone":
        (own / "own.jsonl").write_bytes(b"\xff\xfe{{{" * 1000 if what == "garbage" else b"")
    shown, said = texts(own, val)
    assert list(shown) == list(before)
    assert set(shown.values()) == {None}
    assert len(said) == 1
    assert "own.jsonl" in said[0]
    table = lab.run("query", "--store", own / "store", "--val-set", val)
    assert table.code == 0, table.err
    assert "note: " in table.err


def test_texts_in_the_store_outlive_the_source(lab: Lab, tmp_path: Path, val: Path) -> None:
    corpus = lab.write(tmp_path / "own.jsonl", lab.rows)
    assert lab.build(tmp_path / "store", "--data", corpus, "--store-text").code == 0
    corpus.unlink()
    kept = {row["id"]: row["text"] for row in lab.rows}
    assert texts(tmp_path, val) == (kept, [])
    other = lab.write(tmp_path / "other.jsonl", [{"text": "another corpus"}])
    outcome = lab.run(
        "query", "--store", tmp_path / "store", "--val-set", val, "--data", other, "--top-k", "27", "--json"
    )
    assert {hit["id"]: hit["text"] for hit in outcome.json["results"][0]["hits"]} == kept
    assert f"note: texts are those that part 'part' keeps; --data {other} is not read for them" in outcome.err


def test_standard_input(lab: Lab, built: Path, tmp_path: Path, val: Path) -> None:
    """A corpus from a pipe is the corpus of a file; its texts are kept, for it cannot be read again."""
    outcome = lab.build(tmp_path / "store", "--data", "-", "--json", stdin=str(lab.corpus))
    assert outcome.code == 0, outcome.err
    assert outcome.json["rows"] == 27
    assert texts(tmp_path, val) == ({row["id"]: row["text"] for row in lab.rows}, [])
    for name in ("vectors", "loss", "status", "sample_id"):
        ours, theirs = (ghoststore.Store.open(store).part().read(name, 0, 27) for store in (tmp_path / "store", built))
        assert (ours == theirs).all()
    again = lab.build(tmp_path / "store", "--data", "-", "--json", stdin=str(lab.corpus))
    assert (again.code, again.json["resumed_rows"]) == (0, 27)


def test_a_val_set_from_standard_input(lab: Lab, built: Path, val: Path) -> None:
    """It is read once, so a pipe will do."""
    piped = lab.run("query", "--store", built, "--val-set", "-", "--json", stdin=str(val))
    assert piped.code == 0, piped.err
    plain = lab.run("query", "--store", built, "--val-set", val, "--json")
    assert piped.json["results"] == plain.json["results"]


@pytest.mark.parametrize("command", ["query", "build", "tokenize"])
def test_errors_name_standard_input(lab: Lab, built: Path, tmp_path: Path, command: str) -> None:
    """And not the temporary file that it lies in; notes, too."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a cat", "answer": "yes"}\n{"text": \n')
    words = {
        "query": ["query", "--store", built, "--val-set", "-"],
        "build": ["build", "--store", tmp_path / "new", "--checkpoint", lab.checkpoint, "--data", "-"],
        "tokenize": ["tokenize", "--tokenizer", lab.checkpoint, "--out", tmp_path / "out", "--data", "-"],
    }
    outcome = lab.run(*words[command], stdin=str(bad))
    assert outcome.code == 2, outcome.err
    assert "Error: standard input, line 2" in outcome.err
    assert "note: standard input: 'answer' of its rows is not read" in outcome.err
    assert "stdin.jsonl" not in outcome.err


def test_no_text(lab: Lab, built: Path, val: Path) -> None:
    outcome = lab.run("query", "--store", built, "--val-set", val, "--json", "--no-text")
    assert {hit["text"] for hit in outcome.json["results"][0]["hits"]} == {None}
    assert "note" not in outcome.err


def test_every_form_of_output(lab: Lab, tmp_path: Path) -> None:
    """Read back, each holds what the JSON document holds; commas, quotes and lines in texts included."""
    rows = [{"id": f'a"{i}', "text": f'the cat, "{i}"\nsees a ü dog\t{i}'} for i in range(12)]
    data = lab.write(tmp_path / "data.jsonl", rows)
    assert lab.build(tmp_path / "store", "--data", data).code == 0
    flat = {}
    for suffix in ("json", "jsonl", "csv", "parquet"):
        out = tmp_path / f"results.{suffix}"
        outcome = lab.run(
            "query",
            "--store",
            tmp_path / "store",
            "--val-set",
            data,
            "--each",
            "--top-k",
            "3",
            "--bottom-k",
            "2",
            "--out",
            out,
            "--json",
        )
        assert outcome.code == 0, outcome.err
        assert f"wrote {out}" in outcome.err
        flat[suffix] = read_back(out, outcome.json)
    expected = flat.pop("json")
    assert len(expected) == 12 * 5
    for found in flat.values():
        assert found == expected


def read_back(out: Path, document: Any) -> list[dict[str, Any]]:
    """Flat rows, numbers as numbers, scores as float32 has them."""
    match out.suffix:
        case ".json":
            written = json.loads(out.read_text())
            assert written == document
            rows = [
                {"query": result["query"], "val_row": result["val_row"], "list": name, **hit}
                for result in written["results"]
                for name, hits in (("top", result["hits"]), ("bottom", result["bottom"]))
                for hit in hits
            ]
        case ".jsonl":
            rows = [json.loads(line) for line in out.read_text().splitlines()]
        case ".csv":
            with open(out, newline="") as file:
                rows = list(csv.DictReader(file))
        case _:
            rows = pyarrow.parquet.read_table(out).to_pylist()
    whole = dict.fromkeys(("val_row", "rank", "source_row", "window_start"), int)
    rounded = dict.fromkeys(("score", "nats"), lambda value: float(f"{float(value):.6g}"))
    numbers: dict[str, Any] = {**whole, **rounded}
    return [{key: numbers.get(key, lambda v: v or None)(value) for key, value in row.items()} for row in rows]
