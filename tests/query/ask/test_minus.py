"""`--minus`: a val set to be far from. Its mean gradient is subtracted; against dense vectors.

Both val sets are built into parts of their own: their stored vectors are the queries.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from ghoststore.store import Store
from query.answer.contributions import Contributions, contributions
from query.ask.groups import fused
from query.ask.question import Question
from query.search.part_score import Term
from query.search.search import similarities
from tests.support.made_parts import clustered, make_part
from tests.support.parts import opened_scorer, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 40
GROUPS = ("b", "a", "b", "b", "c", "a", "c")
PLAIN = ProjectionConfig(precondition="none", rank_total=16)


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of the corpus and of both val sets; each val set has a row without a gradient."""
    folder = tmp_path_factory.mktemp("minus")
    lab.write(folder / "train.jsonl", lab.sample_rows(ROWS, 1))
    empty = {"id": "unusable", "text": "", "domain": "sky", "task": "d"}
    val = [row | {"task": group} for row, group in zip(lab.sample_rows(len(GROUPS), 3), GROUPS, strict=True)]
    lab.write(folder / "val.jsonl", [*val, empty])
    lab.write(folder / "far.jsonl", [empty, *lab.sample_rows(5, 8)])
    for name in ("train", "val", "far"):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=folder / f"{name}.jsonl",
            store=folder / "store",
            name=name,
            span_rows=16,
            projection=PLAIN,
            proj_dtype="float32",
            device="cpu",
        )
    return folder / "store"


def test_a_query_less_a_vector(tmp_path: Path) -> None:
    """In the chosen blocks alone; by cosine of length 1. A vector that is the query, up to rounding, is refused."""
    part = make_part(tmp_path / "store", clustered(60))
    queries, minus = (torch.from_numpy(clustered(count, part.layout.dimension, seed=count)) for count in (3, 1))
    mask = torch.zeros(part.layout.dimension, dtype=torch.float64)
    mask[: part.groups[0][2]] = 1.0
    expected = (queries.double() - minus.double()) * mask
    for metric in ("dot", "cosine"):
        term = Term.of(part, queries, metric=metric, groups=[0], minus_D=minus[0])
        lengths = expected.norm(dim=1, keepdim=True) if metric == "cosine" else 1.0
        torch.testing.assert_close(term.queries_QD, expected / lengths)
    with pytest.raises(UsageError, match="the query 'b' and the mean of `minus` have the same gradient"):
        Term.of(part, queries, metric="dot", names=list("abc"), minus_D=queries[1] * (1 + 1e-6))
    with pytest.raises(UsageError, match="the mean gradient of `minus` is zero"):
        Term.of(part, queries, metric="dot", minus_D=minus[0] * 0)


def files(store: Path) -> dict[str, Any]:
    folder = store.parent
    return {
        "store": store,
        "part": "train",
        "val_set": folder / "val.jsonl",
        "minus": folder / "far.jsonl",
        "device": "cpu",
    }


def ask(store: Path, **settings: Any) -> Any:
    return ghoststore.query(**{**files(store), "top_k": ROWS, "metric": "dot", **settings})


def vectors(store: Path, name: str) -> np.ndarray:
    """Of the usable rows, float64."""
    part = Store.open(store).part(name)
    return vectors_of(part).astype(np.float64)[part.usable()]


def queries(store: Path, settings: dict[str, Any]) -> np.ndarray:
    val = vectors(store, "val")
    if settings.get("each"):
        return val
    if "group_field" in settings:
        return np.stack([val[[group == name for group in GROUPS]].mean(0) for name in "abc"])
    return val.mean(0, keepdims=True)


