"""A store of format 1 as it was when the format was frozen (``tests/data/make_format1.py``): every version opens it,
verifies it, and finds the same numbers in it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ghoststore
from ghoststore import Store, TokenShards
from tests.support.frozen import decoded, digest

FROZEN = Path(__file__).parent.parent / "data" / "format1"
PARTS = ("learned", "plain")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy: a query leaves caches."""
    return Path(shutil.copytree(FROZEN, tmp_path / "frozen"))


@pytest.fixture
def expected() -> dict[str, Any]:
    frozen: dict[str, Any] = json.loads((FROZEN / "expected.json").read_text())
    return frozen


def test_it_is_what_was_written(folder: Path, expected: dict[str, Any]) -> None:
    report = ghoststore.verify(folder / "store")
    assert report.sound, report.damage
    assert (report.parts, report.runs) == (list(PARTS), ["run"])
    holds = ghoststore.info(folder / "store")
    assert {part.name: part.rows for part in holds.parts} == {name: expected["parts"][name]["rows"] for name in PARTS}
    assert all(part.complete for part in holds.parts)
    assert holds.parts[1].repeated_ids == {"ids": 1, "samples": 2}
    assert holds.parts[1].statuses["empty"] == 1


@pytest.mark.parametrize("name", PARTS)
def test_vectors(folder: Path, expected: dict[str, Any], name: str) -> None:
    assert digest(decoded(Store.open(folder / "store").part(name))) == expected["parts"][name]["vectors"]


@pytest.mark.parametrize("name", PARTS)
def test_a_query(folder: Path, expected: dict[str, Any], name: str) -> None:
    """With the model as it was saved: the projection is drawn, or read, and is still the part's own."""
    answer = ghoststore.query(
        store=folder / "store",
        part=name,
        val_set=folder / "val.jsonl",
        checkpoint=folder / "model",
        device="cpu",
        metric="cosine",
        top_k=12,
    )
    hits = answer.results[0].hits
    frozen = expected["parts"][name]["hits"]
    assert [[hit.id, hit.source_row] for hit in hits] == [hit[:2] for hit in frozen]
    assert [hit.score for hit in hits] == pytest.approx([hit[2] for hit in frozen], rel=1e-3, abs=1e-4)
    texts = [hit.text for hit in hits]
    rows = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    assert texts == ([rows[hit.source_row] for hit in hits] if name == "plain" else [None] * len(hits))


def test_scores_of_the_run(folder: Path, expected: dict[str, Any]) -> None:
    run, frozen = Store.open(folder / "store").run("run"), expected["run"]
    assert run.steps == frozen["steps"]
    assert digest(run.read_committed("score")) == frozen["score"]
    assert run.rows.read("sample_id", 0, len(run.rows)).tolist() == frozen["sample_id"]
    top = ghoststore.scores(store=folder / "store", weight="learning-rate", top_k=12).hits
    assert [[hit.id, hit.value] for hit in top] == frozen["top"]


def test_token_shards(folder: Path, expected: dict[str, Any]) -> None:
    shards = TokenShards.open(folder / "shards", verify=True)
    assert [shards.tokens_of(sample).tolist() for sample in range(shards.samples)] == expected["shards"]
    assert shards.tokenizer.tokenize("the cat") == ["the", "cat"]
