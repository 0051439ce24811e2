"""`where`: rows are chosen before they are ranked, so an answer is the one without it, cut down, however rows rank.

Where the scores of other rows count, too (ranks, a blend), the answer is held against the obvious computation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.store import Part, Run, Store
from query.ann.index import AnnIndex
from query.ask.groups import fused
from query.ask.question import Question
from query.search.part_score import Term
from query.search.search import search, similarities
from tests.support.made_parts import ROWS as MADE_ROWS
from tests.support.made_parts import UNUSABLE, clustered, make_part
from tests.support.notes import Notes
from tests.support.parts import opened_scorer
from tests.support.score_runs import run_on

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 90
PARTS = ("one", "two")
SOURCES = ("a", "b", "c", None)


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of the same rows, which keep the field ``source``; with the first's index."""
    folder = tmp_path_factory.mktemp("where")
    rows: list[dict[str, Any]] = [
        row | {"source": SOURCES[place % 4], "year": 2000 + place % 7}
        for place, row in enumerate(lab.sample_rows(ROWS, 1))
    ]
    rows[4]["text"] = ""
    data = lab.write(folder / "train.jsonl", rows)
    lab.write(folder / "val.jsonl", lab.sample_rows(6, 3))
    for name in PARTS:
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=data,
            store=folder / "store",
            name=name,
            device="cpu",
            projection=ProjectionConfig(rank_total=16, seed=len(name) if name == "one" else 3),
            span_rows=16,
            keep_fields=["source", "year"],
        )
    ghoststore.index(store=folder / "store", part="one", metric="cosine", factory="Flat")
    return folder / "store"


def ask(store: Path, **settings: Any) -> Any:
    settings = {"part": "one", "top_k": ROWS, "bottom_k": ROWS, "device": "cpu"} | settings
    return ghoststore.query(store=store, val_set=store.parent / "val.jsonl", **settings)


def matching(store: Path, sql: str) -> set[int]:
    """The usable rows that match one of the conditions below, by plain Python."""
    places = [place for place in range(ROWS) if place != 4]
    return {
        place
        for place in places
        if eval(EXPECTED[sql], {"source": SOURCES[place % 4], "year": 2000 + place % 7, "n": place})
    }


EXPECTED = {
    "source = 'b' AND year > 2002": "source == 'b' and year > 2002",
    "source IS NULL": "source is None",
    "id IN ('row-3', 'row-40', 'row-41')": "n in (3, 40, 41)",
    "source_row >= 64": "n >= 64",
}
SQL = "source = 'b' AND year > 2002"


def cut(hits: Any, rows: set[int], k: int) -> list[tuple[int, float]]:
    return [(hit.source_row, hit.score) for hit in hits if hit.source_row in rows][:k]


@pytest.mark.slow
@pytest.mark.parametrize("sql", EXPECTED)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"each": True, "metric": "dot"},
        {"group_field": "domain"},
        {"group_field": "domain", "combine": "max"},
        {"precondition": "second-moment", "damping": 1.0},
        {"part": list(PARTS), "part_weights": "equal"},
        {"layers": ["mlp"]},
        {"rerank": ROWS},
        {"index": "ann", "metric": "cosine"},
        {"index": "ann", "metric": "cosine", "rerank": ROWS},
        {"minus": "minus.jsonl"},
    ],
    ids=str,
)
def test_an_answer_cut_down(lab: Lab, store: Path, settings: dict[str, Any], sql: str) -> None:
    """The best and the worst, their ranks and scores, and how many rows there were."""
    if "minus" in settings:
        settings = settings | {"minus": lab.write(store.parent / "minus.jsonl", lab.sample_rows(4, 9))}
    rows = matching(store, sql)
    everything, found = ask(store, **settings), ask(store, where=sql, top_k=5, bottom_k=3, **settings)
    assert found.settings["where"] == sql
    assert found.settings["rows_matching"] == len(rows)
    assert "where" not in everything.settings
    for one, other in zip(found.results, everything.results, strict=True):
        assert one.query == other.query
        for hits, all_hits, k in ((one.hits, other.hits, 5), (one.bottom, other.bottom, 3)):
            expected = cut(all_hits, rows, k)
            assert [hit.rank for hit in hits] == list(range(1, len(expected) + 1))
            assert [hit.source_row for hit in hits] == [row for row, _ in expected]
            assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.slow
