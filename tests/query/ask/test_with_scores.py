"""`ghoststore query --with-scores`: the stated blend, the join of a part's rows with a run's, what it refuses."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ghoststore
from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import RowTable, RunLayout, RunWriter, Store
from query.ask.blend import blended, join
from tests.support.notes import Notes
from tests.support.score_runs import make, run_on

if TYPE_CHECKING:
    from tests.conftest import Lab

K = 30


def columns(store: Path, *names: str) -> list[np.ndarray]:
    part = Store.open(store).part()
    return [part.read(name, 0, part.layout.rows) for name in names]


@pytest.fixture(scope="module")
def store(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of 27 rows, and `mine`: a run on the first 20 samples, in another order of rows."""
    store = Path(shutil.copytree(built, tmp_path_factory.mktemp("blend") / "store"))
    source, digest = columns(store, "source_row", "source_digest")
    run_on(store, "mine", source[:20][::-1].copy(), digest[:20][::-1].copy())
    return store


@pytest.fixture(scope="module")
def value(store: Path) -> np.ndarray:
    """(27,): the value of each row of the part in `mine`."""
    found = np.full(27, np.nan)
    for hit in ghoststore.scores(store=store, run="mine", top_k=K, text=False).hits:
        found[hit.source_row] = hit.value
    return found


@pytest.fixture(scope="module")
def val(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row | {"id": f"v{i}"} for i, row in enumerate(lab.sample_rows(3, 5))]
    return lab.write(tmp_path_factory.mktemp("val") / "val.jsonl", rows)


def ask(store: Path, val: Path, **options: Any) -> Any:
    return ghoststore.query(store=store, val_set=val, device="cpu", text=False, **({"top_k": K} | options))


def z(numbers: np.ndarray, both: np.ndarray) -> np.ndarray:
    return (numbers - numbers[both].mean()) / numbers[both].std()


def test_the_join_of_the_fixture(value: np.ndarray) -> None:
    assert 5 < np.isfinite(value).sum() < 20


@pytest.mark.thin(2)
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
@pytest.mark.parametrize("each", [True, False], ids=["each", "mean"])
def test_the_blend(store: Path, val: Path, value: np.ndarray, weight: float | None, metric: Any, each: bool) -> None:
    """As stated in the help, from the similarities of the plain query and the values of `scores`."""
    w = 0.5 if weight is None else weight
    plain = ask(store, val, metric=metric, each=each)
    found = ask(store, val, metric=metric, each=each, with_scores="mine", score_weight=weight, bottom_k=4)
    for mine, theirs in zip(found.results, plain.results, strict=True):
        similarity = np.array([hit.score for hit in sorted(theirs.hits, key=lambda hit: hit.source_row)])
        both = np.isfinite(value)
        score = (1 - w) * z(similarity, both) + (w * z(value, both) if w else 0.0)
        rows = np.flatnonzero(np.isfinite(score))
        order = rows[np.lexsort((rows, -score[rows]))]
        assert [hit.source_row for hit in mine.hits] == order.tolist()
        assert [hit.source_row for hit in mine.bottom] == order[::-1][:4].tolist()
        for hit in (*mine.hits, *mine.bottom):
            assert hit.score == pytest.approx(score[hit.source_row], abs=1e-9)
            assert hit.similarity == similarity[hit.source_row]
            expected = value[hit.source_row]
            assert hit.value is None if math.isnan(expected) else hit.value == pytest.approx(expected)
    settings, scored = found.settings, int(np.isfinite(value).sum())
    assert (settings["with_scores"], settings["score_weight"]) == ("mine", w)
    assert settings["blend"] == "(1-W)·z(similarity) + W·z(value)"
    assert (settings["rows_blended"], settings["rows_without_score"]) == (scored, 27 - scored)
    assert (settings["joined_by"], settings["run_steps"]) == ("sample", 3)


def test_the_ends(store: Path, val: Path, value: np.ndarray) -> None:
    """W = 0 ranks as the plain query, all rows; W = 1 by the values alone."""
    plain = ask(store, val)
    zero, one = (ask(store, val, with_scores="mine", score_weight=weight) for weight in (0, 1))
    assert [hit.id for hit in zero.results[0].hits] == [hit.id for hit in plain.results[0].hits]
    order = sorted(np.flatnonzero(np.isfinite(value)), key=lambda row: -value[row])
    assert [hit.source_row for hit in one.results[0].hits] == order


