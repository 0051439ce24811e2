"""`ghoststore.scores` against a slow reference, on a run that has everything in it; and what it refuses."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ghoststore
from ghoststore.errors import CorruptError, UsageError
from ghoststore.store.run.pieces import side_by_side
from ghoststore.store.run.ranges import inside
from query.training_scores.steps import choose_column, stream_steps, window_of
from query.training_scores.sums import ScoreSums, Units, best
from query.training_scores.weights import StepWeights
from tests.support.notes import Notes
from tests.support.score_runs import (
    GAP,
    LAYOUT,
    ROWS,
    SAMPLES,
    Reference,
    append,
    committed,
    domain_of,
    first_row,
    make,
    row_table,
    values,
    whole,
)

if TYPE_CHECKING:
    from tests.conftest import Lab

WEIGHTED = ("cumulative", "mean")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores") / "store"
    whole(folder)
    return folder


def ranked(reference: Reference, kind: str, k: int, *, lowest: bool = False) -> list[tuple[int, float]]:
    """(unit, value), best first, equal ones by place."""
    sign = 1 if lowest else -1
    return sorted(reference.values(kind).items(), key=lambda item: (sign * item[1], item[0]))[:k]


def agree(hits: Sequence[Any], expected: list[tuple[int, float]], reference: Reference) -> None:
    assert [hit.rank for hit in hits] == list(range(1, len(expected) + 1))
    table, seen = row_table(), reference.scores()
    for hit, (key, value) in zip(hits, expected, strict=True):
        row = first_row(key, reference.unit)
        assert (hit.id, hit.source_row) == (table.sample_id[row], table.source_row[row])
        assert hit.domain == domain_of(key, reference.unit)
        assert hit.value == pytest.approx(value, rel=1e-9, abs=1e-15)
        assert hit.times == len(seen[key])
        assert hit.last_step == seen[key][-1][0]
        assert hit.mean_score == pytest.approx(np.mean([score for _, score, _ in seen[key]]), rel=1e-9)
        assert hit.negative_share == np.mean([score < 0 for _, score, _ in seen[key]])
        assert hit.window_start == (table.window_start[row] if reference.unit == "window" else 0)


VALUES = (*itertools.product(WEIGHTED, ("unit", "learning-rate")), ("sum", "unit"), ("last", "unit"))
"""(value, weight)."""


@pytest.mark.thin
@pytest.mark.parametrize(("kind", "weight"), VALUES)
@pytest.mark.parametrize("unit", ["sample", "window"])
def test_values(store: Path, kind: Any, weight: Any, unit: Any) -> None:
    reference = Reference(committed(), unit=unit, weight=weight, rated=kind in WEIGHTED)
    found = ghoststore.scores(store=store, value=kind, weight=weight, unit=unit, top_k=7, bottom_k=30, text=False)
    agree(found.hits, ranked(reference, kind, 7), reference)
    agree(found.bottom, ranked(reference, kind, 30, lowest=True), reference)
    assert len(found.hits) == 7


def test_the_default_weight(store: Path) -> None:
    """Every step is scaled to a mean |score| of 1, and what is returned says so."""
    found, named = (ghoststore.scores(store=store, text=False, **given) for given in ({}, {"weight": "unit"}))
    assert found == named
    assert found.settings["weight"] == "unit"


@pytest.mark.parametrize(
    ("options", "array", "places"),
    [
        ({"group": "law"}, "group_score", (0,)),
        ({"group": "code"}, "group_score", (1,)),
        ({"layers": ["mlp"]}, "block_score", (0, 2)),
        ({"layers": ["h.1*"]}, "block_score", (2,)),
        ({"layers": ["h.0", "h.10"], "exclude_layers": ["h.0.mlp"]}, "block_score", (1, 2)),
        ({"exclude_layers": ["attn"]}, "block_score", (0, 2)),
        ({"group": "law", "weight": "learning-rate"}, "group_score", (0,)),
    ],
    ids=str,
)
def test_groups_and_layers(store: Path, options: Any, array: str, places: tuple[int, ...]) -> None:
    reference = Reference(committed(), array=array, places=places, weight=options.get("weight", "unit"))
    found = ghoststore.scores(store=store, top_k=30, text=False, **options)
    expected = ranked(reference, "cumulative", 30)
    assert [hit.source_row for hit in found.hits] == [key for key, _ in expected]
    np.testing.assert_allclose([hit.value for hit in found.hits], [value for _, value in expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ("0:5", range(5)),
        ("3:9", range(3, 9)),
        (":4", range(4)),
        ("18:", range(18, 23)),
        ("-3:", range(20, 23)),
        (":-20", range(3)),
        ("5:1000", range(5, 23)),
        ("-1000:2", range(2)),
        ("8:17", [8, 9, 15, 16]),
        (":", committed()),
        (None, committed()),
        (slice(2, 4), [2, 3]),
        (slice(-2, None), [21, 22]),
    ],
)
def test_windows_of_steps(store: Path, asked: Any, steps: Any) -> None:
    reference = Reference([step for step in steps if step in committed()])
    found = ghoststore.scores(store=store, steps=asked, top_k=30, text=False)
    agree(found.hits, ranked(reference, "cumulative", 30), reference)
    assert found.summary.steps == len(reference.steps)
    assert (found.summary.first, found.summary.last) == (reference.steps[0], reference.steps[-1])


@given(st.none() | st.integers(-40, 40), st.none() | st.integers(-40, 40))
def test_a_window_is_a_slice(run: Any, start: int | None, stop: int | None) -> None:
    text = ":".join("" if one is None else str(one) for one in (start, stop))
    wanted = [step for step in list(range(LAYOUT.steps))[start:stop] if step in committed()]
    if not wanted:
        with pytest.raises(UsageError, match="no committed step"):
            window_of(run, text)
        return
    window = window_of(run, text)
    streamed = stream_steps(
        run, choose_column(run), inside(run.ranges, window), weights=StepWeights(run, "unit", window)
    )
    pieces = [range(piece.start, piece.stop) for piece in streamed]
    assert [step for piece in pieces for step in piece] == wanted


@pytest.fixture(scope="module")
def run(store: Path) -> Any:
    return ghoststore.Store.open(store).run()


@pytest.mark.parametrize("kind", ["cumulative", "last"])
@pytest.mark.parametrize(
    ("domains", "min_times"), [((), None), (("sky",), None), (("sky", "earth"), 3), ((), 5), (("earth",), 100)]
)
def test_filters(store: Path, kind: Any, domains: tuple[str, ...], min_times: int | None) -> None:
    reference = Reference(committed(), rated=kind in WEIGHTED)
    seen = reference.scores()
    found = ghoststore.scores(store=store, value=kind, top_k=30, domains=domains, min_times=min_times, text=False)
    expected = [
        (key, value)
        for key, value in ranked(reference, kind, 30)
        if (not domains or domain_of(key, "sample") in domains) and len(seen[key]) >= (min_times or 0)
    ]
    agree(found.hits, expected, reference)


@pytest.mark.thin
@pytest.mark.parametrize(("kind", "weight"), VALUES)
@pytest.mark.parametrize("min_times", [None, 4])
def test_by_domain(store: Path, kind: Any, weight: Any, min_times: int | None) -> None:
    reference = Reference(committed(), weight=weight, rated=kind in WEIGHTED)
    seen, value = reference.scores(), reference.values(kind)
    found = ghoststore.scores(store=store, by="domain", value=kind, weight=weight, min_times=min_times)
    assert found.domains is not None
    assert {one.domain for one in found.domains} == {"sky", "earth", None}
    assert found.hits == []
    for one in found.domains:
        mine = [key for key in range(SAMPLES) if domain_of(key, "sample") == one.domain]
        mine = [key for key in mine if len(seen.get(key, [])) >= (min_times or 0)]
        scored = [key for key in mine if key in seen]
        scores = np.array([score for key in scored for _, score, _ in seen[key]])
        total = sum(value[key] for key in scored)
        assert (one.rows, one.scored_rows, one.times) == (len(mine), len(scored), len(scores))
        assert one.value_sum == pytest.approx(total)
        assert one.value_per_row == pytest.approx(total / len(scored))
        assert one.value_per_time == pytest.approx(total / len(scores))
        assert one.negative_share == np.mean(scores < 0)
        assert one.mean_score == pytest.approx(scores.mean())
        assert one.standard_error == pytest.approx(scores.std(ddof=1) / math.sqrt(len(scores)))
    order = [one.value_per_time for one in found.domains]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    ("sample", "weight"), [("s0", "unit"), ("s0", "learning-rate"), ("s3", "unit"), ("s14", "unit")]
)
def test_the_history_of_a_sample(store: Path, sample: str, weight: Any) -> None:
    reference, table = Reference(committed(), weight=weight), row_table()
    found = ghoststore.scores(store=store, sample=sample, weight=weight)
    assert found.history is not None
    expected, total = [], 0.0
    for step in committed():
        factor = reference.factor(step)
        for rank, row, score, eta, loss in reference.places_of(step):
            if table.sample_id[row] == sample:
                counts = reference.counts(score, factor)
                total += score * factor if counts else 0.0
                expected.append(
                    (
                        step,
                        rank,
                        table.source_row[row],
                        table.window_start[row],
                        loss if math.isfinite(loss) else None,
                        eta if math.isfinite(eta) else None,
                        score if math.isfinite(score) else None,
                        pytest.approx(score * factor) if counts else None,
                        pytest.approx(total),
                    )
                )
    assert len(expected) > 0
    assert [tuple(entry) for entry in (map_of(one) for one in found.history)] == expected


def map_of(entry: Any) -> list[Any]:
    return [getattr(entry, name) for name in type(entry).__dataclass_fields__]


def test_a_sample_that_was_not_seen(store: Path) -> None:
    table, notes = row_table(), Notes()
    seen = {table.sample_id[row] for step in (2, 3) for row in values(step)["sample"].ravel() if row >= 0}
    absent = next(name for name in table.sample_id if name not in seen)
    found = ghoststore.scores(store=store, sample=absent, steps="2:4", progress=notes)
    assert found.history == []
    assert "was not trained on" in notes.said[0]


def test_samples_of_the_same_id(tmp_path: Path) -> None:
    table = row_table(sample_id=np.array(["same"] * ROWS, dtype=object))
    append(make(tmp_path / "store", table=table), 0, 5)
    notes = Notes()
    found = ghoststore.scores(store=tmp_path / "store", sample="same", progress=notes)
    assert notes.said == [f"{SAMPLES} samples have the id 'same', each with its own sum: tell them apart by row"]
    assert found.history is not None
    assert len(found.history) == found.summary.times


def test_the_summary(store: Path) -> None:
    """NaN and infinite scores are counted, and enter nothing."""
    reference = Reference(committed())
    places = [place for step in committed() for place in reference.places_of(step)]
    score = np.array([place[2] for place in places])
    rated = np.isfinite([place[3] for place in places])
    counts = np.isfinite(score) & rated
    summary = ghoststore.scores(store=store, weight="learning-rate", text=False).summary
    assert (summary.steps, summary.planned, summary.gaps) == (18, 23, [GAP])
    assert (summary.rows, summary.times) == (SAMPLES, len(places))
    assert summary.seen == len({reference.key(place[1]) for place in places})
    assert summary.scored == counts.sum()
    assert summary.unscored == np.isnan(score).sum() > 0
    assert summary.not_finite == np.isinf(score).sum() > 0
    assert summary.without_learning_rate == (np.isfinite(score) & ~rated).sum() > 0
    assert summary.negative_share == np.mean(score[counts] < 0)
    for options in ({"value": "sum"}, {"weight": "unit"}):
        unrated = ghoststore.scores(store=store, text=False, **options).summary
        assert unrated.scored == np.isfinite(score).sum()
        assert unrated.without_learning_rate == 0


@pytest.mark.parametrize("weight", ["unit", "learning-rate"])
def test_spans_in_any_order(store: Path, weight: Any) -> None:
    """Running sums, the newest score too, are those of the steps in order: a gap may be filled later."""
    run = ghoststore.Store.open(store).run()
    weights = StepWeights(run, weight, (0, LAYOUT.steps))
    units, sums = Units(run, "sample"), ScoreSums(SAMPLES)
    spans = list(run.spans)
    random.Random(1).shuffle(spans)
    for span in spans:
        for piece in stream_steps(run, choose_column(run), [run.layout.span_of(span)], weights=weights):
            sums.add(piece.places, units.of(piece.places.row))
    for kind in ("cumulative", "mean", "last"):
        expected = Reference(committed(), weight=weight).values(kind)
        found = {key: value for key, value in enumerate(sums.values(kind)) if np.isfinite(value)}
        assert found == pytest.approx(expected)


def test_arrays_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of different lengths: each piece holds the same steps of all arrays."""
    monkeypatch.setattr("ghoststore.store.run.layout.CHUNK_BYTES", 60)
    run = whole(tmp_path / "store")
    names = ["sample", "score", "block_score", "learning_rate"]
    assert len({run.spec(name).chunk_rows for name in names}) > 1
    found: dict[str, list[Any]] = {name: [] for name in names}
    for piece in side_by_side(run, names, run.ranges):
        for name in names:
            assert len(piece.data[name]) == piece.stop - piece.start
            found[name].append(piece.data[name].copy())
    for name in names:
        np.testing.assert_array_equal(np.concatenate(found[name]), run.read_committed(name))