@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(
    strategies.lists(strategies.booleans(), min_size=MADE_ROWS, max_size=MADE_ROWS), strategies.integers(1, 9)
)
def test_any_rows_by_exact_search(made: Part, allowed: list[bool], k: int) -> None:
    """The scores that rank are those of all rows, less the rows that are not allowed; down to none."""
    mask = np.array(allowed)
    mask[100:150] = False  # a whole span
    term = questions(made)
    all_QN = similarities([term])
    best, worst = search([term], top_k=k, bottom_k=2, allowed_N=mask)
    some_QN = similarities([term], allowed_N=mask)
    np.testing.assert_array_equal(some_QN, np.where(mask, all_QN, np.nan))
    for query, scores_N in enumerate(some_QN):
        places = np.flatnonzero(np.isfinite(scores_N))
        ranked = places[np.lexsort((places, -scores_N[places]))]
        assert [row for row in best.rows[query].tolist() if row >= 0] == ranked[:k].tolist()
        assert sorted(row for row in worst.rows[query].tolist() if row >= 0) == sorted(ranked[-2:].tolist())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Part:
    return make_part(tmp_path_factory.mktemp("made") / "store", clustered())


def questions(part: Part) -> Term:
    return Term.of(part, torch.from_numpy(clustered(6, part.layout.dimension, seed=0)).double() + 0.1, metric="dot")


def test_of_a_part_without_a_model(made: Part) -> None:
    """Two domains by turns: the best of one, among its usable rows."""
    settings: dict[str, Any] = {"store": made.path.parent.parent, "part": made.name, "text": False, "device": "cpu"}
    everything = ghoststore.self_influence(**settings, top_k=MADE_ROWS, damping=1.0)
    found = ghoststore.self_influence(**settings, top_k=5, damping=1.0, where="domain = 'earth'")
    odd = {row for row in range(MADE_ROWS) if row % 2}
    assert [(hit.source_row, hit.score) for hit in found.results[0].hits] == cut(everything.results[0].hits, odd, 5)
    assert found.settings["rows_matching"] == len(odd - set(UNUSABLE))


FILTERED = [
    "Flat",
    "RaBitQ",
    "SQ8",
    "IVF8,Flat",
    "IVF8,SQ8",
    "HNSW16,Flat",
    "PCAR32,IVF8,SQ8",
    "IVF4,PQ8x4fs,Refine(SQ8)",
]
NOT_FILTERED = ["PQ8x4fs", "RaBitQfs"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("share", [0.5, 0.05])
@pytest.mark.parametrize("factory", [*FILTERED, *NOT_FILTERED])
def test_through_an_index(made: Part, factory: str, share: float) -> None:
    """Only rows that match, with the scores of exact search; all of them where the index scores as many anyway."""
    options: dict[str, Any] = {"store": made.path.parent.parent, "part": made.name, "metric": "dot", "rebuild": True}
    ghoststore.index(**options, factory=factory, name="filtered")
    index = AnnIndex.open(made, "filtered", metric="dot")
    index._searcher.candidates = 60
    mask = (np.random.default_rng(1).random(MADE_ROWS) < share) & np.isfinite(similarities([questions(made)])[0])
    found = index.search_among(questions(made), mask, top_k=5, bottom_k=2)
    exact = search([questions(made)], top_k=5, bottom_k=2, allowed_N=mask)
    if mask.sum() <= 60:
        assert found is not None
        for one, other in zip(found, exact, strict=True):
            np.testing.assert_array_equal(one.rows, other.rows)
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-12)
        return
    if factory in NOT_FILTERED:
        assert found is None
        return
    assert found is not None
    scores_QN = similarities([questions(made)])
    for ranking in found:
        for query, rows in enumerate(ranking.rows):
            assert mask[rows[rows >= 0]].all()
            np.testing.assert_allclose(ranking.scores[query][rows >= 0], scores_QN[query, rows[rows >= 0]], rtol=1e-12)
    if not any(coarse in factory for coarse in ("PQ", "PCA", "RaBitQ")):
        np.testing.assert_array_equal(found[0].rows, exact[0].rows)


