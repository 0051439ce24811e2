"""What is wrong at first sight is refused before torch is imported, in the words of the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from ghoststore.cli.early import refuse_early
from ghoststore.errors import CorpusError, GhostStoreError
from ghoststore.progress import Silent
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.question import QueryOptions
from ghoststore.settings.store import RepairOptions

if TYPE_CHECKING:
    from tests.conftest import Lab

CODE = """
import sys
from ghoststore.cli import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
    print("imported", sorted(heavy), file=sys.stderr)
"""


def refused(folder: Path, *words: str) -> str:
    """What the command prints, which ends with code 2 and has imported nothing that is heavy."""
    done = subprocess.run([sys.executable, "-c", CODE, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("imported []\n"), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("query --store here --val-set none.jsonl", "none.jsonl: does not exist"),
        ("query --store here --val-set none*.jsonl", "none*.jsonl: no file has such a name"),
        ("query --store none --val-set val.jsonl", "there is no store at none"),
        ("query --store here", "give --val-set: what is asked for is near its gradient"),
        ("query --store here --val-set val.jsonl --rerank-with cg", "--rerank-with cg belongs to --rerank"),
        ("query --store here --val-set val.jsonl --rerank 0", "must be at least 1"),
        ("query --store here --val-set val.jsonl --minus none.csv", "none.csv: does not exist"),
        ("query --store here --val-set val.jsonl --checkpoint empty", "checkpoint empty has no config.json"),
        ("select --store here --val-set none.jsonl --count 3 --out out.jsonl", "none.jsonl: does not exist"),
        ("evaluate --store here --val-set none.jsonl --out out", "none.jsonl: does not exist"),
        ("self-influence --store none", "there is no store at none"),
        ("build --checkpoint empty --data val.jsonl --store new", "checkpoint empty has no config.json"),
        ("build --checkpoint none.pt --data val.jsonl --store new", "checkpoint none.pt: there is no such file"),
        ("build --checkpoint empty --data val.jsonl --data none.txt --store new", "none.txt: does not exist"),
        ("train --data none.jsonl --architecture GPT2-Tiny --tokenizer empty --output-dir out", "none.jsonl"),
        ("tokenize --data none.jsonl --tokenizer empty --out out", "none.jsonl: does not exist"),
    ],
)
@pytest.mark.slow
def test_refused_at_once(tmp_path: Path, words: str, said: str) -> None:
    ghoststore.Store.create(tmp_path / "here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "val.jsonl").write_text('{"text": "one row"}\n')
    before = sorted(tmp_path.rglob("*"))
    assert said in refused(tmp_path, *words.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_in_the_words_of_the_library(lab: Lab, tmp_path: Path) -> None:
    """What is refused here is what the function would refuse."""
    with pytest.raises(GhostStoreError) as error:
        ghoststore.build(checkpoint=lab.checkpoint, data=str(tmp_path / "none.jsonl"), store=tmp_path / "store")
    words = ("--checkpoint", str(lab.checkpoint), "--data", str(tmp_path / "none.jsonl"), "--store", "store")
    assert str(error.value) in refused(tmp_path, "build", *words)


def test_what_may_be_gone_is_left_to_the_command(lab: Lab, built: Path, tmp_path: Path) -> None:
    """The corpus behind stored rows, of which a result has texts; what `repair` may need."""
    gone = str(tmp_path / "gone")
    given = {"store": built, "val_set": lab.corpus, "data": gone}
    refuse_early("query", QueryOptions, given, Silent())
    refuse_early("repair", RepairOptions, {"store": built, "data": gone, "checkpoint": gone}, Silent())
    with pytest.raises(CorpusError, match="does not exist"):
        refuse_early("query", QueryOptions, given | {"minus": gone}, Silent())


@pytest.mark.parametrize("data", ["-", "s3://bucket/rows.jsonl", "org/name:train", "val.jsonl"])
def test_what_may_be_there_is_left_to_the_command(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    """Standard input, a corpus in a bucket or of the hub, which nothing here can reach."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "val.jsonl").write_text('{"text": "one row"}\n')
    refuse_early("build", BuildOptions, {"checkpoint": lab.checkpoint, "data": data, "store": "store"}, Silent())
