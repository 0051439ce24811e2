"""``ghoststore query --run`` and ``select --run`` of a run that chose: what no step trained on counts for nothing, and
what was trained on counts as in ``ghoststore scores``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.cli import main
from ghoststore.errors import UsageError
from ghoststore.store import Run, Store

if TYPE_CHECKING:
    from tests.conftest import Lab

STEPS = 6


@pytest.fixture(scope="module")
def store(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``chose`` keeps the vectors whose products its sketched scores are, of candidates with weights of many sizes and
    of 0; ``plain`` chose nothing.
    """
    folder = tmp_path_factory.mktemp("chose")
    lab.write(folder / "val.jsonl", lab.sample_rows(5, 5))

    def policy(candidates: ghoststore.Candidates) -> list[float]:
        return [float(place % 3) for place in range(len(candidates))]

    shared: dict[str, Any] = {
        "data": lab.corpus,
        "val_set": folder / "val.jsonl",
        "store": folder / "store",
        "checkpoint": lab.checkpoint,
        "device": "cpu",
        "batch_size": 6,
        "val_batch_size": 3,
        "keep_gradients": 1,
        "score": "sketched",
        "projection": ProjectionConfig(rank_total=64, precondition="none"),
        "proj_dtype": "float32",
    }
    given = {"candidates": 6, "policy": policy, "choosing_begins_at": 0, "max_steps": STEPS}
    ghoststore.train(**shared, **given, name="chose", output_dir=folder / "chose")
    ghoststore.train(**shared, max_steps=1, name="plain", output_dir=folder / "plain")
    return folder / "store"


def run_of(store: Path) -> Run:
    return Store.open(store).run("chose")


def ask(store: Path, **options: Any) -> Any:
    return ghoststore.query(store=store, run="chose", metric="dot", top_k=100, text=False, device="cpu", **options)


@pytest.mark.parametrize("weight", ["learning-rate", "unit", "loss-fall"])
@pytest.mark.parametrize("candidates", [False, True])
def test_sums_are_those_of_scores(store: Path, weight: Any, candidates: bool) -> None:
    asked = ask(store, weight=weight, candidates=candidates)
    told = ghoststore.scores(store=store, run="chose", weight=weight, candidates=candidates, top_k=100, text=False)
    wanted = {hit.source_row: (hit.value, hit.times, hit.last_step) for hit in told.hits}
    given = {hit.source_row: (hit.score, hit.times, hit.last_step) for hit in asked.results[0].hits}
    assert given.keys() == wanted.keys()
    for row, numbers in wanted.items():
        assert given[row] == pytest.approx(numbers, rel=1e-4, abs=1e-7)
    left = 0 if candidates else int((run_of(store).read_committed("weight") == 0).sum())
    assert left == (0 if candidates else 2 * STEPS)
    assert (asked.settings["candidates"], asked.settings["candidates_left_out"]) == (candidates, left)
    assert (told.summary.not_chosen, asked.settings["visits"]) == (left, told.summary.times)


def test_select_takes_what_was_trained_on(store: Path, tmp_path: Path) -> None:
    run = run_of(store)
    source = run.rows.read("source_row", 0, run.layout.rows)
    sample, weight = run.read_committed("sample"), run.read_committed("weight")
    trained, seen = np.unique(source[sample[weight > 0]]), np.unique(source[sample])
    assert len(trained) < len(seen)
    for available, left, options in ((trained, 2 * STEPS, {}), (seen, 0, {"all_candidates": True})):
        made = ghoststore.select(
            store=store, run="chose", fraction=1.0, out=tmp_path / f"{len(available)}.jsonl", **options
        )
        assert (made.samples, made.settings["candidates_left_out"]) == (len(available), left)
        assert made.settings["candidates"] is bool(options)
        assert made.leaks["found"] is None


def test_the_commands_say_what_was_left_out(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, *options in (["query", "--no-text"], ["select", "--count", "3", "--out", str(tmp_path / "out.jsonl")]):
        with pytest.raises(SystemExit) as ended:
            main([command, "--store", str(store), "--run", "chose", *options])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert f"{2 * STEPS} candidates that were not trained on" in out
        assert "near-duplicates" not in out or "not looked for" in out


def test_only_of_a_run_that_chose(store: Path) -> None:
    with pytest.raises(UsageError, match="trained on every sample it scored"):
        ghoststore.query(store=store, run="plain", candidates=True)
    with pytest.raises(UsageError, match="`candidates` belongs to `run`"):
        ghoststore.query(store=store, val_set="val.jsonl", candidates=True)
    with pytest.raises(UsageError, match="`all_candidates` belongs to `run`"):
        ghoststore.select(store=store, val_set="val.jsonl", count=1, out="out.jsonl", all_candidates=True)
