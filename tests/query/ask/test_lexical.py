"""`ghoststore query --lexical`: BM25 against its formula, the stated blend, where texts come from, what it refuses."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import MismatchError, UsageError
from query.ask import hybrid
from query.ask.lexical import WordIndex, words_of
from query.search.counts import bins_of

if TYPE_CHECKING:
    from tests.conftest import Lab

ROWS, WEIGHT = 24, 0.3
STRANGER = "Xylophone quartz vexing"
"""A text that shares no word with any row."""


def bm25(texts: list[str], query: str) -> np.ndarray:
    """(texts,): Σ over the words of ``query`` of ln(1 + (N - n + ½) / (n + ½)) · f / (f + k(1 - b + b·l/mean l))."""
    counts = [Counter(words_of(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    scores = np.zeros(len(texts))
    for word in words_of(query):
        rows = sum(word in count for count in counts)
        for place, count in enumerate(counts):
            inverse = math.log(1 + (len(texts) - rows + 0.5) / (rows + 0.5))
            length = 1.5 * (0.25 + 0.75 * lengths[place] / np.mean(lengths))
            scores[place] += inverse * count[word] / (count[word] + length) if count[word] else 0.0
    return scores


def z(numbers: np.ndarray) -> np.ndarray:
    return (numbers - numbers.mean()) / numbers.std()


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus; the parts `plain`, `texts`, which keeps them, and `windows` of at most six tokens; val sets."""
    folder = tmp_path_factory.mktemp("lexical")
    lab.write(folder / "train.jsonl", lab.sample_rows(ROWS, 1))
    val = [row | {"id": f"v{place}", "task": "ba"[place % 2]} for place, row in enumerate(lab.sample_rows(4, 3))]
    lab.write(folder / "val.jsonl", [*val, {"id": "empty", "text": "", "domain": "sky", "task": "a"}])
    lab.write(folder / "far.jsonl", lab.sample_rows(3, 8))
    lab.write(folder / "stranger.jsonl", [{"id": "s", "text": STRANGER}])
    for name, options in (
        ("plain", {"max_length": 32, "overlong": "truncate"}),
        ("texts", {"max_length": 32, "overlong": "truncate", "store_text": True}),
        ("windows", {"max_length": 12, "overlong": "window"}),
    ):
        ghoststore.build(
            checkpoint=lab.checkpoint, data=folder / "train.jsonl", store=folder / "store", name=name, span_rows=16,
            device="cpu", projection=ProjectionConfig(precondition="none", rank_total=16), proj_dtype="float32",
            **options,
        )  # fmt: skip
    return folder


def ask(folder: Path, part: str = "plain", **options: Any) -> Any:
    wanted: dict[str, Any] = {"val_set": folder / "val.jsonl", "top_k": 1000, "text": False} | options
    return ghoststore.query(store=folder / "store", part=part, device="cpu", **wanted)


def texts(folder: Path, name: str) -> list[str]:
    return [sample.preview() for sample in ghoststore.Corpus.open(str(folder / f"{name}.jsonl")).samples()]


def by_row(hits: Any, name: str = "score") -> np.ndarray:
    return np.array([getattr(hit, name) for hit in sorted(hits, key=lambda hit: (hit.source_row, hit.window_start))])


def test_the_formula(lab: Lab) -> None:
    rows = [row["text"] for row in lab.sample_rows(30, 1)]
    index = WordIndex(rows)
    for query in (rows[3], f"{rows[0]} {rows[1]} {rows[0]}", STRANGER, ""):
        np.testing.assert_allclose(index.scores(query), bm25(rows, query), rtol=1e-5)
    assert WordIndex(["", " - "]).scores("word").tolist() == [0.0, 0.0]
    assert words_of("Ünder_score's 3rd: don't") == ["ünder_score", "s", "3rd", "don", "t"]


@pytest.mark.parametrize("part", ["plain", "texts"])
def test_the_blend(folder: Path, part: str) -> None:
    """Of each val sample, and of their mean: of the similarities of the plain query and of BM25."""
    train, val = texts(folder, "train"), texts(folder, "val")[:4]
    words = np.stack([bm25(train, text) for text in val])
    for each, expected in ((True, words), (False, words.mean(0, keepdims=True))):
        plain = ask(folder, part, each=each)
        found = ask(folder, part, each=each, lexical=WEIGHT, bottom_k=3)
        for result, before, of_words in zip(found.results, plain.results, expected, strict=True):
            similarity = by_row(before.hits)
            score = (1 - WEIGHT) * z(similarity) + WEIGHT * z(of_words)
            assert by_row(result.hits) == pytest.approx(score, abs=1e-5)
            assert by_row(result.hits, "similarity").tolist() == similarity.tolist()
            assert by_row(result.hits, "bm25") == pytest.approx(of_words, rel=1e-5)
            order = [hit.score for hit in result.hits]
            assert order == sorted(order, reverse=True)
            assert [hit.id for hit in result.bottom] == [hit.id for hit in result.hits[::-1][:3]]
    assert found.settings["lexical"] == WEIGHT
    assert found.settings["hybrid"] == "(1-W)·z(similarity) + W·z(BM25)"


