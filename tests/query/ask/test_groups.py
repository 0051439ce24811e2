"""Val sets with groups: a ranking a group, and one over all, against the obvious computation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import CorpusError, UsageError
from ghoststore.progress import Silent
from query.ask.encoder import ValVectors
from query.ask.groups import fused
from query.ask.question import Question
from query.search.search import similarities
from tests.support.parts import opened_scorer, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 50
GROUPS = ("b", "a", "b", "b", "c", "a", "c")


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    rows: list[dict[str, Any]] = lab.sample_rows(ROWS, 1)
    rows[4]["text"] = ""
    data = lab.write(folder / "train.jsonl", rows)
    val = [row | {"task": group} for row, group in zip(lab.sample_rows(len(GROUPS), 3), GROUPS, strict=True)]
    val.append({"id": "unusable", "text": "", "domain": "sky", "task": "d"})
    lab.write(folder / "val.jsonl", val)
    for name in ("train", "val"):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=data if name == "train" else folder / "val.jsonl",
            store=folder / "store",
            name=name,
            span_rows=16,
            projection=ProjectionConfig(precondition="none", rank_total=16),
            proj_dtype="float32",
            device="cpu",
        )
    return folder / "store"


def vectors(store: Path, part: str) -> np.ndarray:
    found = ghoststore.Store.open(store).part(part)
    return vectors_of(found).astype(np.float64)


def expected(store: Path, metric: str) -> np.ndarray:
    """(3 groups, rows): NaN where a row cannot be used."""
    rows, val = vectors(store, "train"), vectors(store, "val")[: len(GROUPS)]
    means = np.stack([val[[group == name for group in GROUPS]].mean(0) for name in "abc"])
    scores = means @ rows.T
    if metric == "cosine":
        scores /= np.linalg.norm(means, axis=1)[:, None] * np.maximum(np.linalg.norm(rows, axis=1), 1e-30)
    scores[:, 4] = np.nan
    return scores


def reciprocal(scores_QN: np.ndarray) -> np.ndarray:
    """Rank fusion in the slowest way."""
    total = np.zeros(scores_QN.shape[1])
    for scores in scores_QN:
        for row, score in enumerate(scores):
            better = sum(other > score or (other == score and at < row) for at, other in enumerate(scores))
            total[row] += 1 / (60 + 1 + better)
    return np.where(np.isnan(scores_QN[0]), np.nan, total)


COMBINED = {"mean": lambda s: s.mean(0), "max": lambda s: s.max(0), "rank-fusion": reciprocal}


@pytest.mark.thin
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("combine", list(COMBINED))
@pytest.mark.parametrize("top_k", [ROWS, 7])
def test_equals_the_obvious(store: Path, metric: str, combine: Any, top_k: int) -> None:
    scores = expected(store, metric)
    scores = np.concatenate([COMBINED[combine](scores)[None], scores])
    found = ghoststore.query(
        store=store,
        part="train",
        val_set=store.parent / "val.jsonl",
        group_field="task",
        combine=combine,
        metric=metric,
        top_k=top_k,
        bottom_k=3,
        device="cpu",
    )
    assert [result.query for result in found.results] == ["combined", "a", "b", "c"]
    for result, of_group in zip(found.results, scores, strict=True):
        order = np.lexsort((np.arange(ROWS), -of_group))[: min(top_k, ROWS - 1)]
        largest = np.nanmax(np.abs(of_group))
        assert [hit.source_row for hit in result.hits] == order.tolist()
        np.testing.assert_allclose([hit.score for hit in result.hits], of_group[order], atol=1e-5 * largest)
        lowest = np.lexsort((np.arange(ROWS), np.where(np.isnan(of_group), np.inf, of_group)))[:3]
        assert [hit.source_row for hit in result.bottom] == lowest.tolist()
    assert found.settings["mode"] == "groups"
    assert found.settings["groups"] == {"a": 2, "b": 3, "c": 2}
    assert found.settings["val_rows_left_out"] == {"empty": 1}


@pytest.mark.parametrize("settings", [{"each": True}, *({"group_field": "task", "combine": one} for one in COMBINED)])
def test_the_first_rankings_alone(store: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost no more memory than they are, where the others do not decide them."""
    question = Question(store=store, part="train", val_set=store.parent / "val.jsonl", device="cpu", **settings)
    with opened_scorer(question) as scorer:
        pass
    sizes = []

    def counted(terms: Any, **options: Any) -> Any:
        sizes.append(len(terms[0].queries_QD))
        return similarities(terms, **options)

    monkeypatch.setattr("query.ask.scorer.similarities", counted)
    first = scorer.scores(Silent(), 1)
    assert sizes == [1 if settings.get("combine") in (None, "mean") else 3]
    np.testing.assert_array_equal(first, scorer.scores(Silent())[:1])
    np.testing.assert_array_equal(first, scorer.scores(Silent(), 1))


