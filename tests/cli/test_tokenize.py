"""`ghoststore tokenize` as a command: tables and JSON on stdout, everything else on stderr, errors in a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_table_and_json(lab: Lab, tmp_path: Path) -> None:
    """Samples and tokens by domain; the second time nothing is left to do."""
    data = lab.write(tmp_path / "data.jsonl", [*lab.rows, {"id": "none", "text": "", "domain": None}])
    words = ["tokenize", "--data", data, "--tokenizer", lab.checkpoint, "--out", tmp_path / "shards"]
    first = lab.run(*words)
    assert first.code == 0, first.err
    assert "tokenizing" in first.err
    again = lab.run(*words, "--json")
    assert isinstance(again.json, dict)
    report = again.json
    assert [(domain["domain"], domain["samples"]) for domain in report["domains"]] == [
        ("earth", 13),
        ("sky", 14),
        (None, 1),
    ]
    assert sum(domain["tokens"] for domain in report["domains"]) == report["tokens"] > 0
    assert (report["samples"], report["resumed_samples"], report["empty_samples"]) == (28, 28, 1)
    assert {"total", "load", "scan", "tokenize"} == set(report["seconds"])
    table = [line.split() for line in first.out.splitlines()]
    for name, domain in zip(("earth", "sky", "(none)"), report["domains"], strict=True):
        assert [name, str(domain["samples"]), str(domain["tokens"])] in [line[:3] for line in table]
    assert ["all", "28", str(report["tokens"])] in table
    quiet = lab.run(*words, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--shard-samples", "0"], "--shard-samples must be at least 1"),
        (["--max-samples", "0"], "--max-samples must be at least 1"),
        (["--domain", "sea"], "'sea'"),
        (["--tokenizer", "{tmp}"], r"has no tokenizer"),
        (["--tokenizer", "{tmp}/absent"], r"tokenizer .*absent: there is no such folder"),
        (["--tokenizer", "{tmp}/file"], "is a file; give the folder"),
        (["--data", "{tmp}/absent.jsonl"], r"absent\.jsonl: does not exist"),
        (["--text-field", "words"], "no field 'words'"),
        (["--out", "{tmp}"], "holds no token shards; give a new folder"),
    ],
)
def test_refused(lab: Lab, options: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    given = {"--data": lab.corpus, "--tokenizer": lab.checkpoint, "--out": tmp_path / "shards"}
    given |= {options[0]: Path(options[1].format(tmp=tmp_path)) if options[0] in given else options[1]}
    outcome = lab.run("tokenize", *(str(word) for pair in given.items() for word in pair))
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert re.search(words, outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