def unit(vectors_QD: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    return vectors_QD / np.sqrt(((vectors_QD @ inverse) * vectors_QD).sum(1, keepdims=True))


def dense(store: Path, settings: dict[str, Any]) -> np.ndarray:
    """(Q, rows): the scores by plain algebra, the combined ranking first."""
    rows, far, near = vectors(store, "train"), vectors(store, "far").mean(0, keepdims=True), queries(store, settings)
    inverse = np.eye(rows.shape[1])
    if settings.get("precondition"):
        groups = Store.open(store).part("train").groups
        second, eigenvalues = rows.T @ rows / len(rows), np.square(rows).mean()
        inverse = np.zeros_like(inverse)
        for _, start, stop in groups:
            block = second[start:stop, start:stop] + 0.1 * eigenvalues * np.eye(stop - start)
            inverse[start:stop, start:stop] = np.linalg.inv(block)
    if settings.get("layers"):
        groups = Store.open(store).part("train").groups
        mask = np.concatenate([np.full(stop - start, "mlp" in name) for name, start, stop in groups])
        rows, far, near = rows * mask, far * mask, near * mask
    if settings.get("metric") == "cosine":
        scores = unit(near - far, inverse) @ inverse @ unit(rows, inverse).T
    else:
        scores = (near - far) @ inverse @ rows.T
    combined = {"mean": lambda s: s.mean(0)[None], "max": lambda s: s.max(0)[None], "rank-fusion": fused}
    if "group_field" in settings:
        scores = np.concatenate([combined[settings.get("combine", "mean")](scores), scores])
    return scores


CASES: list[dict[str, Any]] = [
    {},
    {"each": True},
    {"group_field": "task"},
    {"group_field": "task", "combine": "max"},
    {"group_field": "task", "combine": "rank-fusion"},
    {"layers": ["mlp"]},
    {"precondition": "second-moment"},
    {"rerank": ROWS, "rerank_with": "vectors"},
]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_as_dense_vectors_give_it(store: Path, settings: dict[str, Any], metric: str) -> None:
    found = ask(store, metric=metric, **settings)
    expected = dense(store, {"metric": metric, **settings})
    for result, scores in zip(found.results, expected, strict=True):
        by_row = np.array([hit.score for hit in sorted(result.hits, key=lambda hit: hit.source_row)])
        np.testing.assert_allclose(by_row, scores, atol=1e-4 * np.abs(scores).max())
        assert [hit.score for hit in result.hits] == sorted((hit.score for hit in result.hits), reverse=True)
    far = store.parent / "far.jsonl"
    assert found.settings["minus"] == str(far)
    assert (found.settings["minus_rows"], found.settings["minus_rows_left_out"]) == (5, {"empty": 1})


@pytest.mark.slow
def test_scores_are_a_difference(store: Path) -> None:
    """By dot, of those for either val set; by cosine the same, in the length of the difference and of the row."""

    def scores(**settings: Any) -> np.ndarray:
        hits = ask(store, **settings).results[0].hits
        return np.array([hit.score for hit in sorted(hits, key=lambda hit: hit.source_row)])

    near, away = scores(minus=None), scores(val_set=store.parent / "far.jsonl", minus=None)
    np.testing.assert_allclose(scores(), near - away, atol=1e-4 * np.abs(near).max())
    lengths = np.linalg.norm(vectors(store, "train"), axis=1)
    length = np.linalg.norm(vectors(store, "val").mean(0) - vectors(store, "far").mean(0))
    np.testing.assert_allclose(scores(metric="cosine"), (near - away) / lengths / length, atol=1e-4)


@pytest.mark.slow
def test_of_several_parts(lab: Lab, store: Path, tmp_path: Path) -> None:
    """Each at its own checkpoint: the sum of the differences."""
    other = lab.model(tmp_path / "other", seed=1)
    for name, model in (("first", lab.checkpoint), ("second", other)):
        ghoststore.build(
            checkpoint=model,
            data=store.parent / "train.jsonl",
            store=tmp_path / "store",
            name=name,
            projection=PLAIN,
            proj_dtype="float32",
            device="cpu",
        )
    both = files(store) | {"store": tmp_path / "store", "top_k": ROWS, "metric": "dot"}

    def scores(parts: Any, **settings: Any) -> np.ndarray:
        hits = ghoststore.query(**{**both, "part": parts, **settings}).results[0].hits
        return np.array([hit.score for hit in sorted(hits, key=lambda hit: hit.source_row)])

    alone = [scores(name) for name in ("first", "second")]
    np.testing.assert_allclose(
        scores(["first", "second"], part_weights=[1.0, 0.5]), alone[0] + 0.5 * alone[1], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_select_and_index(store: Path, tmp_path: Path) -> None:
    best = [hit.source_row for hit in ask(store, top_k=6).results[0].hits]
    report = ghoststore.select(**files(store), metric="dot", out=tmp_path / "out.jsonl", count=6)
    lines = [json.loads(line) for line in Path(report.rows_file).read_text().splitlines()]
    assert {line["source_row"] for line in lines} == set(best)
    assert report.settings["minus_rows"] == 5
    ghoststore.index(store=store, part="train", metric="dot", factory="Flat")
    assert [hit.source_row for hit in ask(store, index="ann", top_k=6).results[0].hits] == best


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_layers_of_the_report_sum_to_the_score(lab: Lab, store: Path, tmp_path: Path, metric: Any) -> None:
    """Also where they are computed again before the sketch: then to the score of blocks that were never sketched."""
    for name, compress in (("sketched", 24), ("exact", "none")):
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=store.parent / "train.jsonl",
            store=tmp_path / "store",
            name=name,
            projection=ProjectionConfig(
                precondition="none", layers=("attn",), rank_total=None if compress == 24 else "full", compress=compress
            ),
            proj_dtype="float32",
            device="cpu",
        )
    rows = [3, 7, 20]
    for where, part, scored in ((store, "train", "train"), (tmp_path / "store", "sketched", "exact")):
        given = {**files(store), "store": where, "metric": metric}
        with opened_scorer(Question(**{**given, "part": scored})) as scorer:
            scores_N = similarities(scorer.terms)[0]
        with opened_scorer(Question(**{**given, "part": part}), keep_model=True) as scorer:
            shares = contributions(scorer, [rows], Silent())
        assert isinstance(shares, Contributions)
        summed = [shares.of[0][row].sum() for row in rows]
        np.testing.assert_allclose(summed, scores_N[rows], atol=1e-4 * np.abs(scores_N).max())


@pytest.mark.slow
def test_what_tells_nothing_apart_is_refused(lab: Lab, store: Path, tmp_path: Path) -> None:
    val = store.parent / "val.jsonl"
    with pytest.raises(UsageError, match=r"is the val set itself.*Give another one"):
        ask(store, minus=val, checkpoint=tmp_path / "nowhere")
    copied = tmp_path / "copy.jsonl"
    lines = val.read_text().splitlines(keepends=True)
    copied.write_text("".join(reversed(lines)))
    for metric in ("dot", "cosine"):
        with pytest.raises(UsageError, match="'mean' and the mean of `minus` have the same gradient, up to rounding"):
            ask(store, minus=copied, metric=metric)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(lines[2])
    with pytest.raises(UsageError, match="'row-2' and the mean of `minus` have the same gradient"):
        ask(store, minus=twice, each=True)
    with pytest.raises(UsageError, match=r"no row of the val set .*empty.jsonl can be used"):
        ask(store, minus=lab.write(tmp_path / "empty.jsonl", [{"text": ""}]))
    with pytest.raises(UsageError, match="`minus` is for a val set"):
        ghoststore.query(store=store, run="any", minus=val)


@pytest.mark.slow
def test_on_the_command_line(lab: Lab, store: Path) -> None:
    given = [word for name, value in files(store).items() for word in (f"--{name.replace('_', '-')}", value)]
    outcome = lab.run("query", *given, "--metric", "dot", "--top-k", "3", "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    expected = [hit.source_row for hit in ask(store, top_k=3).results[0].hits]
    assert [hit["source_row"] for hit in outcome.json["results"][0]["hits"]] == expected
    outcome = lab.run("query", *given, "--minus", store.parent / "val.jsonl")
    assert outcome.code == 2
    assert "--minus" in outcome.err


@pytest.mark.parametrize(
    "settings", [{}, {"lexical": 0.5}, {"rerank": 20, "top_k": 9}, {"rerank": 20, "top_k": 9, "rerank_with": "vectors"}]
)
def test_the_first_samples_of_the_val_set_leave_minus_whole(
    store: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """`max_samples` says so of the val set. It cut both."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((store.parent / "val.jsonl").read_text().splitlines(keepends=True)[:3]))

    def ranking(**others: Any) -> list[tuple[Any, float]]:
        return [
            (hit.id, pytest.approx(hit.score, rel=1e-5)) for hit in ask(store, **settings, **others).results[0].hits
        ]

    assert ranking(max_samples=3) == ranking(val_set=few)
