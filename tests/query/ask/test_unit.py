"""Products in nats: the constant by the numbers on the disk, where there is none, and what shows it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig, Store
from ghoststore.cli.query import print_hits
from ghoststore.errors import UsageError
from query.ask.unit import Unit
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ONE_BIT = math.pi / 2


@pytest.fixture(scope="module")
def built(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: words are kept in it."""
    return Path(shutil.copytree(built, tmp_path_factory.mktemp("own") / built.name))


@pytest.fixture(scope="module")
def val(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lab.write(tmp_path_factory.mktemp("val") / "val.jsonl", lab.sample_rows(3, 8))


@pytest.fixture(scope="module")
def plain(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of plain gradients, exact."""
    store = tmp_path_factory.mktemp("plain") / "store"
    projection = ProjectionConfig(precondition="none")
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=store,
        device="cpu",
        proj_dtype="float32",
        projection=projection,
    )
    return store


def ask(store: Path, val: Path, **settings: Any) -> Any:
    return ghoststore.query(store=store, val_set=val, device="cpu", bottom_k=2, **settings)


def test_of_a_preconditioned_part(built: Path, val: Path) -> None:
    """product ÷ (T · (N + d)), of the signs of one bit times π/2, in every hit."""
    part = Store.open(built).part()
    usable = part.usable()
    rows_RD = vectors_of(part).astype(np.float64)[usable]
    tokens = 1 / np.mean(1 / (part.column("n_tokens")[usable] - 1))
    directions = ONE_BIT * np.square(rows_RD).sum(1).mean()
    answer = ask(built, val)
    unit = answer.settings["unit"]
    assert (unit["name"], unit["rows"]) == ("nats", len(rows_RD))
    assert unit["tokens"] == pytest.approx(tokens)
    assert unit["directions"] == pytest.approx(directions)
    assert unit["factor"] == pytest.approx(ONE_BIT / (tokens * (len(rows_RD) + directions)))
    for hit in (*answer.results[0].hits, *answer.results[0].bottom):
        assert hit.nats == hit.score * unit["factor"]


def test_vectors_that_were_not_rounded(built: Path) -> None:
    part = Store.open(built).part()
    stored, exact = Unit.of(part), Unit.of(part, rounded=False)
    assert stored is not None
    assert exact is not None
    assert stored.factor == pytest.approx(exact.factor * ONE_BIT)
    assert stored.directions == exact.directions


@pytest.mark.slow
def test_losses_that_are_sums_have_no_mean_over_tokens(lab: Lab, tmp_path: Path) -> None:
    ghoststore.build(
        checkpoint=lab.checkpoint, data=lab.corpus, store=tmp_path / "store", device="cpu", loss_reduction="sum"
    )
    unit = Unit.of(Store.open(tmp_path / "store").part())
    assert unit is not None
    assert unit.tokens == 1


def test_of_plain_gradients_it_is_that_of_a_step(plain: Path, val: Path) -> None:
    answer = ask(plain, val, metric="dot")
    assert answer.settings["unit"] == {"name": "nats/lr", "factor": 1.0, "rounding": 1.0, "step": "gradient descent"}
    assert all(hit.nats == hit.score for hit in answer.results[0].hits)
    first = answer[0][0]
    assert f"nats/lr={first.nats:.3g}" in repr(first)
    assert f"best nats/lr={first.nats:.3g}" in repr(answer)
    assert list(first.cells())[:3] == ["rank", "nats/lr", "id"]
    assert "unit" not in answer.to_json()["results"][0]["hits"][0]
    assert "unit" not in answer.to_arrow().column_names


@pytest.mark.parametrize(
    "settings", [{"metric": "cosine"}, {"group_field": "domain", "combine": "rank-fusion"}], ids=str
)
def test_scores_without_a_unit(built: Path, val: Path, settings: dict[str, Any]) -> None:
    answer = ask(built, val, **settings)
    assert answer.settings["unit"] is None
    assert {hit.nats for result in answer.results for hit in (*result.hits, *result.bottom)} == {None}


def test_a_second_preconditioner_has_none(plain: Path, val: Path) -> None:
    assert ask(plain, val, metric="dot", precondition="second-moment").settings["unit"] is None


def test_the_table_and_the_page_say_it(
    built: Path, val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(built, val, top_k=2, report=tmp_path / "page.html")
    print_hits(answer)
    table, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    best = answer.results[0].hits[0]
    assert f"{best.nats:.2e}" in table
    assert f"{best.score:.4g}" not in table
    assert f"<b>{best.nats:.4g} nats</b>" in page
    for shown in (table, page):
        assert "if the row were left out of a training on these 27 rows" in shown
    print_hits(ask(built, val, metric="cosine"))
    assert "nats" not in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"layers": ["mlp"], "minus": "far"}, {"each": True, "rerank": 9}], ids=str)
def test_the_sentence_fits_the_question(
    built: Path, val: Path, lab: Lab, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "minus" in settings:
        settings = settings | {"minus": lab.write(tmp_path / "far.jsonl", lab.sample_rows(3, 9))}
    print_hits(ask(built, val, top_k=2, **settings))
    sentence = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("nats: "))
    assert ("the val loss less that of the second val set is predicted" in sentence) == ("minus" in settings)
    assert ("the share of the layers asked for" in sentence) == ("layers" in settings)


def test_products_that_are_blended(built: Path, val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blend has no unit; the similarity in it has that of the products, in the table and on the page."""
    page = tmp_path / "page.html"
    alone, answer = ask(built, val, top_k=27), ask(built, val, top_k=27, lexical=0.5, report=page)
    assert answer.settings["unit"] == alone.settings["unit"]
    nats = {hit.id: hit.nats for hit in alone[0]}
    assert {hit.id: hit.nats for hit in answer[0]} == nats
    first = answer[0][0]
    assert repr(first).startswith(f"HybridHit(rank=1, score={first.score:.6g}")
    assert f"best {first.score:.6g} " in repr(answer)
    assert [first.cells()[name] for name in ("score", "nats", "bm25")] == [first.score, first.nats, first.bm25]
    assert "similarity" not in first.cells()
    print_hits(answer)
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:4] == ["rank", "hybrid", "nats", "BM25"]
    assert table[4].split()[:4] == ["1", f"{first.score:.4g}", f"{first.nats:.2e}", f"{first.bm25:.4g}"]
    shown = page.read_text()
    assert f'<b>{first.score:.4g}</b> <span class="soft">{first.nats:.4g} nats, BM25 {first.bm25:.4g}' in shown
    assert "Scores of all 27 rows</h3>" in shown
    with pytest.raises(UsageError, match="`threshold_nats`: these scores have no unit"):
        ghoststore.select(
            store=built, val_set=val, lexical=0.5, threshold_nats=0, out=tmp_path / "best.jsonl", device="cpu"
        )


def test_a_fusion_of_ranks_is_no_product(built: Path, val: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"group_field": "domain", "combine": "rank-fusion", "top_k": 1}
    for options, headings in (({}, ["rank", "rank fusion"]), ({"lexical": 0.5}, ["rank", "hybrid", "rank fusion"])):
        print_hits(ask(built, val, **settings, **options))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rank ")]
        best, worst, *groups = ([heading.strip() for heading in line.split("  ") if heading.strip()] for line in lines)
        assert best[: len(headings)] == worst[: len(headings)] == headings
        assert groups
        assert all("dot" in group and "rank fusion" not in group for group in groups)


def test_colors_of_the_page_are_in_the_unit(built: Path, val: Path, tmp_path: Path) -> None:
    answer = ask(built, val, top_k=1, tokens=True, lexical=0.1, report=tmp_path / "page.html")
    page, unit, hit = (tmp_path / "page.html").read_text(), answer.settings["unit"], answer[0][0]
    strongest = max((token.score for token in hit.tokens), key=abs) * unit["factor"] / unit["rounding"]
    assert f'title="{strongest:.4g}"' in page
    assert f"of {hit.recomputed * unit['factor'] / unit['rounding']:.4g} nats</div>" in page
    assert "without rounding, in nats; red" in page


def test_a_threshold_in_nats(built: Path, val: Path, tmp_path: Path) -> None:
    hits = ask(built, val, top_k=5).results[0].hits
    report = ghoststore.select(
        store=built, val_set=val, threshold_nats=hits[3].nats, out=tmp_path / "best.jsonl", leaks="keep", device="cpu"
    )
    assert report.samples == 4
    assert report.settings["threshold_nats"] == hits[3].nats
    assert report.scores["chosen"]["lowest"] == hits[3].score
    with pytest.raises(UsageError, match=rf"has the score {hits[0].nats:.2e} and .* Lower `threshold_nats`"):
        ghoststore.select(store=built, val_set=val, threshold_nats=9.0, out=tmp_path / "none.jsonl", device="cpu")
    with pytest.raises(UsageError, match="`threshold_nats`: these scores have no unit"):
        ghoststore.select(store=built, val_set=val, metric="cosine", threshold_nats=0, out=tmp_path / "b", device="cpu")
