"""The page that ``query(report=…)`` writes, and what layers add to a score."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.progress import Silent
from query.answer.contributions import Contributions, contributions
from query.answer.report import MOST_CHARACTERS, colored, histogram, is_code
from query.answer.tokens import Token
from query.ask.question import Question
from tests.support.parts import opened_scorer

if TYPE_CHECKING:
    from tests.conftest import Lab

HOSTILE = "<script>alert(1)</script> & <img src=https://example.com/x>"
VOID = {"meta", "rect", "line", "br", "link", "img"}


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of sketched and of plain blocks, with texts that want to be markup."""
    folder = tmp_path_factory.mktemp("report")
    rows: list[dict[str, Any]] = lab.sample_rows(30, 1)
    rows[0]["text"] = rows[1]["text"] = HOSTILE
    rows[2]["text"] = ""
    data = lab.write(folder / "train.jsonl", rows)
    val = [row | {"task": ("a", "b")[i % 2]} for i, row in enumerate(lab.sample_rows(4, 3))]
    val[0]["text"] = HOSTILE
    lab.write(folder / "val.jsonl", val)
    projections = {
        "sketched": ProjectionConfig(precondition="none", compress=24),
        "plain": ProjectionConfig(rank_total=16),
    }
    for name, projection in projections.items():
        ghoststore.build(
            checkpoint=lab.checkpoint, data=data, store=folder / name, projection=projection, span_rows=8, device="cpu"
        )
    return folder


