"""What scores of a step count with: against a slow reference, on a run that has everything in it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import UsageError
from ghoststore.store import RunWriter, Store
from tests.support.score_runs import GAP, LAYOUT, committed, make, row_table, values, whole


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "store"
    whole(folder)
    return folder


def reference(kind: str, steps: list[int]) -> dict[int, float]:
    """By source row."""
    sums: dict[int, float] = defaultdict(float)
    source = row_table().source_row
    for step in steps:
        given = values(step)
        sample, score = given["sample"], given["score"].astype(np.float32).astype(np.float64)
        finite = np.isfinite(score) & (sample >= 0)
        weight = 1 / np.abs(score[finite]).mean()
        if kind == "loss-fall":
            weight *= 0.1  # the training loss of these runs falls by that at every step
        for rank, place in zip(*np.nonzero(finite), strict=True):
            sums[int(source[sample[rank, place]])] += weight * score[rank, place]
    return sums


@pytest.mark.thin
@pytest.mark.parametrize("kind", ["unit", "loss-fall"])
@pytest.mark.parametrize("window", [None, "3:9"])
def test_sums_are_those_of_the_reference(store: Path, kind: str, window: str | None) -> None:
    result = ghoststore.scores(store=store, weight=kind, steps=window, top_k=50, text=False)
    wanted = reference(kind, [step for step in committed() if window is None or 3 <= step < 9])
    found = {hit.source_row: hit.value for hit in result.hits}
    assert found == pytest.approx(dict(wanted), rel=1e-5, abs=1e-6)
    assert result.settings["weight"] == kind
    # A step without a learning rate counts, too.
    assert result.summary.without_learning_rate == 0


def test_history_and_domains_have_the_weight(store: Path) -> None:
    entries = ghoststore.scores(store=store, weight="unit", sample="s0").history
    assert entries is not None
    rated = ghoststore.scores(store=store, weight="learning-rate", sample="s0").history
    assert rated is not None
    assert [entry.score for entry in entries] == [entry.score for entry in rated]
    ratios = {
        entry.step: entry.weighted / entry.score for entry in entries if entry.weighted is not None and entry.score
    }
    for step, ratio in ratios.items():
        score = values(step)["score"].astype(np.float32)
        assert ratio == pytest.approx(1 / np.abs(score[np.isfinite(score)]).mean(), rel=1e-5)
    table = ghoststore.scores(store=store, weight="unit", by="domain").domains
    hits = ghoststore.scores(store=store, weight="unit", top_k=50, text=False).hits
    assert table is not None
    assert sum(one.value_sum for one in table) == pytest.approx(sum(hit.value for hit in hits))


def test_a_loss_that_rises_weighs_nothing(tmp_path: Path) -> None:
    """And the weights of a window are those of its own steps, whatever came after."""
    store = tmp_path / "store"
    with RunWriter(make(store)) as writer:
        for step in range(20):
            loss = 5 - step / 10 if step < 10 else 4 + step / 10
            writer.append(step, values(step) | {"train_loss": loss})
    rising = ghoststore.scores(store=store, weight="loss-fall", steps="12:20", top_k=50, text=False)
    assert {hit.value for hit in rising.hits} == {0.0}
    first = ghoststore.scores(store=store, weight="loss-fall", steps="0:10", top_k=50, text=False)
    assert {hit.source_row: hit.value for hit in first.hits} == pytest.approx(
        dict(reference("loss-fall", list(range(10)))), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("kind", ["unit", "loss-fall", "learning-rate"])
def test_a_step_that_was_not_made_weighs_nothing(tmp_path: Path, kind: Any) -> None:
    """A loss scaler left it out, or a schedule begins at a learning rate of 0: its samples taught nothing then."""
    store = tmp_path / "store"
    with RunWriter(make(store)) as writer:
        for step in range(5):
            writer.append(step, values(step) | {"learning_rate": 0.0 if step == 2 else 0.1})
    entries = ghoststore.scores(store=store, weight=kind, sample="s0", steps="2:4").history
    assert entries is not None
    assert {entry.weighted for entry in entries if entry.step == 2 and entry.score is not None} == {0.0}
    assert all(entry.weighted for entry in entries if entry.step == 3 and entry.score is not None)


def test_what_cannot_be_is_refused(store: Path, tmp_path: Path) -> None:
    for value in ("sum", "last"):
        message = f"`weight=learning-rate` belongs to `value=cumulative` and mean, not to {value}"
        with pytest.raises(UsageError, match=message):
            ghoststore.scores(store=store, weight="learning-rate", value=value)
    with pytest.raises(UsageError, match=r"has a training loss at 1 of these steps; two are needed"):
        ghoststore.scores(store=store, weight="loss-fall", steps="0:1")
    with pytest.raises(UsageError, match="`weight` 'one' is unknown"):
        ghoststore.scores(store=store, weight="one")  # type: ignore[arg-type]
    plot = tmp_path / "plot.svg"
    ghoststore.scores(store=store, weight="unit", plot=plot, text=False)
    assert "unit" in plot.read_text()
    assert GAP[0] < LAYOUT.steps
    assert Store.open(store).run().layout == LAYOUT
