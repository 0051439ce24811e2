"""`ghoststore train --dry-run`: what it says is what the training then does, and it leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghoststore.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from tests.support.trainings import Gym


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file, with when it was written and what is in it."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_it_says_what_is_done_and_writes_nothing(gym: Gym, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = tmp_path / "training"
    options = {"max_steps": 6, "eval_interval": 3, "corpus": "long", "max_length": 12}
    planned = gym.fresh(folder, dry_run=True, tensorboard=folder / "logs", **options).report
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    plan, done = planned.plan, gym.fresh(folder, **options)
    for name in ("steps", "rows", "parameters", "repeated_ids", "resumed_from"):
        assert getattr(planned, name) == getattr(done.report, name)
    assert (planned.checkpoint, planned.run, done.report.plan) == (None, None, None)
    lengths = [count for count in done.rows("n_tokens") if count > 1]
    assert (plan.samples, plan.usable_rows, plan.tokens) == (24, len(lengths), sum(lengths))
    assert (plan.rows_per_step, plan.epochs) == (3, pytest.approx(18 / len(lengths)))
    assert plan.tokens_per_step == pytest.approx(3 * sum(lengths) / len(lengths))
    assert "transformer.h.0.mlp.c_fc" in plan.layers
    assert "lm_head" in plan.layers
    assert plan.training_bytes == 4 * 4 * planned.parameters
    states = list(done.checkpoint().rglob("*.safetensors"))
    assert plan.checkpoint_bytes == pytest.approx(sum(path.stat().st_size for path in states), rel=0.05)
    assert 0 < plan.seconds_per_step < plan.seconds_left == pytest.approx(6 * plan.seconds_per_step)
    arrays = [done.run.read_committed(spec.name) for spec in done.run.layout.arrays()]
    assert plan.run_bytes == sum(array.nbytes for array in arrays)
    written = [str(path) for path in (folder / "out" / "tokens", folder / "out" / "checkpoint-…")]
    assert plan.writes == [*written, str(folder / "store" / "runs" / "run"), str(folder / "logs")]
    before = tree(folder)
    again = gym.fresh(folder, dry_run=True, **options).report
    assert (again.resumed_from, again.plan.seconds_per_step, again.plan.seconds_left) == (6, None, None)
    with pytest.raises(MismatchError, match="seed"):
        gym.fresh(folder, dry_run=True, seed=4, **options)
    with pytest.raises(MismatchError, match=r"run 'run' of .* was trained with other settings"):
        gym.fresh(folder, dry_run=True, seed=4, output_dir=tmp_path / "new", **options)
    assert tree(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["temporary", "training"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_of_a_step_that_chooses(gym: Gym, tmp_path: Path) -> None:
    """Candidates are drawn, and the linears of the blocks alone are scored."""
    plan = gym.fresh(tmp_path, dry_run=True, max_steps=4, candidates=9, keep=3).report.plan
    assert plan.rows_per_step == 9
    assert plan.layers
    assert all(".h." in name for name in plan.layers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command(gym: Gym, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, "--dry-run")
    assert outcome.code == 0, outcome.err
    words = " ".join(outcome.out.split())
    for text in ("would train", "27 of 27 samples", "steps 12,", "a step 3 rows", "a checkpoint", "written nothing"):
        assert text in words
    assert str(tmp_path / "store" / "runs" / "run") in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together(gym: Gym, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`eval_only` writes nothing in any case: leave out `dry_run`"):
        gym.fresh(tmp_path, dry_run=True, eval_only=True)