def test_rows_that_share_no_word_keep_their_order(folder: Path) -> None:
    """They tie in BM25, which takes none of them before another; a stranger's words change no ranking at all."""
    found = ask(folder, each=True, lexical=0.5).results[0].hits
    without = [hit for hit in found if hit.bm25 == 0.0] or pytest.fail("every row shares a word")
    assert len(without) > 2
    similarity = [hit.similarity for hit in without]
    assert similarity == sorted(similarity, reverse=True)
    stranger = {"val_set": folder / "stranger.jsonl"}
    ids = [[hit.id for hit in ask(folder, **stranger, **more).results[0].hits] for more in ({}, {"lexical": 0.9})]
    assert ids[0] == ids[1]


def test_the_ends(folder: Path) -> None:
    plain, zero, one = ask(folder), ask(folder, lexical=0), ask(folder, lexical=1)
    assert [hit.id for hit in zero.results[0].hits] == [hit.id for hit in plain.results[0].hits]
    order = [hit.bm25 for hit in one.results[0].hits]
    assert order == sorted(order, reverse=True)


def test_groups_minus_and_where(folder: Path) -> None:
    train, val, far = (texts(folder, name) for name in ("train", "val", "far"))
    words = np.stack([bm25(train, text) for text in val[:4]])
    groups = np.stack([words[1::2].mean(0), words[0::2].mean(0)])
    minus = np.mean([bm25(train, text) for text in far], axis=0)
    for combine in ("mean", "max"):
        options: dict[str, Any] = {"group_field": "task", "combine": combine, "minus": folder / "far.jsonl"}
        plain, found = ask(folder, **options), ask(folder, lexical=WEIGHT, **options)
        assert [result.query for result in found.results] == ["combined", "a", "b"]
        expected = np.concatenate([groups.mean(0, keepdims=True), groups]) - minus
        for result, before, of_words in zip(found.results, plain.results, expected, strict=True):
            score = (1 - WEIGHT) * z(by_row(before.hits)) + WEIGHT * z(of_words)
            assert by_row(result.hits) == pytest.approx(score, abs=1e-5)
    chosen = ask(folder, lexical=WEIGHT, where="domain = 'sky'").results[0].hits
    similarity = by_row(ask(folder, where="domain = 'sky'").results[0].hits)
    assert len(chosen) == len(similarity) == ROWS // 2
    score = (1 - WEIGHT) * z(similarity) + WEIGHT * z(words.mean(0)[::2])
    assert by_row(chosen) == pytest.approx(score, abs=1e-5)


def test_a_window_has_the_words_of_its_sample(folder: Path) -> None:
    hits = ask(folder, "windows", lexical=WEIGHT).results[0].hits
    assert len(hits) > ROWS
    words = np.mean([bm25(texts(folder, "train"), text) for text in texts(folder, "val")[:4]], axis=0)
    assert [hit.bm25 for hit in hits] == pytest.approx([words[hit.source_row] for hit in hits], rel=1e-5)


def test_of_several_parts(folder: Path) -> None:
    both = {"part": ["plain", "texts"], "part_weights": "equal"}
    found, plain = ask(folder, lexical=WEIGHT, **both), ask(folder, **both)
    assert by_row(found.results[0].hits, "similarity").tolist() == by_row(plain.results[0].hits).tolist()


def test_select(folder: Path, tmp_path: Path) -> None:
    ghoststore.select(
        store=folder / "store", part="plain", val_set=folder / "val.jsonl", lexical=WEIGHT, count=5, leaks="keep",
        out=tmp_path / "chosen.jsonl", order="score", device="cpu",
    )  # fmt: skip
    ids = [sample.id for sample in ghoststore.Corpus.open(str(tmp_path / "chosen.jsonl")).samples()]
    assert ids == [hit.id for hit in ask(folder, lexical=WEIGHT, top_k=5).results[0].hits]


def test_texts_that_are_gone(folder: Path, lab: Lab, tmp_path: Path) -> None:
    """The advice works: `data`. A corpus that has changed is refused; a part that keeps its texts needs none, nor does
    one whose words are kept since an earlier question.
    """
    train = folder / "train.jsonl"
    kept = folder / "store" / "parts" / "plain" / "second_moment"
    rmtree(kept, ignore_errors=True)
    moved = train.rename(tmp_path / "moved.jsonl")
    try:
        with pytest.raises(UsageError, match=r"part 'plain' keeps no texts: .* Give `data`, .* or leave `lexical` out"):
            ask(folder, lexical=WEIGHT)
        found = ask(folder, lexical=WEIGHT, data=moved).results[0].hits
        assert ask(folder, "texts", lexical=WEIGHT).results[0].hits
        assert by_row(ask(folder, lexical=WEIGHT).results[0].hits).tolist() == by_row(found).tolist()
        rmtree(kept)
        other = lab.write(tmp_path / "other.jsonl", lab.sample_rows(ROWS, 2))
        with pytest.raises(MismatchError, match="has changed"):
            ask(folder, lexical=WEIGHT, data=other)
    finally:
        moved.rename(train)