@pytest.mark.slow
@pytest.mark.parametrize("factory", ["PQ8x4fs", "IVF32,Flat"])
def test_never_fewer_than_exact_search_gives(lab: Lab, store: Path, factory: str) -> None:
    """An index that cannot be filtered is followed by exact search, and a note; one with short lists looks at more."""
    ghoststore.index(store=store, part="one", metric="dot", factory=factory, name="poor", rebuild=True)
    index = AnnIndex.open(Store.open(store).part("one"), "poor", metric="dot")
    index._searcher.candidates = 1
    if factory == "IVF32,Flat":
        index._searcher.engine.set_effort(1)
    settings: dict[str, Any] = {"part": "one", "metric": "dot", "where": "source_row <> 5", "device": "cpu"}
    question, notes = Question(store=store, val_set=store.parent / "val.jsonl", **settings), Notes()
    with opened_scorer(question) as scorer:
        best, _ = scorer.rank(20, 0, notes, index=index)
        by_index = scorer.by_index
        exact, _ = scorer.rank(20, 0, notes)
    assert by_index == (factory == "IVF32,Flat")
    assert (best.rows >= 0).all()
    assert not (best.rows == 5).any()
    if not by_index:
        assert best.rows.tolist() == exact.rows.tolist()
        assert [note for note in notes.said if "the rows that match are searched exactly" in note] != []


@pytest.mark.slow
def test_ranks_are_among_those_that_match(store: Path) -> None:
    """Reciprocal ranks of all rows would order them otherwise."""
    settings: dict[str, Any] = {"group_field": "domain", "combine": "rank-fusion", "part": "one"}
    rows = sorted(matching(store, SQL))
    with opened_scorer(Question(store=store, val_set=store.parent / "val.jsonl", device="cpu", **settings)) as scorer:
        scores_QN = similarities(scorer.terms)
    masked = np.full_like(scores_QN, np.nan)
    masked[:, rows] = scores_QN[:, rows]
    expected = fused(masked)[0]
    hits = ask(store, where=SQL, **settings).results[0].hits
    assert [hit.source_row for hit in hits] == sorted(rows, key=lambda row: (-expected[row], row))
    assert [hit.score for hit in hits] == pytest.approx([expected[hit.source_row] for hit in hits])


@pytest.mark.slow
def test_a_blend_is_over_those_that_match(store: Path) -> None:
    """Means and deviations are of the rows that match and have both."""
    part = Store.open(store).part("one")
    value = run_on(store, "trained", part.column("source_row"), part.column("source_digest"))
    rows = [row for row in sorted(matching(store, SQL)) if np.isfinite(value[row])]
    similarity = {hit.source_row: hit.score for hit in ask(store).results[0].hits}
    pairs = np.array([[similarity[row], value[row]] for row in rows])
    standard = (pairs - pairs.mean(0)) / pairs.std(0)
    expected = dict(zip(rows, standard @ [0.7, 0.3], strict=True))
    found = ask(store, where=SQL, with_scores="trained", score_weight=0.3)
    assert {hit.source_row: hit.score for hit in found.results[0].hits} == pytest.approx(expected)
    assert found.settings["rows_blended"] == len(rows)