class Page(HTMLParser):
    """Checks that tags are balanced; collects what would need a network or run code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.dangerous: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "img", "link", "iframe"):
            self.dangerous.append(tag)
        self.dangerous += [
            f"{name}={value}" for name, value in attrs if name in ("src", "onload") or "//" in (value or "")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.mark.thin(3)
@pytest.mark.parametrize("store", ["sketched", "plain"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"each": True},
        {"group_field": "task"},
        {"group_field": "task", "combine": "max"},
        {"group_field": "task", "combine": "rank-fusion"},
        {"metric": "dot", "bottom_k": 2},
        {"text": False},
        {"precondition": "second-moment"},
    ],
    ids=str,
)
def test_every_kind_of_answer(folder: Path, store: str, settings: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    result = ghoststore.query(
        store=folder / store, val_set=folder / "val.jsonl", top_k=5, report=page, device="cpu", **settings
    )
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert parsed.dangerous == []
    for one in result.results:
        for hit in one.hits:
            assert f"<code>{hit.id}</code>" in text
            assert f"{hit.score if hit.nats is None else hit.nats:.4g}" in text
    shown = any(hit.text == HOSTILE for one in result.results for hit in one.hits)
    assert shown or not settings.get("each")
    assert ("&lt;script&gt;" in text) == settings.get("text", True)  # of the val set, wherever it does not rank
    assert text.count('class="asked"') == (len(result.results) if settings.get("text", True) else 0)
    possible = store == "plain" or "precondition" not in settings
    assert ("What each layer adds, mean" in text) == possible
    assert ("What each layer adds is not shown" in text) != possible


@pytest.mark.thin
@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("settings", [{}, {"each": True}, {"group_field": "task"}], ids=str)
@pytest.mark.parametrize("precondition", ["none", "second-moment"])
def test_layers_sum_to_the_score(folder: Path, metric: Any, settings: dict[str, Any], precondition: Any) -> None:
    question = Question(
        store=folder / "plain",
        val_set=folder / "val.jsonl",
        metric=metric,
        precondition=precondition,
        device="cpu",
        **settings,
    )
    with opened_scorer(question) as scorer:
        best, _ = scorer.rank(6, 0, Silent())
        found = contributions(scorer, [[int(row) for row in rows] for rows in best.rows], Silent())
    assert isinstance(found, Contributions)
    for rows, scores, by_row in zip(best.rows, best.scores, found.of, strict=True):
        for row, score in zip(rows, scores, strict=True):
            assert by_row[int(row)].sum() == pytest.approx(score, rel=1e-9)


def test_layers_of_several_parts(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """Weighted like their scores, they sum to the sum."""
    for place in range(2):
        ghoststore.build(
            checkpoint=lab.model(tmp_path / f"model-{place}", seed=place),
            data=folder / "train.jsonl",
            device="cpu",
            store=tmp_path / "store",
            name=f"part-{place}",
            span_rows=8,
            projection=ProjectionConfig(precondition="none", rank_total=16),
        )
    question = Question(
        store=tmp_path / "store",
        val_set=folder / "val.jsonl",
        part=["part-0", "part-1"],
        part_weights=(0.3, 2.0),
        device="cpu",
    )
    with opened_scorer(question) as scorer:
        best, _ = scorer.rank(4, 0, Silent())
        found = contributions(scorer, [[int(row) for row in best.rows[0]]], Silent())
    assert isinstance(found, Contributions)
    for row, score in zip(best.rows[0], best.scores[0], strict=True):
        assert found.of[0][int(row)].sum() == pytest.approx(score, rel=1e-9)


def test_layers_before_the_sketch(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """They sum to the score of a part whose blocks were never sketched."""
    for name, compress in (("sketched", 24), ("exact", "none")):
        # Attention alone: its axes are short enough to keep their length, so that only the sketch differs.
        projection = ProjectionConfig(
            precondition="none", layers=("attn",), rank_total=None if compress == 24 else "full", compress=compress
        )
        ghoststore.build(
            checkpoint=lab.checkpoint,
            data=folder / "train.jsonl",
            store=tmp_path / name,
            device="cpu",
            projection=projection,
            proj_dtype="float32",
        )
    val_set = folder / "val.jsonl"
    phrase = {"max_samples": 1, "phrase": "4:9"}
    for settings in ({}, {"each": True}, {"group_field": "task"}, {"metric": "dot"}, phrase):
        with opened_scorer(Question(store=tmp_path / "exact", val_set=val_set, device="cpu", **settings)) as exact:
            scores = exact.scores(Silent())
        question = Question(store=tmp_path / "sketched", val_set=val_set, device="cpu", **settings)
        with opened_scorer(question, keep_model=True) as scorer:
            found = contributions(scorer, [[3, 8]] * len(scorer.names), Silent())
        assert isinstance(found, Contributions)
        for of_ranking, by_row in zip(scores, found.of, strict=True):
            for row in (3, 8):
                assert by_row[row].sum() == pytest.approx(
                    of_ranking[row], rel=1e-4, abs=1e-6 * np.nanmax(np.abs(scores))
                )


def asked_of(page: Path) -> list[list[str]]:
    """The ids of the val samples beside each ranking."""
    asides = re.findall(r'<aside class="asked">(.*?)</aside>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [re.findall(r"<code>(.*?)</code>", aside) for aside in asides]


def test_the_val_samples_stand_beside_their_hits(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """Of a mean the first three, and how many more; of a sample it; of a group its own, and of all groups each's."""
    val = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    val.insert(1, {"id": "nothing", "text": "", "domain": None, "task": "a"})  # has no gradient, and asks for nothing
    val_set = lab.write(tmp_path / "val.jsonl", val)
    ids = [row["id"] for row in val if row["text"]]
    for name, settings, asked in (
        ("mean", {}, [ids[:3]]),
        ("each", {"each": True}, [[of] for of in ids]),
        ("groups", {"group_field": "task"}, [ids[:3], ids[::2], ids[1::2]]),
    ):
        page = tmp_path / f"{name}.html"
        given: dict[str, Any] = settings
        ghoststore.query(store=folder / "plain", val_set=val_set, top_k=2, report=page, device="cpu", **given)
        assert asked_of(page) == asked, name
        assert ("and 1 more" in page.read_text()) == (name != "each")


CODE = "def f(x):\n    if x:\n        return 1\n    return 2\n"


