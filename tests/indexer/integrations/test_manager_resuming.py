"""A managed loop that was interrupted, starts over, or begins in the middle."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststore import GhostEngineManager
from ghoststore.errors import MismatchError, UsageError
from tests.support.loops import (
    VAL_BATCH,
    Plan,
    arrays_of,
    identical,
    plan,
    run_of,
    same_arrays,
    steps_of,
    weights_of,
)
from tests.support.managed_loops import (
    Loop,
    config_of,
    sgd,
    train,
)
from tests.support.models import gpt2
from tests.support.runs import rewrite_manifest


def whole_run(store: Path, steps: Plan, **settings: Any) -> Any:
    """Uninterrupted; a state is taken after step 4, as in the run that is interrupted there."""
    model = gpt2()
    optimizer = sgd(model)
    with GhostEngineManager(config_of(store, len(steps), **settings), model, optimizer, VAL_BATCH) as manager:
        loop = Loop(steps, manager)
        loop.run(model, optimizer, 0, 5)
        manager.state_dict()
        loop.run(model, optimizer, 5)
    return model


@pytest.mark.thin(1)
@pytest.mark.parametrize("how", ["cleanup", "killed", "killed later"])
@pytest.mark.parametrize(("interval", "refresh"), [(3, 1), (3, 3), (10, 2), (5, 1)])
def test_a_resumed_loop_is_one_that_was_not_interrupted(interval: int, refresh: int, how: str, tmp_path: Path) -> None:
    steps = plan(11)
    settings = {"dot_prod_save_interval": interval, "val_refresh_interval": refresh}
    expected = whole_run(tmp_path / "whole", steps, **settings)
    config = config_of(tmp_path / "store", 11, **settings)
    model = gpt2()
    optimizer = sgd(model)
    manager = GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH)
    loop = Loop(steps, manager)
    loop.run(model, optimizer, 0, 5)
    file = io.BytesIO()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ghosts": manager.state_dict()}
    torch.save(states, file)
    if how == "cleanup":
        manager.cleanup()
    else:
        if how == "killed later":
            loop.run(model, optimizer, 5, 8)
        manager.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # as a kill: nothing more is written
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model = gpt2()
    model.load_state_dict(states["model"])
    optimizer = sgd(model)
    optimizer.load_state_dict(states["optimizer"])
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        manager.load_state_dict(states["ghosts"])
        Loop(steps, manager).run(model, optimizer, states["ghosts"]["step"])
    assert identical(weights_of(model), weights_of(expected))
    same_arrays(run_of(tmp_path / "store"), run_of(tmp_path / "whole"))
    assert run_of(tmp_path / "store").complete


def test_a_loop_that_starts_over_repeats_what_is_committed(tmp_path: Path) -> None:
    steps = plan(7)
    whole, _ = train(steps, config_of(tmp_path / "whole"))
    for last in (5, 7):
        model = gpt2()
        optimizer = sgd(model)
        manager = GhostEngineManager(config_of(tmp_path / "store"), model, optimizer, val_data=VAL_BATCH)
        Loop(steps, manager).run(model, optimizer, 0, last)
        manager.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    same_arrays(run_of(tmp_path / "store"), run_of(tmp_path / "whole"))
    assert identical(weights_of(model), weights_of(whole))


def test_a_loop_that_starts_over_with_other_data_is_another_run(tmp_path: Path) -> None:
    train(plan(7), config_of(tmp_path / "store"))
    before = arrays_of(run_of(tmp_path / "store"))
    other = plan(7)[::-1]
    model = gpt2()
    optimizer = sgd(model)
    with (
        pytest.raises(MismatchError, match="has step 0 already, with other samples"),
        GhostEngineManager(config_of(tmp_path / "store"), model, optimizer, val_data=VAL_BATCH) as manager,
    ):
        Loop(other, manager).run(model, optimizer)
    for name, values in arrays_of(run_of(tmp_path / "store")).items():
        np.testing.assert_array_equal(values, before[name])


def test_a_run_that_was_ended_does_not_go_on(tmp_path: Path) -> None:
    steps = plan(7)
    for last in (4, 7):
        model = gpt2()
        optimizer = sgd(model)
        manager = GhostEngineManager(config_of(tmp_path / "store"), model, optimizer, val_data=VAL_BATCH)
        loop = Loop(steps, manager)
        if last == 4:
            loop.run(model, optimizer, 0, last)
        else:
            with pytest.raises(MismatchError, match="has step 4 already, with other samples \\(or none\\)"):
                loop.run(model, optimizer)
        manager.cleanup()


def test_a_state_that_lacks_steps_of_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path / "store")
    model = gpt2()
    optimizer = sgd(model)
    manager = GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH)
    Loop(plan(7), manager).run(model, optimizer, 0, 5)
    state = manager.state_dict()
    manager.cleanup()
    manager = GhostEngineManager(config, gpt2(), sgd(gpt2()), val_data=VAL_BATCH)
    with pytest.raises(UsageError, match="lacks steps 3 to 4"):
        manager.load_state_dict({"step": 5, "pending": {}})
    with pytest.raises(UsageError, match="step 8; the run was made for 7"):
        manager.load_state_dict({"step": 8, "pending": {}})
    manager.load_state_dict(state)
    manager.cleanup()


def test_scoring_may_begin_in_the_middle_of_a_training(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    steps = plan(7)
    manager = GhostEngineManager(config_of(tmp_path / "store"), model, optimizer, val_data=VAL_BATCH)
    with pytest.warns(RuntimeWarning, match="lacks steps"):
        manager.load_state_dict({"step": 4, "pending": {}})
    Loop(steps, manager).run(model, optimizer, 4)
    manager.cleanup()
    found = {step: places.tolist() for step, places, _ in steps_of(run_of(tmp_path / "store"))}
    assert found == {3: [], **{step: steps[step][0] for step in (4, 5, 6)}}


def rewrite_config(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The configuration in the manifest of the run, as another release of transformers would have written it."""
    rewrite_manifest(store / "runs" / "run", lambda manifest: change(manifest["model"]["config"]))


def test_a_release_of_transformers_that_knows_more_fields_goes_on(tmp_path: Path) -> None:
    """The manifest of the run lacks a field that the class fills in, as one of the release before would."""
    steps, config = plan(7), config_of(tmp_path / "store")
    train(steps, config_of(tmp_path / "whole"))
    model = gpt2()
    optimizer = sgd(model)
    manager = GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH)
    Loop(steps, manager).run(model, optimizer, 0, 5)
    state = manager.state_dict()
    manager.cleanup()
    rewrite_config(tmp_path / "store", lambda stored: stored.pop("add_cross_attention"))
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        manager.load_state_dict(state)
        Loop(steps, manager).run(model, optimizer, 5)
    same_arrays(run_of(tmp_path / "store"), run_of(tmp_path / "whole"))
    rewrite_config(tmp_path / "store", lambda stored: stored.update(activation_function="relu"))
    with pytest.raises(MismatchError, match=r"model.config.activation_function: stored 'relu'"):
        GhostEngineManager(config, gpt2(), sgd(gpt2()), val_data=VAL_BATCH)