def test_what_a_step_counts_with(store: Path, val: Path, value: np.ndarray) -> None:
    """The values are those of `scores` with that weight; by default every step is scaled to a mean |score| of 1."""
    for weight, options in (("unit", {}), ("learning-rate", {"weight": "learning-rate"})):
        told = ghoststore.scores(store=store, run="mine", weight=weight, top_k=K, text=False)
        found = ask(store, val, with_scores="mine", score_weight=1.0, **options)
        assert [(hit.source_row, hit.value) for hit in found.results[0].hits] == [
            (hit.source_row, pytest.approx(hit.value)) for hit in told.hits
        ]
        assert found.settings["weight"] == weight
        assert (weight == "unit") == all(hit.value == pytest.approx(value[hit.source_row]) for hit in told.hits)


def test_rows_without_a_score_are_said(store: Path, val: Path) -> None:
    notes = Notes()
    ask(store, val, with_scores="mine", progress=notes)
    assert any("usable rows have no score in run 'mine': they are left out" in said for said in notes.said)


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan, math.inf])
def test_weights_that_are_none(store: Path, val: Path, weight: float) -> None:
    with pytest.raises(UsageError, match="`score_weight` must be between 0"):
        ask(store, val, with_scores="mine", score_weight=weight)


def test_refused_usage(store: Path, val: Path) -> None:
    with pytest.raises(UsageError, match="`score_weight` belongs to `with_scores`"):
        ask(store, val, score_weight=0.5)
    with pytest.raises(UsageError, match=r"`weight=loss-fall` is what a step .* give `run`, or `with_scores`"):
        ask(store, val, weight="loss-fall")
    with pytest.raises(UsageError, match="no run 'nonesuch'; it has: mine"):
        ask(store, val, with_scores="nonesuch")


