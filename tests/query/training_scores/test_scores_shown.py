"""What `ghoststore scores` shows: texts, tables, files and plots."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet
import pytest

import ghoststore
from query.training_scores.plots import plot_scores
from tests.support.bounded import reseal
from tests.support.notes import Notes
from tests.support.score_runs import (
    SAMPLES,
    append,
    make,
    row_table,
    whole,
)

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "store"
    whole(folder)
    return folder


@pytest.fixture(scope="module")
def with_texts(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run on the first samples of the lab's corpus, which is copied beside it."""
    folder = tmp_path_factory.mktemp("texts")
    corpus = ghoststore.Corpus.open(str(lab.write(folder / "own.jsonl", lab.rows)))
    samples = list(corpus.samples())[:SAMPLES]
    source = row_table().source_row
    columns = {
        "sample_id": np.array([samples[i].id for i in source], dtype=object),
        "source_offset": np.array([samples[i].offset for i in source]),
        "source_digest": np.array([samples[i].digest() for i in source], dtype=np.uint64),
    }
    run = make(
        folder / "store",
        table=row_table(**columns),
        corpus={
            "fingerprint": "sha256:c",
            "domains": ["sky", "earth"],
            "repeated_ids": None,
            "fields": corpus.resolved.to_json(),
        },
        source={"data": "tokens", "corpus": str(folder / "own.jsonl"), "form": "jsonl"},
    )
    append(run, 0, 23)
    return folder


def test_texts_of_a_run_from_elsewhere(lab: Lab, with_texts: Path, tmp_path: Path) -> None:
    """The corpus that it names is not looked for; the user says where it is."""
    store, notes = Path(shutil.copytree(with_texts / "store", tmp_path / "store")), Notes()
    texts = {row["id"]: row["text"] for row in lab.rows}
    for named in ("org/data:train", str(with_texts / "elsewhere.jsonl"), str(with_texts / "own.jsonl")):
        reseal(
            store / "runs/run", lambda attributes, named=named: attributes["manifest"]["source"].update(corpus=named)
        )
        found = ghoststore.scores(store=store, top_k=30, progress=notes)
        if named.endswith("own.jsonl"):  # as it was made: this user's own again
            assert all(hit.text == texts[hit.id] for hit in found.hits)
            break
        assert {hit.text for hit in found.hits} == {None}
        assert f"give it: `data={named}`" in notes.said.pop()
        found = ghoststore.scores(store=store, top_k=30, data=with_texts / "own.jsonl")
        assert all(hit.text == texts[hit.id] for hit in found.hits)


def test_texts(lab: Lab, with_texts: Path) -> None:
    """Of the corpus as it was; nothing for a row that changed, nothing where it is gone."""
    store, own, notes = with_texts / "store", with_texts / "own.jsonl", Notes()
    texts = {row["id"]: row["text"] for row in lab.rows}

    def shown() -> dict[str, str | None]:
        found = ghoststore.scores(store=store, top_k=30, progress=notes)
        return {hit.id: hit.text for hit in found.hits}

    before = shown()
    assert before == {name: texts[name] for name in before}
    assert notes.said == []
    rows = [dict(row) for row in lab.rows]
    rows[3]["text"] = rows[3]["text"].swapcase()
    lab.write(own, rows)
    assert shown() == before | {"row-3": None}
    assert "has changed since the run was trained" in notes.said.pop()
    own.unlink()
    assert set(shown().values()) == {None}
    assert "own.jsonl" in notes.said[-1]
    lab.write(own, lab.rows)
    found = ghoststore.scores(store=store, text=False)
    assert {hit.text for hit in found.hits} == {None}