@given(st.lists(st.sampled_from([0.0, -1.0, 2.5, math.nan, math.inf, 1e300])), st.integers(0, 6))
def test_best(numbers: list[float], k: int) -> None:
    expected = sorted((-value, place) for place, value in enumerate(numbers) if math.isfinite(value))[:k]
    assert best(np.array(numbers, dtype=np.float64), k).tolist() == [place for _, place in expected]


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    run = whole(tmp_path / "store")
    file = run.path / "score/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="score/c/1/0/0"):
        ghoststore.scores(store=tmp_path / "store")
    assert ghoststore.scores(store=tmp_path / "store", steps="0:5").summary.steps == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "nonesuch"}, "no run 'nonesuch'; it has: run"),
        ({"sample": "s99"}, "no sample with the id 's99'; its first are 's0'"),
        ({"group": "math"}, "no val group 'math'; it has: law, code"),
        ({"domains": ["sea"]}, "no domain 'sea'; it has: sky, earth"),
        ({"layers": ["h.99"]}, "'h.99' matches no layer of run 'run': transformer.h.0.mlp.c_fc"),
        ({"layers": ["h.1"]}, "'h.1' matches no layer"),
        ({"exclude_layers": ["transformer"]}, "no layer of run 'run' is left"),
        ({"group": "law", "layers": ["mlp"]}, "`group` and `layers` do not go together"),
        ({"steps": "30:40"}, "`steps=30:40`: no committed step of run 'run' is there; its steps are 0 to 22"),
        ({"steps": "11:14"}, "no committed step"),
        ({"steps": "5:2"}, "no committed step"),
        ({"steps": "7"}, "`steps` '7': expected first:stop"),
        ({"steps": "0:10:2"}, "`steps` '0:10:2': expected first:stop"),
        ({"steps": slice(0, 10, 2)}, "not every 2th"),
        ({"value": "median"}, "`value` 'median' is unknown; known: cumulative"),
        ({"unit": "token"}, "`unit` 'token' is unknown; known: sample, window"),
        ({"by": "id"}, "`by` 'id' is unknown; known: domain"),
        ({"top_k": 0}, "ask for at least one sample"),
        ({"top_k": -1}, "`top_k` must be at least 0, not -1"),
        ({"bottom_k": -1}, "`bottom_k` must be at least 0"),
        ({"min_times": 0}, "`min_times` must be at least 1"),
        ({"by": "domain", "top_k": 3}, "does not go with `top_k`"),
        ({"sample": "s0", "by": "domain"}, "does not go with `by`"),
        ({"sample": "s0", "bottom_k": 3}, "does not go with `bottom_k`"),
        ({"sample": "s0", "domains": ["sky"]}, "does not go with `domains`"),
        ({"sample": "s0", "value": "sum"}, "does not go with `value`"),
        ({"sample": "s0", "unit": "window"}, "does not go with `unit`"),
        ({"sample": "s0", "min_times": 2}, "does not go with `min_times`"),
        ({"plot": "scores.gif"}, r"`plot=scores.gif`: pictures are written as \.png, \.pdf, \.svg"),
        ({"plot": "nonesuch/scores.png"}, "the folder .*nonesuch does not exist"),
    ],
    ids=str,
)
def test_refused(store: Path, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ghoststore.scores(store=store, **options)


def test_a_run_that_keeps_less(tmp_path: Path) -> None:
    """The message says with which option of train it would be there."""
    from dataclasses import replace

    store = tmp_path / "store"
    plain = make(store, layout=replace(LAYOUT, groups=(), blocks=()))
    with pytest.raises(UsageError, match="no committed steps yet"):
        ghoststore.scores(store=store)
    append(plain, 0, 5)
    with pytest.raises(UsageError, match="train --val-groups"):
        ghoststore.scores(store=store, group="law")
    for option in ("layers", "exclude_layers"):
        with pytest.raises(UsageError, match="train --per-layer"):
            ghoststore.scores(store=store, **{option: ["mlp"]})
    make(store, "other")
    with pytest.raises(UsageError, match="several runs; choose one with `run`: other, run"):
        ghoststore.scores(store=store)
    ghoststore.Store.create(tmp_path / "bare")
    with pytest.raises(UsageError, match="has no runs; `ghoststore train"):
        ghoststore.scores(store=tmp_path / "bare")


WRITE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import score_runs
score_runs.append(score_runs.make(Path({store!r})), 0, 23)
"""


def test_while_another_process_writes(lab: Lab, tmp_path: Path) -> None:
    """Every look is the state of some moment: whole spans, and the values of exactly their steps."""
    store = tmp_path / "store"
    make(store)
    writer = lab.start(code=WRITE.format(tests=str(Path(__file__).parent), store=str(store)))
    seen, last = set(), 0
    while last < 18:
        run = ghoststore.Store.open(store).run()
        if not run.spans:
            continue
        found = ghoststore.scores(store=store, top_k=30, text=False)
        steps = committed()[: found.summary.steps]
        assert found.summary.steps % 5 in (0, 3)
        assert found.summary.steps >= last
        reference = Reference(steps)
        agree(found.hits, ranked(reference, "cumulative", 30), reference)
        last = found.summary.steps
        seen.add(last)
    assert lab.wait(writer).code == 0
    assert 18 in seen