def test_the_command(lab: Lab, store: Path, val: Path, tmp_path: Path) -> None:
    words = ["query", "--store", store, "--val-set", val, "--with-scores", "mine", "--top-k", "3"]
    document = lab.run(*words, "--score-weight", "0.25", "--json", "--out", tmp_path / "hits.csv").json
    assert document["settings"]["score_weight"] == 0.25
    for hit in document["results"][0]["hits"]:
        assert {"score", "similarity", "value"} <= hit.keys()
    header = (tmp_path / "hits.csv").read_text().splitlines()[0]
    assert header.split(",")[-2:] == ["similarity", "value"]
    table = lab.run(*words)
    assert table.code == 0, table.err
    assert "blend" in table.out
    assert "Σ unit·score" in table.out
    assert "Σ η·score" in lab.run(*words, "--weight", "learning-rate").out
    assert "have no score in run" in table.err
    plain = lab.run("query", "--store", store, "--val-set", val, "--json").json
    assert "similarity" not in plain["results"][0]["hits"][0]
    assert "with_scores" not in plain["settings"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("what", ["content", "places", "nothing-in-common"])
def test_other_corpora_are_refused(lab: Lab, built: Path, val: Path, tmp_path: Path, what: str) -> None:
    """By the samples themselves, both fingerprints shown; equal fingerprints of other places do not help."""
    store = Path(shutil.copytree(built, tmp_path / "store"))
    part = Store.open(store).part()
    source, digest = (column.copy() for column in columns(store, "source_row", "source_digest"))
    if what == "content":
        digest[4] += np.uint64(1)
    elif what == "places":
        source, digest = np.arange(13), digest[::2][:13].copy()
    else:
        source += 100
    own = {"corpus": {"fingerprint": part.manifest["corpus"]["fingerprint"], "domains": None, "repeated_ids": None}}
    run_on(store, "same", source, digest, **own)
    run_on(store, "other", source, digest)
    for name in ("same", "other"):
        with pytest.raises(MismatchError) as error:
            ask(store, val, with_scores=name)
        message = str(error.value)
        assert part.manifest["corpus"]["fingerprint"] in message
        assert name == "same" or "sha256:other" in message
        wanted = {
            "content": "1 of 27 samples that both have are not the same, the first at place 4",
            "places": "12 of 13 samples",
            "nothing-in-common": "no sample in common",
        }[what]
        assert wanted in message
    outcome = lab.run("query", "--store", store, "--val-set", val, "--with-scores", "other")
    assert (outcome.code, outcome.out, "Traceback" in outcome.err) == (3, "", False)


def test_a_run_without_steps_or_scores(store: Path, val: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(store, tmp_path / "store"))
    source, digest = columns(own, "source_row", "source_digest")
    table = replace(
        RowTable(
            sample_id=np.array(["x"] * 27, dtype=object),
            domain=source * 0 - 1,
            source_row=source,
            source_file=source * 0,
            source_offset=source * 0,
            source_digest=digest,
            window_start=source * 0,
            n_tokens=source * 0,
        )
    )
    layout = RunLayout(steps=3, ranks=1, batch=27, span_steps=3, rows=27)
    run = make(own, "empty", layout, table)
    with pytest.raises(UsageError, match="no committed steps yet"):
        ask(own, val, with_scores="empty")
    with RunWriter(run) as writer:
        for step in range(3):
            writer.append(step, {"sample": np.arange(27)[None], "learning_rate": 0.1})
    with pytest.raises(UsageError, match="no usable row of the part has a score"):
        ask(own, val, with_scores="empty")


@pytest.mark.slow
def test_windows(lab: Lab, val: Path, tmp_path: Path) -> None:
    """By window where both are cut alike; else every window has the value of its sample."""
    store = tmp_path / "store"
    ghoststore.build(
        checkpoint=lab.checkpoint,
        data=lab.corpus,
        store=store,
        name="part",
        device="cpu",
        max_length=6,
        overlong="window",
        span_rows=8,
    )
    part = Store.open(store).part()
    source, start, digest = columns(store, "source_row", "window_start", "source_digest")
    assert len(source) > 27
    tokenizer = {"fingerprint": part.manifest["tokenizer"]["fingerprint"]}
    alike = {"tokenizer": tokenizer, "training": {"max_length": 6, "overlong": "window"}}
    by_row = run_on(store, "alike", source, digest, start, **alike)
    run_on(store, "longer", source, digest, start, **(alike | {"training": {"max_length": 7, "overlong": "window"}}))
    run_on(store, "other", source, digest, start, **(alike | {"tokenizer": {"fingerprint": "sha256:x"}}))
    of_row = {(int(s), int(w)): v for s, w, v in zip(source, start, by_row, strict=True)}
    of_sample = {s: np.nansum([v for (t, _), v in of_row.items() if t == s]) for s in set(source.tolist())}
    for name, joined in (("alike", "window"), ("longer", "sample"), ("other", "sample")):
        found = ask(store, val, with_scores=name, top_k=100)
        assert found.settings["joined_by"] == joined
        assert len(found.results[0].hits) > 10
        for hit in found.results[0].hits:
            key = (hit.source_row, hit.window_start)
            assert hit.value == pytest.approx(of_row[key] if joined == "window" else of_sample[hit.source_row])


@pytest.mark.slow
def test_a_part_of_token_shards(lab: Lab, val: Path, tmp_path: Path) -> None:
    """Its samples are proven, by the shards, to be those of the corpus that the run was trained on."""
    shards, store = tmp_path / "shards", tmp_path / "store"
    ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out=shards, domains=("earth",), workers=1)
    ghoststore.build(checkpoint=lab.checkpoint, data=shards, store=store, name="part", device="cpu")
    opened = ghoststore.TokenShards.open(shards)
    run_on(
        store,
        "run",
        opened.source_row.copy(),
        opened.source_digest.copy(),
        corpus={
            "fingerprint": opened.corpus_fingerprint,
            "domains": None,
            "fields": opened.source["fields"],
            "repeated_ids": None,
        },
    )
    worth = {hit.source_row: hit.value for hit in ghoststore.scores(store=store, top_k=K, text=False).hits}
    found = ask(store, val, with_scores="run")
    assert len(found.results[0].hits) == len(worth) > 3
    for hit in found.results[0].hits:
        row = int(hit.id.removeprefix("row-"))
        assert lab.rows[row]["domain"] == "earth"
        assert hit.value == worth[row]
    shutil.rmtree(shards)
    with pytest.raises(MismatchError, match=r"was built from token shards, and without them.*Corpus of the part: sha"):
        ask(store, val, with_scores="run")
    ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out=shards, domains=("sky",), workers=1)
    with pytest.raises(MismatchError, match="does not hold the tokens that part 'part' was built from"):
        ask(store, val, with_scores="run")


KEYS = st.integers(-5, 12)


@given(st.lists(KEYS, unique=True), st.lists(KEYS))
def test_join(keys: list[int], wanted: list[int]) -> None:
    """As a dictionary does it."""
    known = {key: float(place) for place, key in enumerate(keys)}
    found = join(np.array(wanted, dtype=np.int64), np.array(keys, dtype=np.int64), np.arange(len(keys), dtype=float))
    np.testing.assert_array_equal(found, [known.get(key, np.nan) for key in wanted])


NUMBERS = st.integers(-1000, 1000).map(lambda n: n / 7) | st.just(math.nan)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1), st.sampled_from([0.0, 0.25, 1.0]))
def test_who_takes_part(rows: list[tuple[float, float]], weight: float) -> None:
    """Never a row that cannot be used, never a number that is not finite; all others."""
    similarity, value = np.array(rows).T
    both = np.isfinite(similarity) & np.isfinite(value)
    if not both.any():
        with pytest.raises(UsageError):
            blended(similarity[None], value, weight)
        return
    scores, count = blended(similarity[None], value, weight)
    assert count == both.sum()
    np.testing.assert_array_equal(np.isfinite(scores[0]), both if weight else np.isfinite(similarity))
    assert not np.isinf(scores).any()