def test_a_session_keeps_words_in_memory(folder: Path, tmp_path: Path) -> None:
    """Its second question reads no text, and nothing is written, as `select` writes nothing to the store."""
    train, kept = folder / "train.jsonl", folder / "store" / "parts" / "plain" / "second_moment"
    expected = by_row(ask(folder, lexical=WEIGHT).results[0].hits).tolist()
    rmtree(kept)
    with ghoststore.open(folder / "store", part="plain", device="cpu") as store:

        def again() -> list[float]:
            asked = store.query(folder / "val.jsonl", top_k=1000, text=False, lexical=WEIGHT)
            return by_row(asked.results[0].hits).tolist()

        assert again() == expected
        moved = train.rename(tmp_path / "moved.jsonl")
        try:
            assert again() == expected
        finally:
            moved.rename(train)
    ghoststore.select(
        store=folder / "store", part="plain", val_set=folder / "val.jsonl", lexical=WEIGHT, count=5,
        out=tmp_path / "chosen.jsonl", device="cpu",
    )  # fmt: skip
    assert not kept.exists()


def test_kept_words_that_are_damaged_are_made_anew(folder: Path) -> None:
    expected = ask(folder, lexical=WEIGHT)
    (kept,) = (folder / "store/parts/plain/second_moment").glob("words-*")
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(bytes(data))
    assert by_row(ask(folder, lexical=WEIGHT).results[0].hits).tolist() == by_row(expected.results[0].hits).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"each": True},
        {"where": "domain = 'sky'"},
        {"group_field": "task"},
        {"group_field": "task", "combine": "max"},
    ],
    ids=str,
)
def test_some_rows_stand_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """The deviation of similarities is that of a sample; best rows, worst rows and counts are those of all scores."""
    monkeypatch.setattr(hybrid, "SAMPLED", 8)
    monkeypatch.setattr(hybrid, "STRETCHES", 4)
    with monkeypatch.context() as patched:
        patched.setattr("query.ask.scorer.similarities", lambda *_, **__: pytest.fail("all rows are scored"))
        found = ask(folder, lexical=WEIGHT, top_k=5, bottom_k=4, histogram=True, **options).results
    every = ask(folder, lexical=WEIGHT, **options).results
    for few, ranked, plain in zip(found, every, ask(folder, **options).results, strict=True):
        numbers, words, similarity = by_row(ranked.hits), by_row(ranked.hits, "bm25"), by_row(plain.hits)
        sample = similarity[hybrid.sampled(np.ones(len(numbers), dtype=bool))]
        assert 8 == len(sample) < len(numbers)
        score = (1 - WEIGHT) * (similarity - sample.mean()) / sample.std() + WEIGHT * z(words)
        assert numbers == pytest.approx(score, abs=1e-9)
        best = np.sort(numbers)[::-1]
        assert [hit.score for hit in few.hits] == best[:5].tolist()
        assert [hit.score for hit in few.bottom] == best[::-1][:4].tolist()
        assert [hit.id for hit in few.hits] == [hit.id for hit in ranked.hits[:5]]
        assert few.histogram.counts == bins_of(numbers, best[-1], best[0]).tolist()
        assert few.histogram.rows == len(numbers)


def test_refused(folder: Path) -> None:
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(UsageError, match="`lexical` must be between 0"):
            ask(folder, lexical=weight)
    for message, options in (
        ("`lexical` and `with_scores`", {"with_scores": "run"}),
        ("`rerank` .* cannot be used with `lexical`", {"rerank": 1000}),
        ("`lexical` needs the scores of all rows.*use `index=exact`", {"index": "ann"}),
    ):
        with pytest.raises(UsageError, match=message):
            ask(folder, lexical=WEIGHT, **options)
    with pytest.raises(UsageError, match="`lexical` is for parts, and `run=r`"):
        ghoststore.query(store=folder / "store", run="r", lexical=0.1, val_set=folder / "val.jsonl", checkpoint="x")


def test_the_command(lab: Lab, folder: Path, tmp_path: Path) -> None:
    words = ["query", "--store", folder / "store", "--part", "plain", "--val-set", folder / "val.jsonl"]
    words += ["--lexical", "0.1", "--top-k", "3"]
    document = lab.run(*words, "--json", "--out", tmp_path / "hits.csv", "--report", tmp_path / "page.html").json
    assert document["settings"]["lexical"] == 0.1
    assert {"score", "similarity", "bm25"} <= document["results"][0]["hits"][0].keys()
    assert (tmp_path / "hits.csv").read_text().splitlines()[0].endswith("similarity,bm25")
    page = (tmp_path / "page.html").read_text()
    assert "Blend of BM25 and similarity" in page
    assert "BM25 " in page
    table = lab.run(*words)
    assert table.code == 0, table.err
    assert "hybrid" in table.out
    assert "BM25" in table.out