def test_ties_and_missing_rows_in_rank_fusion() -> None:
    scores = np.array([[1.0, 3.0, 3.0, np.nan, 2.0], [2.0, 2.0, 2.0, np.nan, 9.0]])
    np.testing.assert_allclose(fused(scores)[0], reciprocal(scores))


def test_numbers_are_labels(lab: Lab, store: Path, tmp_path: Path) -> None:
    val = lab.write(tmp_path / "val.jsonl", [row | {"part": i % 2} for i, row in enumerate(lab.sample_rows(4))])
    found = ghoststore.query(store=store, part="train", val_set=val, group_field="part", device="cpu")
    assert [result.query for result in found.results] == ["combined", "0", "1"]


def test_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    rows = [row | {"task": "a"} for row in lab.sample_rows(3)]
    rows[1]["task"] = None
    empty = lab.write(tmp_path / "empty.jsonl", [{"text": "", "task": "a"}] * 2)
    holes = lab.write(tmp_path / "holes.jsonl", rows)
    lists = lab.write(tmp_path / "lists.jsonl", [{"text": "the cat runs", "task": ["a"]}])

    def ask(val_set: Path, **settings: Any) -> None:
        settings = {"group_field": "task"} | settings
        ghoststore.query(store=store, part="train", val_set=val_set, device="cpu", **settings)

    with pytest.raises(CorpusError, match="no field 'other'"):
        ask(holes, group_field="other")
    with pytest.raises(UsageError, match=r"'row-1' .* has no group"):
        ask(holes)
    with pytest.raises(CorpusError, match="field 'task'"):
        ask(lists)
    with pytest.raises(UsageError, match=r"no row of the val set .* can be used"):
        ask(empty)
    with pytest.raises(UsageError, match="give one of them"):
        ask(holes, each=True)
    with pytest.raises(UsageError, match="'median' is unknown"):
        ask(holes, combine="median")
    outcome = lab.run("query", "--store", store, "--part", "train", "--val-set", holes, "--group-field", "other")
    assert outcome.code == 2
    assert "'other'" in outcome.err
    assert "--group-field" in outcome.err


class Sent:
    """A val set whose gradients are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vectors: list[list[float]], ids: list[str]) -> None:
        made = ValVectors(vectors=torch.tensor(vectors), ids=ids, used=len(ids))
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # neither kept ones, nor these for others
        monkeypatch.setattr("query.ask.encoder.PartEncoder.encode_val_set", lambda *_: made)


def test_groups_that_cancel_are_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mean has no direction; the largest score of either is still one."""
    dimension = ghoststore.Store.open(store).part("train").layout.dimension
    Sent(monkeypatch, [[0.5] * dimension, [-0.5] * dimension], ["a", "b"])
    asked: dict[str, Any] = {"store": store, "part": "train", "group_field": "task", "device": "cpu"}
    with pytest.raises(UsageError, match=r"cancel each other.*`combine=max`"):
        ghoststore.query(val_set=store.parent / "val.jsonl", **asked)
    found = ghoststore.query(val_set=store.parent / "val.jsonl", combine="max", **asked)
    assert len(found.results[0].hits) == 10


def test_a_query_of_zeros_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dimension = ghoststore.Store.open(store).part("train").layout.dimension
    Sent(monkeypatch, [[0.5] * dimension, [0.0] * dimension], ["a", "b"])
    with pytest.raises(UsageError, match=r"the query 'b' is zero: .* Leave it out"):
        ghoststore.query(store=store, part="train", val_set=store.parent / "val.jsonl", each=True, device="cpu")


def test_a_group_with_the_name_of_all(lab: Lab, store: Path, tmp_path: Path) -> None:
    val = lab.write(tmp_path / "val.jsonl", [row | {"task": "combined"} for row in lab.sample_rows(2)])
    with pytest.raises(UsageError, match="is called 'combined'"):
        ghoststore.query(store=store, part="train", val_set=val, group_field="task", device="cpu")


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--combine", "max"], "--combine max belongs to --group-field"),
        (["--group-field", "task", "--domain-field", "domain"], "--domain-field and --group-field both name"),
        (["--layers", " , "], "names no layer"),
    ],
)
def test_no_option_is_ignored(lab: Lab, store: Path, options: list[str], message: str) -> None:
    outcome = lab.run("query", "--store", store, "--part", "train", "--val-set", store.parent / "val.jsonl", *options)
    assert outcome.code == 2
    assert message in outcome.err
