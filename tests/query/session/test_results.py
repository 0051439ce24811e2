"""Results in a notebook: sequences, tables, short words and HTML."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ghoststore import QueryResult, ScoresResult
from query.answer.results import BlendedHit, Hit, QueryHits, RunHit
from query.common.notebook import SHOWN_CHARACTERS, SHOWN_ROWS, SHOWN_TABLES
from query.training_scores.results import DomainScores, HistoryEntry, ScoreHit, ScoreSummary

LONG = "<script>alert('x')</script> & " + "word " * 400


def hits(count: int, kind: type[Hit] = Hit, **more: Any) -> list[Hit]:
    return [
        kind(rank=i, score=1 / i, id=f"row-{i}", source_row=i, domain=None, text=LONG, window_start=0, **more)
        for i in range(1, count + 1)
    ]


def result(*rankings: QueryHits) -> QueryResult:
    return QueryResult(store="s", settings={"part": "p", "metric": "dot", "bottom_k": 0}, results=list(rankings))


MATH = QueryHits(query="math", hits=hits(30), bottom=hits(2))
CODE = QueryHits(query="code", hits=hits(3), bottom=[])


def test_a_result_is_the_sequence_of_its_rankings() -> None:
    answer = result(MATH, CODE)
    assert (len(answer), len(answer[0]), answer["code"]) == (2, 30, CODE)
    assert [ranking.query for ranking in answer] == ["math", "code"]
    assert answer[-1][0].id == "row-1"
    assert [hit.rank for hit in answer[1]] == [1, 2, 3]
    assert answer[0][1:3] == MATH.hits[1:3]
    assert answer[:1] == [MATH]
    with pytest.raises(KeyError, match="0 of 2 rankings are called 'x'; their names are 'math', 'code'"):
        answer["x"]
    with pytest.raises(KeyError, match="2 of 2 rankings are called 'code'"):
        result(CODE, CODE)["code"]
    with pytest.raises(IndexError):
        answer[2]
    empty = QueryHits(query="none", hits=[], bottom=[])
    assert all((empty, result(empty), not len(empty)))


@pytest.mark.parametrize("kind", [Hit, BlendedHit, RunHit])
def test_tables_have_the_flat_rows(kind: type[Hit]) -> None:
    more: dict[str, Any] = {BlendedHit: {"similarity": 0.5, "value": None}, RunHit: {"times": 2, "last_step": 7}}.get(
        kind, {}
    )
    answer = result(QueryHits(query="mean", hits=hits(3, kind, **more), bottom=hits(1, kind, **more)))
    table, frame = answer.to_arrow(), answer.to_pandas()
    assert table.to_pylist() == list(answer.rows())
    assert list(frame.columns) == table.column_names
    assert frame["score"].tolist() == [1.0, 1 / 2, 1 / 3, 1.0]
    assert frame["list"].tolist() == ["top", "top", "top", "bottom"]
    assert frame["rank"].dtype == np.int64
    assert result().to_pandas().empty


def test_words_are_short() -> None:
    answer = result(MATH, CODE, *[CODE] * 50)
    assert repr(answer) == (
        "<answer of 'p' by dot: <ranking 'math': 30 hits, best 1 'row-1', 2 lowest>, "
        "<ranking 'code': 3 hits, best 1 'row-1'>, … 50 more>"
    )
    assert len(repr(MATH.hits[0])) < 140
    assert repr(MATH.hits[2]).startswith("Hit(rank=3, score=0.333333, id='row-3', text=\"<script>")


def test_html_is_escaped_and_cut() -> None:
    shown = result(MATH)._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; word" in shown
    assert shown.count("<tr>") == 2 + SHOWN_ROWS + 2
    assert "… and 10 more" in shown
    assert "domain" not in shown
    assert "window_start" not in shown
    assert len(shown) < (SHOWN_ROWS + 4) * (SHOWN_CHARACTERS + 900)
    many = result(*[CODE] * 9)._repr_html_()
    assert many.count("<table>") == SHOWN_TABLES
    assert "… and 4 more rankings" in many
    assert "no hits" in QueryHits(query="a<b", hits=[], bottom=[])._repr_html_()
    assert "a&lt;b" in QueryHits(query="a<b", hits=[], bottom=[])._repr_html_()


def test_html_says_what_a_ranking_is_of() -> None:
    """As the command does: of the answer, which knows the metric and the groups, and of a ranking alone."""
    mean = QueryHits(query="mean", hits=CODE.hits, bottom=CODE.bottom)
    shown = result(mean)._repr_html_()
    assert "nearest to the val set&#x27;s mean gradient" in shown
    assert "ranking" not in shown
    assert "highest scores for the val set&#x27;s mean gradient" in mean._repr_html_()
    assert "farthest from math" in result(MATH)._repr_html_()
    groups = QueryResult(
        store="s", settings={"metric": "cosine", "group_field": "domain", "combine": "max"}, results=[mean]
    )
    assert "nearest to mean<" in groups._repr_html_()
    itself = QueryResult(store="s", settings={"metric": "self-influence"}, results=[replace(mean, query="self")])
    assert "highest self-influence" in itself._repr_html_()


def scores(**given: Any) -> ScoresResult:
    counts: dict[str, Any] = dict.fromkeys(ScoreSummary.__dataclass_fields__, 0)
    summary = ScoreSummary(**{**counts, "gaps": [], "steps": 4, "repeated_ids": None})
    settings = {"run": "r", "bottom_k": 0}
    return ScoresResult(**{"store": "s", "settings": settings, "summary": summary, "hits": [], "bottom": [], **given})


def test_scores_are_sequences_and_tables_too() -> None:
    hit = ScoreHit(
        rank=1,
        value=2.0,
        id="a",
        source_row=0,
        domain="d",
        times=3,
        mean_score=0.5,
        negative_share=0.0,
        last_step=3,
        text=LONG,
        window_start=0,
    )
    entry = HistoryEntry(
        step=1,
        rank=1,
        source_row=0,
        window_start=0,
        loss=None,
        learning_rate=0.1,
        score=0.2,
        weighted=0.3,
        cumulative=0.3,
    )
    domain = DomainScores(
        domain=None,
        rows=1,
        scored_rows=1,
        times=1,
        value_per_row=1.0,
        value_per_time=1.0,
        value_sum=1.0,
        negative_share=0.0,
        mean_score=1.0,
        standard_error=None,
    )
    for given, item, words in (
        ({"hits": [hit]}, hit, "<scores of run 'r': 1 hits of 4 steps>"),
        ({"history": [entry]}, entry, "<scores of run 'r': 1 steps of a sample of 4 steps>"),
        ({"domains": [domain]}, domain, "<scores of run 'r': 1 domains of 4 steps>"),
    ):
        answer = scores(**given)
        assert (len(answer), list(answer), answer[0]) == (1, [item], item)
        assert repr(answer) == words
        assert answer.to_arrow().to_pylist() == list(answer.rows())
        assert len(answer.to_pandas()) == 1
        assert "<script" not in answer._repr_html_()
    assert scores()
    assert "<table>" in scores()._repr_html_()


def test_short_words_are_in_the_unit_of_the_tables() -> None:
    ranking = QueryHits(query="math", hits=hits(2, nats=0.0123456), bottom=[])
    assert repr(ranking) == "<ranking 'math': 2 hits, best nats=0.0123 'row-1'>"
    assert repr(ranking[0]).startswith("Hit(rank=1, nats=0.0123, id='row-1'")