def test_what_is_code_and_what_is_cut_is_marked(lab: Lab, tmp_path: Path) -> None:
    """Programs are in one width; a text says what is left out of it, and a row that the build cut, where."""
    long = "the cat sees a dog. " * 300
    rows = [{"id": "code", "text": CODE}, {"id": "prose", "text": "the cat\nsees a dog"}, {"id": "long", "text": long}]
    data = lab.write(tmp_path / "train.jsonl", rows)
    words = {"checkpoint": lab.checkpoint, "data": data, "store": tmp_path / "store", "device": "cpu"}
    ghoststore.build(**words, max_length=16, projection=ProjectionConfig(precondition="none"))
    page = tmp_path / "page.html"
    ghoststore.query(store=tmp_path / "store", val_set=[{"text": "the cat"}], report=page, device="cpu")
    hits = re.findall(r"<li>(.*?)</li>", page.read_text(), flags=re.DOTALL)
    by_id = {re.findall(r"<code>(.*?)</code>", hit)[0]: hit for hit in hits}
    assert {name for name, hit in by_id.items() if 'class="text code"' in hit} == {"code"}
    assert {name for name, hit in by_id.items() if "cut by the build after 16 tokens" in hit} >= {"long"}
    assert "cut by" not in by_id["prose"]
    assert f"… {len(long) - MOST_CHARACTERS:,} more characters" in by_id["long"]
    assert "more characters" not in by_id["code"] + by_id["prose"]
    token = Token(token="the", start=0, end=3, score=1.0)
    assert colored(long, [token])[-1][0] == f" … {len(long) - MOST_CHARACTERS:,} more characters"
    assert "more" not in colored(long[:MOST_CHARACTERS], [token])[-1][0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (CODE, True),
        ("int main() {\n  return 0;\n}\n", True),
        ("One line; and no more.", False),
        ("A paragraph.\n\nAnother one; it ends here;\nand goes on.\nAnd on.\n", False),
        ("", False),
    ],
)
def test_code_is_known_by_its_lines(text: str, code: bool) -> None:
    assert is_code(text) == code


def test_histogram() -> None:
    assert histogram(np.full(3, np.nan), []) is None
    same = histogram(np.full(5, 0.25), [])
    assert same is not None
    assert (same["low"], same["high"], same["zero"], len(same["bins"])) == (0.25, 0.25, None, 1)
    spread = histogram(np.array([-1.0, 0.0, 1.0, np.nan]), [])
    assert spread is not None
    assert spread["rows"] == 3
    assert spread["zero"] == 240.0
    for nearly in ([1.0, 1.0 - 2**-53], [1e20, 1e20], [0.0, 1e-300]):  # bins would be finer than numbers are
        found = histogram(np.array(nearly), [])
        assert found is not None
        assert found["rows"] == 2


def test_without_the_corpus(lab: Lab, folder: Path, tmp_path: Path) -> None:
    """A page without texts, and for a sketch without layers, says so; `select` needs the corpus, a page does not."""
    data = lab.write(tmp_path / "train.jsonl", lab.sample_rows(9, 1))
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=data,
        store=tmp_path / "store",
        device="cpu",
        projection=ProjectionConfig(precondition="none", compress=24),
    )
    data.unlink()
    page = tmp_path / "page.html"
    found = ghoststore.query(store=tmp_path / "store", val_set=folder / "val.jsonl", report=page, device="cpu")
    assert len(found.results[0].hits) == 9
    assert "What each layer adds is not shown: the part keeps one sketch" in page.read_text()
    assert "cannot be computed again" in page.read_text()


def test_the_farthest_alone(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ghoststore.query(
        store=folder / "plain", val_set=folder / "val.jsonl", top_k=0, bottom_k=3, report=page, device="cpu"
    )
    Page(page.read_text())
    assert "The 3 training samples farthest from val.jsonl" in page.read_text()
    assert "nearest" not in page.read_text().lower()


@pytest.mark.parametrize(("name", "message"), [("out.txt", "written as .html"), ("no/out.html", "does not exist")])
def test_refused_before_any_work(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ghoststore.query(store=folder / "plain", val_set="nothing", report=tmp_path / name)
    (tmp_path / "there.html").touch()
    with pytest.raises(UsageError, match="exists"):
        ghoststore.query(store=folder / "plain", val_set="nothing", report=tmp_path / "there.html")
