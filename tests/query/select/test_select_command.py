"""`ghoststore select` as a process: what it prints, what it refuses, and that it leaves all of its files or none."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

import ghoststore
from ghoststore.cli import cli
from ghoststore.errors import UsageError
from query.ask.question import Question
from tests.support.selecting import select, source_rows

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome


@pytest.fixture(scope="module")
def val(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row | {"id": f"v{i}"} for i, row in enumerate(lab.sample_rows(3, 5))]
    return lab.write(tmp_path_factory.mktemp("val") / "val.jsonl", rows)


def run(lab: Lab, store: Path, val: Path, out: Path, *options: str, **order: Any) -> Outcome:
    return lab.run("select", "--store", store, "--val-set", val, "--out", out, "--device", "cpu", *options, **order)


@pytest.mark.parametrize("name", ["query", "select"])
def test_every_part_of_a_question_is_an_option(name: str) -> None:
    """Of both commands, so that they never drift."""
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    given = {parameter.name for parameter in found.params}
    wanted = {field.name for field in dataclasses.fields(Question)} - {"each", "fields"}
    assert wanted | {"fields__text", "fields__domain"} <= given


def test_prints_the_report(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    outcome = run(lab, built, val, tmp_path / "a.jsonl", "--count", "6", "--quota", "sky=2", "--quiet", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json == json.loads((tmp_path / "a.jsonl.report.json").read_text())
    made = select(built, val, tmp_path / "b.jsonl", count=6, quotas={"sky": 2})
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert outcome.json["settings"] == made.settings
    assert outcome.json["settings"]["quotas"] == {"sky": 2}


def test_prints_tables(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    report = tmp_path / "what.json"
    outcome = run(lab, built, val, tmp_path / "a.parquet", "--fraction", "0.2", "--report", str(report))
    assert outcome.code == 0, outcome.err
    assert "5 of 27 samples" in outcome.out
    for heading in ("by domain", "earth", "quantiles", "tokens of chosen", "median"):
        assert heading in outcome.out
    assert "reading the corpus" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "what.json", "what.rows.jsonl"]


def test_a_val_set_on_standard_input(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    outcome = run(lab, built, Path("-"), tmp_path / "a.jsonl", "--count", "6", "--json", stdin=str(val))
    assert outcome.code == 0, outcome.err
    assert outcome.json["settings"]["val_set"] == "-"
    select(built, val, tmp_path / "b.jsonl", count=6)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --fraction, --count, --threshold, --threshold-nats and --token-budget, not none"),
        (["--count", "3", "--fraction", "0.1"], "not --fraction and --count"),
        (["--fraction", "1.2"], "--fraction must be above 0 and at most 1, not 1.2"),
        (["--threshold", "nan"], "--threshold must be a finite number"),
        (
            ["--threshold", "2", "--metric", "cosine"],
            "nothing was chosen, and nothing was written: the best of 27 samples has the score 0",
        ),
        (["--token-budget", "1"], "nothing was chosen"),
        (["--count", "3", "--quota", "law=0.1"], "has no such domain; it has earth, sky"),
        (["--count", "3", "--quota", "sky=0.7", "--quota", "earth=0.7"], "add up to 1.4"),
        (["--count", "3", "--quota", "sky"], "'sky': expected DOMAIN=SHARE"),
        (["--count", "3", "--quota", "sky=many"], "'many' is neither a share"),
        (["--count", "3", "--quota", "sky=1", "--quota", "sky=2"], "'sky' has two quotas"),
        (["--count", "3", "--quota", "sky=1", "--quotas", "equal"], "give one of the two"),
        (["--threshold", "0.1", "--diversity", "mmr"], "leaves --diversity nothing to choose"),
        (["--count", "3", "--diversity-weight", "0.5"], "--diversity-weight belongs to --diversity"),
        (["--count", "3", "--candidates", "9"], "--candidates belongs to --diversity"),
        (["--count", "3", "--diversity", "mmr", "--diversity-weight", "1.1"], "between 0 .* and 1 .*, not 1.1"),
        (["--count", "3", "--diversity", "greats", "--diversity-weight", "-1"], "must be 0 or more, not -1"),
        (["--count", "3", "--diversity", "facility-location", "--diversity-weight", "1"], "has no weight"),
        (["--count", "9", "--diversity", "mmr", "--candidates", "4"], "4 is less than the 9 samples"),
        (["--count", "3", "--report", "report.txt"], "expected a name that ends in .json"),
        (["--count", "3", "--part", "other"], "other"),
        (["--count", "3", "--group-field", "task"], "no field 'task'"),
    ],
    ids=" ".join,
)
def test_bad_options(lab: Lab, built: Path, val: Path, tmp_path: Path, options: list[str], message: str) -> None:
    outcome = run(lab, built, val, tmp_path / "out.jsonl", *options, "--quiet")
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert re.search(message, outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_out_is_not_the_list_of_rows(lab: Lab, built: Path, val: Path, tmp_path: Path) -> None:
    """``--report a.json`` puts the list of rows at ``a.rows.jsonl``."""
    report = tmp_path / "a.json"
    outcome = run(lab, built, val, tmp_path / "a.rows.jsonl", "--count", "3", "--report", report)
    assert outcome.code == 2
    assert "the list of rows of --report" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.report.json", "out.jsonl.report.rows.jsonl"])
def test_nothing_is_written_over(lab: Lab, built: Path, val: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    outcome = run(lab, built, val, tmp_path / "out.jsonl", "--count", "3")
    assert outcome.code == 2
    assert f"{name} exists; nothing was written" in outcome.err
    assert lab.tree(tmp_path) == {name: b"mine"}


@pytest.mark.slow
def test_corpora_whose_rows_cannot_be_written(lab: Lab, val: Path, tmp_path: Path) -> None:
    out, corpus = tmp_path / "out.jsonl", lab.write(tmp_path / "corpus.jsonl", lab.rows)
    ghoststore.tokenize(data=corpus, tokenizer=lab.checkpoint, out=tmp_path / "tokens")
    for name, data in (("shards", tmp_path / "tokens"), ("gone", corpus)):
        assert lab.build(tmp_path / name, "--data", data).code == 0
    assert lab.build(tmp_path / "stdin", "--data", "-", stdin=str(corpus)).code == 0
    corpus.unlink()
    for name, message in (
        ("shards", "holds token shards: tokens, and not the rows"),
        ("gone", "corpus.jsonl: does not exist"),
        ("stdin", "was built on standard input or on data in memory, which cannot be read again"),
    ):
        with pytest.raises(UsageError, match=message):
            select(tmp_path / name, val, out, count=3)
    assert not list(tmp_path.glob("out*"))


def test_a_misspelt_option_of_the_question(built: Path, val: Path, tmp_path: Path) -> None:
    for option in ("metrik", "each"):
        with pytest.raises(TypeError, match=option):
            select(built, val, tmp_path / "out.jsonl", count=3, **{option: "dot"})


@pytest.mark.kill
@pytest.mark.thin
@pytest.mark.parametrize("out", ["out.jsonl", "out"])
@pytest.mark.parametrize("act", ["kill", "ENOSPC"])
def test_all_files_or_none(lab: Lab, built: Path, val: Path, tmp_path: Path, out: str, act: str) -> None:
    """Whatever the disk does while rows are written, no file has its name; the next call begins anew."""
    fault = {"call": "fsync", "path": r"\.out[./]", "act": act}
    outcome = run(lab, built, val, tmp_path / out, "--count", "3", fault=fault)
    assert outcome.code == (-9 if act == "kill" else 6), outcome.err
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    if act == "ENOSPC":
        assert os.listdir(tmp_path) == []
    assert len(source_rows(select(built, val, tmp_path / out, count=3))) == 3