def test_a_corpus_that_cannot_be_found_again(store: Path) -> None:
    notes = Notes()
    assert ghoststore.scores(store=store, progress=notes).hits[0].text is None
    assert notes.said == ["texts are not shown: run 'run' does not say which corpus it was trained on"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("words", [[], ["--by", "domain"], ["--sample", "s0"]], ids=["hits", "domains", "history"])
def test_every_form_of_output(lab: Lab, store: Path, tmp_path: Path, words: list[str]) -> None:
    """Each holds what the JSON document holds; JSON is all of stdout."""
    flat, key = {}, {"--by": "domains", "--sample": "history"}.get(words[0] if words else "", "hits")
    for suffix in ("json", "jsonl", "csv", "parquet"):
        out = tmp_path / f"scores.{suffix}"
        more = [] if words else ["--bottom-k", "3"]
        outcome = lab.run("scores", "--store", store, *words, *more, "--json", "--no-text", "--out", out)
        assert outcome.code == 0, outcome.err
        assert f"wrote {out}" in outcome.err
        document = outcome.json
        assert list(document)[:3] == ["store", "settings", "summary"]
        expected = document[key]
        if key == "hits":
            expected = [
                {"list": name, **hit} for name, k in (("top", "hits"), ("bottom", "bottom")) for hit in document[k]
            ]
        if suffix == "json":
            assert json.loads(out.read_text()) == document
        elif suffix == "jsonl":
            flat[suffix] = [json.loads(line) for line in out.read_text().splitlines()]
        elif suffix == "parquet":
            flat[suffix] = pyarrow.parquet.read_table(out).to_pylist()
        else:
            with open(out, newline="") as file:
                read = list(csv.DictReader(file))
            assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected] == read
        assert not any(value != value for row in expected for value in row.values())
        again = lab.run("scores", "--store", store, *words, "--out", out)
        assert (again.code, "exists; nothing was written" in again.err) == (2, True)
    assert flat["jsonl"] == flat["parquet"] == expected


def test_tables(lab: Lab, store: Path) -> None:
    for words, shown in (
        ([], ["18 committed, 0 to 22, of 23", "10 to 14", "not scored (NaN)", "not finite", "highest", "s0"]),
        (["--bottom-k", "2", "--unit", "window"], ["lowest", "token"]),
        (["--by", "domain", "--value", "mean"], ["earth", "(none)", "± standard error"]),
        (["--sample", "s0", "--steps", "-3:"], ["learning rate", "cumulative"]),
    ):
        outcome = lab.run("scores", "--store", store, *words, "--quiet")
        assert outcome.code == 0, outcome.err
        for text in shown:
            assert text in outcome.out


@pytest.mark.thin(1)
@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_plot(lab: Lab, store: Path, tmp_path: Path, suffix: str) -> None:
    plot = tmp_path / f"plot.{suffix}"
    outcome = lab.run("scores", "--store", store, "--by", "domain", "--group", "law", "--steps", "2:", "--plot", plot)
    assert outcome.code == 0, outcome.err
    assert f"wrote {plot}" in outcome.err
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert plot.read_bytes().startswith(start)
    again = lab.run("scores", "--store", store, "--plot", plot)
    assert (again.code, "exists; nothing was written" in again.err) == (2, True)


@pytest.mark.slow
def test_a_plot_of_many_domains_and_of_none(tmp_path: Path) -> None:
    many = [f"d{i}" for i in range(15)]
    table = row_table(domain=row_table().source_row)
    run = make(
        tmp_path / "store", table=table, corpus={"fingerprint": "sha256:c", "domains": many, "repeated_ids": None}
    )
    append(run, 0, 10)
    run.reload()
    plot_scores(run, tmp_path / "many.svg")
    plot_scores(run, tmp_path / "many.svg", steps="3:4", title="again")
    bare = make(
        tmp_path / "store",
        "bare",
        table=row_table(domain=row_table().domain * 0 - 1),
        corpus={"fingerprint": "sha256:c", "domains": None, "repeated_ids": None},
    )
    append(bare, 0, 5)
    bare.reload()
    plot_scores(bare, tmp_path / "bare.png", layers=["mlp"])
    assert (tmp_path / "bare.png").stat().st_size > 10_000
