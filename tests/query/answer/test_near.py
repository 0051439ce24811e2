"""`ghoststore query --near ROW`: against products of stored vectors; windows; refusals; the command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.settings.option import choices_of, members_of, options_of
from ghoststore.settings.question import QueryOptions
from ghoststore.store import Store
from query.answer.near import TAKEN
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS = 24


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts in one bit, and in float32 with windows, of which row 7 has several; row 5 has no vector."""
    folder = tmp_path_factory.mktemp("near")
    rows = lab.sample_rows(ROWS, 1)
    rows[5] = rows[5] | {"text": ""}
    rows[7] = rows[7] | {"text": " ".join([rows[7]["text"], rows[8]["text"], rows[9]["text"]])}
    lab.write(folder / "train.jsonl", rows)
    for name, options in {
        "onebit": {},
        "windows": {
            "max_length": 12,
            "overlong": "window",
            "projection": ProjectionConfig(precondition="none", rank_total=16),
            "proj_dtype": "float32",
        },
    }.items():
        ghoststore.build(
            checkpoint=lab.checkpoint, data=folder / "train.jsonl", store=folder / "store", name=name, device="cpu",
            span_rows=8, **options,
        )  # fmt: skip
    return folder / "store"


@pytest.mark.parametrize("part", ["onebit", "windows"])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_equals_products_of_stored_vectors(store: Path, part: str, metric: str) -> None:
    opened = Store.open(store).part(part)
    vectors = vectors_of(opened).astype(np.float64)
    source, usable = opened.column("source_row"), opened.usable()
    own = (source == 7) & usable
    assert own.sum() == 1 if part == "onebit" else own.sum() > 1
    query = vectors[own].mean(0)
    expected = vectors @ query
    if metric == "cosine":
        lengths = np.linalg.norm(vectors, axis=1)
        expected = expected / np.linalg.norm(query) / np.where(lengths > 0, lengths, 1)
    result = ghoststore.query(store=store, part=part, near=7, metric=metric, top_k=500, bottom_k=1, histogram=True)
    (ranking,) = result
    assert len(ranking) == int((usable & ~own).sum())
    assert 7 not in {hit.source_row for hit in ranking}
    starts = opened.column("window_start")
    place = {(int(row), int(start)): at for at, (row, start) in enumerate(zip(source, starts, strict=True))}
    found = np.array([expected[place[hit.source_row, hit.window_start]] for hit in ranking])
    np.testing.assert_allclose([hit.score for hit in ranking], found, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert [hit.score for hit in ranking] == sorted((hit.score for hit in ranking), reverse=True)
    assert ranking.bottom[0].score == pytest.approx(ranking[-1].score)
    assert ranking.histogram is not None
    assert ranking.histogram.rows == len(ranking)
    plain = ghoststore.query(store=store, part=part, near=7, metric=metric, top_k=500, bottom_k=1)
    assert plain[0].hits == ranking.hits, "ranked by the scores that are counted: the same bits"
    assert (result.settings["near"], result.settings["unit"], ranking.query) == (7, None, "row-7")
    assert ranking[0].text


def test_conditions_and_layers(store: Path) -> None:
    result = ghoststore.query(
        store=store, part="windows", near=7, where="domain = 'sky'", layers=("mlp",), metric="dot", top_k=500
    )
    assert {hit.domain for hit in result[0]} == {"sky"}
    opened = Store.open(store).part("windows")
    vectors = vectors_of(opened).astype(np.float64)
    vectors = np.concatenate([vectors[:, at:end] for name, at, end in opened.groups if "mlp" in name], axis=1)
    own, sky = opened.column("source_row") == 7, opened.domains.index("sky")
    expected = (vectors @ vectors[own & opened.usable()].mean(0))[(opened.column("domain") == sky) & ~own]
    np.testing.assert_allclose([hit.score for hit in result[0]], np.sort(expected)[::-1], rtol=1e-5, atol=1e-6)
    assert result.settings["where"] == "domain = 'sky'"
    assert "where" not in ghoststore.query(store=store, part="windows", near=7).settings


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"near": 5}, "that row has no vector"),
    ({"near": ROWS}, "has no such row of the corpus"),
    ({"near": 1, "val_set": [{"text": "x"}]}, "`val_set` has no use there"),
    ({"near": 1, "tokens": True}, "`tokens` has no use there"),
    ({"near": 1, "checkpoint": "c"}, "`checkpoint` has no use there"),
    ({"near": 1, "index": "ann"}, "`index=ann` has no use there"),
    ({"near": 1, "run": "r"}, "`run` has no use there"),
    ({"near": 1, "index_name": "i"}, "`index_name` has no use there"),
    ({"near": 1, "rerank_with": "cg"}, "`rerank_with=cg` has no use there"),
    ({"near": 1, "cg_steps": 3}, "`cg_steps` has no use there"),
    ({"near": 1, "each": True}, "`each` has no use there"),
    ({"near": 1, "where": "source_row = 1"}, "no other row of part 'onebit' has a vector and matches `where`"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(store: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ghoststore.query(store=store, part="onebit", **options)


def test_no_option_is_accepted_and_ignored(store: Path) -> None:
    """Whatever else a question may have, or will one day, is refused."""
    for spec, option in options_of(QueryOptions):
        if spec.name in {*TAKEN, "server"}:
            continue
        members, words = members_of(spec.type), [word for word in choices_of(spec) if word != spec.default]
        number = next((kind(1) for kind in (bool, int, float) if kind in members), "equal")
        value = words[0] if words else option.group(text="body") if option.group else number
        with pytest.raises(UsageError, match=f"`{spec.name}"):
            ghoststore.query(store=store, part="onebit", near=1, **{spec.name: value})


def test_the_command(lab: Lab, store: Path, tmp_path: Path) -> None:
    words = ["query", "--store", store, "--part", "onebit", "--near", "7", "--top-k", "3", "--histogram"]
    done = lab.run(*words, "--json")
    assert done.json == ghoststore.query(store=store, part="onebit", near=7, top_k=3, histogram=True).to_json()
    table = lab.run(*words)
    assert table.code == 0, table.err
    assert "nearest to row-7" in table.out
