"""Of a run that chose among candidates: a score counts with its weight, those that were not trained on for nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ghoststore
from ghoststore.cli import main
from ghoststore.errors import UsageError
from ghoststore.store import Run, RunLayout, RunWriter
from tests.support.score_runs import make, row_table

LAYOUT = RunLayout.saving(2, steps=9, ranks=2, batch=4, rows=24, weights=True)


def step_of(step: int) -> dict[str, np.ndarray]:
    """(2, 4) each: sample, score and weight. One place is empty, one score not finite; weights are 0, 1 or 2."""
    rng = np.random.default_rng([7, step])
    sample = rng.permutation(24)[:8].reshape(2, 4)
    score = rng.standard_normal((2, 4)).astype(np.float32)
    weight = rng.integers(0, 3, (2, 4)).astype(np.float32)
    if step == 3:
        sample[1, 3] = -1
        score[1, 3] = weight[1, 3] = np.nan
    if step == 4:
        score[0, 0] = np.nan
        weight[0, 0] = 0.0
    return {"sample": sample, "score": score, "weight": weight}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not at its end: some steps in chunks, some in a journal."""
    folder = tmp_path_factory.mktemp("chosen") / "store"
    run = make(folder, layout=LAYOUT, scoring={"choosing": {"policy": "top-k", "keep": 3}})
    with RunWriter(run) as writer:
        for step in range(8):
            given = step_of(step)
            writer.append(step, {**given, "loss": given["score"] * 0 + 2, "learning_rate": 0.1 * (step + 1)})
    return folder


def expected(*, candidates: bool, weight_of_step: str = "unit") -> dict[int, float]:
    """Σ w·s by row, each step scaled to a mean |s| of 1 over all candidates, or times its η; the slow way."""
    values: dict[int, float] = {}
    for step in range(8):
        given = step_of(step)
        sizes = [abs(float(score)) for score in given["score"].ravel() if np.isfinite(score)]
        factor = 0.1 * (step + 1) if weight_of_step == "learning-rate" else len(sizes) / sum(sizes)
        for place in np.ndindex(2, 4):
            row, score, weight = (float(given[name][place]) for name in ("sample", "score", "weight"))
            counts = row >= 0 and np.isfinite(score) and (candidates or weight > 0)
            if counts:
                values[int(row)] = values.get(int(row), 0.0) + factor * (1 if candidates else weight) * score
    return values


@pytest.mark.parametrize("weight", ["unit", "learning-rate"])
@pytest.mark.parametrize("candidates", [False, True])
def test_values(store: Path, candidates: bool, weight: Any) -> None:
    """The mean |s| of a step is over its finite scores, chosen or not; what counts is what was trained on."""
    result = ghoststore.scores(store=store, unit="window", weight=weight, top_k=100, text=False, candidates=candidates)
    values = {int(hit.source_row) * 100 + hit.window_start: hit.value for hit in result.hits}
    table = row_table()
    wanted = {
        int(table.source_row[row]) * 100 + int(table.window_start[row]): value
        for row, value in expected(candidates=candidates, weight_of_step=weight).items()
    }
    assert values.keys() == wanted.keys()
    assert [values[key] for key in wanted] == pytest.approx(list(wanted.values()), rel=1e-5)
    left = sum(int((step_of(step)["weight"] == 0).sum()) for step in range(8))
    assert result.summary.not_chosen == (0 if candidates else left)
    assert result.summary.times == 63 - result.summary.not_chosen
    assert result.settings["candidates"] is candidates


def test_history_and_domains(store: Path) -> None:
    """A sample's history is of the steps that trained on it; the learning rate counts with the weight."""
    history = ghoststore.scores(store=store, sample="s3", weight="learning-rate").history
    everything = ghoststore.scores(store=store, sample="s3", weight="learning-rate", candidates=True).history
    assert history is not None
    assert everything is not None
    assert 0 < len(history) < len(everything)
    for entry in history:
        assert entry.weighted == pytest.approx(entry.learning_rate * entry.score)
    domains = ghoststore.scores(store=store, by="domain").domains
    assert domains is not None
    assert sum(one.value_sum for one in domains) == pytest.approx(sum(expected(candidates=False).values()), rel=1e-5)


def main_of(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0


def test_watch_info_and_verify(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (frame,) = ghoststore.watch(store=store, once=True, text=False)
    assert frame.scored == sum(int((step_of(step)["weight"] > 0).sum()) for step in range(8))
    main_of("info", "--store", str(store), "--run", "run")
    assert "candidates, top-k, 3 kept" in capsys.readouterr().out
    (described,) = ghoststore.info(store, run="run").runs
    assert described.manifest["storage"]["weights"] is True
    assert ghoststore.verify(store).sound
    harmed = Path(shutil.copytree(store, tmp_path / "store"))
    chunk = next(path for path in sorted((harmed / "runs" / "run").rglob("*")) if path.suffix == ".log")
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert not ghoststore.verify(harmed).sound


def test_the_array_is_what_the_format_says(store: Path) -> None:
    run = ghoststore.Store.open(store).run("run")
    assert RunLayout.of(LAYOUT.to_json()) == LAYOUT
    assert [spec.name for spec in LAYOUT.arrays()][:4] == ["sample", "score", "loss", "weight"]
    written = np.stack([step_of(step)["weight"] for step in range(8)])
    np.testing.assert_array_equal(run.read_committed("weight"), written)
    with RunWriter(Run(run.path)) as writer, pytest.raises(ValueError, match="'weight' of step 8 has numbers where"):
        writer.append(8, {"sample": np.full((2, 4), -1), "weight": np.zeros((2, 4))})


def test_only_of_a_run_that_chose(tmp_path: Path) -> None:
    make(tmp_path / "store")
    with pytest.raises(UsageError, match="trained on every sample it scored"):
        ghoststore.scores(store=tmp_path / "store", candidates=True)


def test_the_command_says_what_was_left_out(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_of("scores", "--store", str(store), "--no-text")
    assert "candidates that were not trained on" in capsys.readouterr().out