@pytest.mark.slow
def test_self_influence(store: Path) -> None:
    settings: dict[str, Any] = {"store": store, "part": "one", "top_k": ROWS, "device": "cpu"}
    everything = ghoststore.self_influence(**settings)
    found = ghoststore.self_influence(**settings, where=SQL)
    assert found.settings["rows_matching"] == len(matching(store, SQL))
    rows = matching(store, SQL)
    assert [(hit.source_row, hit.score) for hit in found.results[0].hits] == cut(everything.results[0].hits, rows, ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"count": 5},
        {"fraction": 0.5},
        {"token_budget": 60},
        {"count": 6, "quotas": "equal"},
        {"count": 6, "quotas": {"sky": 0.5}},
        {"count": 4, "diversity": "mmr"},
        {"count": 4, "diversity": "facility-location"},
        {"count": 4, "diversity": "greats"},
        {"threshold": -1.0, "metric": "cosine"},
    ],
    ids=str,
)
def test_select(store: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Every strategy chooses among what matches; shares are of that."""
    rows = matching(store, SQL)
    given: dict[str, Any] = {"store": store, "val_set": store.parent / "val.jsonl", "part": "one", "device": "cpu"}
    report = ghoststore.select(**given, out=tmp_path / "out.jsonl", where=SQL, **settings)
    lines = [json.loads(line) for line in Path(report.rows_file).read_text().splitlines()]
    assert {line["source_row"] for line in lines} <= rows
    assert report.available == len(rows) == report.settings["rows_matching"]
    if "fraction" in settings:
        assert report.samples == round(len(rows) / 2 + 1e-9)
    if settings == {"count": 5}:
        best = ask(store, where=SQL, top_k=5).results[0].hits
        assert {line["source_row"] for line in lines} == {hit.source_row for hit in best}
    if "threshold" in settings:
        assert report.samples == len(rows)


@pytest.mark.slow
def test_no_match_and_no_condition(store: Path) -> None:
    """Refused before a model is loaded, here from a checkpoint that is not there."""
    for where, message in (("year > 3000", "none of the 89 usable rows of part 'one'"), ("yeer > 3", "year BIGINT")):
        with pytest.raises(UsageError, match=message):
            ask(store, where=where, checkpoint=store / "nowhere")
    assert isinstance(Store.open(store).part("one"), Part)


@pytest.mark.slow
def test_a_note_says_how_many(store: Path) -> None:
    notes = Notes()
    ask(store, where=SQL, progress=notes)
    assert f"`where`: {len(matching(store, SQL))} of 89 usable rows match" in notes.said


@pytest.mark.slow
def test_a_table_says_that_no_more_match(lab: Lab, store: Path) -> None:
    given = ("--store", store, "--part", "one", "--val-set", store.parent / "val.jsonl", "--device", "cpu", "--quiet")
    for index in ("exact", "ann"):
        outcome = lab.run("query", *given, "--index", index, "--where", "source_row IN (1, 2)", "--top-k", "5")
        assert outcome.code == 0, outcome.err
        assert "2 of the 5 rows that were asked for: no more rows match --where" in outcome.out + outcome.err


@pytest.mark.slow
def test_scores_of_a_run(tmp_path: Path) -> None:
    """A sample of two windows matches where either does; a ranking and a table are of those that match."""
    from tests.support.score_runs import row_table, whole

    run: Run = whole(tmp_path)
    settings: dict[str, Any] = {"store": tmp_path, "run": run.name, "top_k": 30, "text": False}
    table = row_table()
    everything = ghoststore.scores(**settings)
    for sql, mask in (("domain = 'earth'", table.domain == 1), ("window_start > 0", table.window_start > 0)):
        rows = set(table.source_row[mask].tolist())
        found = ghoststore.scores(**settings, where=sql)
        assert [(hit.source_row, hit.value) for hit in found.hits] == [
            (hit.source_row, hit.value) for hit in everything.hits if hit.source_row in rows
        ]
        assert found.settings["rows_matching"] == len(rows)
    by = ghoststore.scores(store=tmp_path, run=run.name, by="domain", where="domain = 'earth'")
    assert by.domains is not None
    assert [entry.domain for entry in by.domains] == ["earth"]
    windows = ghoststore.scores(**settings, unit="window", where="window_start > 0")
    assert {hit.window_start for hit in windows.hits} == {31}
    with pytest.raises(UsageError, match="none of the 24 rows of run 'run'"):
        ghoststore.scores(**settings, where="n_tokens > 99")
    for other, message in (({"plot": tmp_path / "a.png"}, "`plot`"), ({"sample": "s1", "top_k": None}, "`where`")):
        with pytest.raises(UsageError, match=message):
            ghoststore.scores(**{**settings, **other}, where="domain = 'earth'")
