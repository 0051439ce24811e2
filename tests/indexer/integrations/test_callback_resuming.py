"""A Trainer that was stopped or killed, and one that trains a second time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    TrainerCallback,
)

from ghoststore.errors import CheckpointError, MismatchError, UsageError
from indexer.integrations.callback import PENDING
from tests.support.loops import (
    identical,
    run_of,
    same_arrays,
    steps_of,
    weights_of,
)
from tests.support.trainers import (
    StopAt,
    callback_of,
    hooks_of,
    trainer_of,
)


@pytest.mark.thin(1)
@pytest.mark.kill
@pytest.mark.parametrize("setting", ["fp32", "accumulation", "refresh"])
@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_resuming_from_a_checkpoint(setting: str, killed: bool, tmp_path: Path) -> None:
    extra = {"accumulation": {"gradient_accumulation_steps": 2}}.get(setting, {})
    own = {"refresh": {"val_refresh_interval": 3}}.get(setting, {})
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 13, **extra}

    whole = trainer_of(tmp_path / "whole", [callback_of(tmp_path / "whole" / "store", **own)], **saving)
    whole.train()

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    callback = callback_of(tmp_path / "store", **own)
    first = trainer_of(tmp_path, [callback, Kill() if killed else StopAt(5)], **saving)
    if killed:
        with pytest.raises(KeyboardInterrupt):
            first.train()
        callback.close()
    else:
        first.train()
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / PENDING).is_file()
    assert (checkpoint / PENDING).stat().st_mode == (checkpoint / "config.json").stat().st_mode
    assert run_of(tmp_path / "store", "trainer").steps == 4
    second = trainer_of(tmp_path, [callback_of(tmp_path / "store", **own)], **saving)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert identical(weights_of(second.model), weights_of(whole.model))
    same_arrays(run_of(tmp_path / "store", "trainer"), run_of(tmp_path / "whole" / "store", "trainer"))


def interrupted(folder: Path) -> Path:
    """A training that stopped after step 5, and its checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}
    trainer_of(folder, [callback_of(folder / "store"), StopAt(5)], **settings).train()
    return folder / "out" / "checkpoint-5"


@pytest.mark.slow
def test_a_checkpoint_that_was_moved(tmp_path: Path) -> None:
    checkpoint = tmp_path / "moved"
    shutil.move(interrupted(tmp_path), checkpoint)
    with pytest.raises(UsageError, match=r"lacks steps 4 to 4.*checkpoint-5"):
        trainer_of(tmp_path, [callback_of(tmp_path / "store")], max_steps=9).train(resume_from_checkpoint=checkpoint)
    callback = callback_of(tmp_path / "store", resume_from_checkpoint=checkpoint)
    trainer_of(tmp_path, [callback], max_steps=9).train(resume_from_checkpoint=checkpoint)
    assert run_of(tmp_path / "store", "trainer").complete


@pytest.mark.slow
def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    checkpoint = interrupted(tmp_path)
    (checkpoint / PENDING).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        trainer_of(tmp_path, [callback_of(tmp_path / "store")], max_steps=9).train(resume_from_checkpoint=checkpoint)


def test_training_that_stops_early_has_every_step_in_the_store(tmp_path: Path) -> None:
    trainer_of(tmp_path, [callback_of(tmp_path / "store"), StopAt(6)]).train()
    found = {step: len(places) for step, places, _ in steps_of(run_of(tmp_path / "store", "trainer"))}
    assert [found[step] > 0 for step in range(8)] == [True] * 6 + [False] * 2


@pytest.mark.slow
def test_training_a_second_time_is_another_run(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, [callback_of(tmp_path / "store")], max_steps=4)
    trainer.train()
    with pytest.raises(UsageError, match="scored a training already"):
        trainer.train()
    assert not hooks_of(trainer.model)
    other = trainer_of(tmp_path, [callback_of(tmp_path / "store")], model=trainer.model, max_steps=4)
    with pytest.warns(RuntimeWarning, match="step 0 is in the run already, with other scores"):
        other.train()
    shuffled = trainer_of(tmp_path, [callback := callback_of(tmp_path / "store")], max_steps=4, seed=4)
    with pytest.raises(MismatchError, match="another training"):
        shuffled.train()
    callback.close()
    assert not hooks_of(shuffled.model)
