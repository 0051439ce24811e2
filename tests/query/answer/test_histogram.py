"""`ghoststore query --histogram`: counts of all scores, by hand; its refusals; the chart of the command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import UsageError
from query.search.counts import BINS, bins_of

if TYPE_CHECKING:
    from tests.conftest import Lab

VAL = [{"text": "the old dog runs", "task": "a"}, {"text": "a river", "task": "b"}]


@pytest.fixture(scope="module")
def built(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: words are kept in it."""
    return Path(shutil.copytree(built, tmp_path_factory.mktemp("own") / built.name))


def ask(built: Path, **options: Any) -> ghoststore.QueryResult:
    return ghoststore.query(store=built, val_set=VAL, device="cpu", **options)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"each": True},
        {"group_field": "task", "combine": "max"},
        {"metric": "cosine", "where": "domain = 'sky'"},
        {"lexical": 0.5},
    ],
    ids=["mean", "each", "groups", "some", "words"],
)
def test_counts_are_of_all_rows(built: Path, options: dict[str, Any]) -> None:
    every = ask(built, top_k=10_000, **options)
    found = ask(built, top_k=3, histogram=True, **options)
    plain = ask(built, top_k=3, bottom_k=2, **options)
    again = ask(built, top_k=3, bottom_k=2, histogram=True, **options)
    for one, other in zip(plain, again, strict=True):  # ranked by the scores that are counted: the same
        assert (one.hits, one.bottom) == (other.hits, other.bottom)
    for of_all, ranking in zip(every, found, strict=True):
        counted = ranking.histogram
        assert counted is not None
        scores = np.array([hit.score for hit in of_all])
        assert (counted.low, counted.high) == (pytest.approx(scores.min()), pytest.approx(scores.max()))
        assert counted.rows == sum(counted.counts) == len(scores)
        edges = np.linspace(counted.low, counted.high, BINS + 1)
        inside = [((scores >= edges[b] - 1e-12) & (scores <= edges[b + 1] + 1e-12)).sum() for b in range(BINS)]
        assert all(count <= most for count, most in zip(counted.counts, inside, strict=True))
        assert counted.counts[-1] >= 1 <= counted.counts[0]
        for domain in counted.domains:
            assert domain.rows == sum(hit.domain == domain.domain for hit in of_all)
            assert domain.hits == sum(hit.domain == domain.domain for hit in ranking)
        assert sum(domain.rows for domain in counted.domains) == len(scores)


def test_equal_scores_are_in_the_middle() -> None:
    counts = bins_of(np.array([2.0, 2.0 + 1e-13]), 2.0, 2.0 + 1e-13)
    assert (counts.argmax(), counts.sum()) == (BINS // 2, 2)


def test_json_has_it_where_it_was_asked_for(built: Path, lab: Lab, tmp_path: Path) -> None:
    assert "histogram" not in ask(built).to_json()["results"][0]
    val = lab.write(tmp_path / "val.jsonl", VAL)
    words = ["query", "--store", built, "--val-set", val, "--histogram"]
    found = lab.run(*words, "--json").json["results"][0]["histogram"]
    assert set(found) == {"rows", "low", "high", "counts", "domains"}
    printed = lab.run(*words).out
    assert f"Scores of {found['rows']:,} rows, " in printed
    assert "▁" in printed or "█" in printed
    for domain in found["domains"]:
        assert f"{domain['domain']}: {domain['hits']} listed of {domain['rows']} rows" in printed


def test_refused(built: Path) -> None:
    with pytest.raises(UsageError, match="`rerank=20` gives those of some alone"):
        ask(built, histogram=True, rerank=20)
    with pytest.raises(UsageError, match="`index=ann` gives those of some alone"):
        ask(built, histogram=True, index="ann")
    with pytest.raises(UsageError, match="`histogram` is for parts"):
        ghoststore.query(store=built, run="r", histogram=True)
