"""What a managed loop leaves in the store: every step, also after an error in one, or with a full disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststore import GhostEngineManager
from tests.support.loops import (
    VAL_BATCH,
    batch_of,
    close_to,
    identical,
    plan,
    run_of,
    steps_of,
    weights_of,
)
from tests.support.managed_loops import (
    Loop,
    config_of,
    oracle,
    plain,
    sgd,
)
from tests.support.models import gpt2


@pytest.mark.thin(2)
@pytest.mark.parametrize("interval", [1, 3, 10])
@pytest.mark.parametrize("saves", ["never", "as told", "every step"])
def test_nothing_between_save_intervals_is_dropped(saves: str, interval: int, tmp_path: Path) -> None:
    steps = plan(8)
    model = gpt2()
    optimizer = sgd(model)
    config = config_of(tmp_path / "store", 8, dot_prod_save_interval=interval)
    totals = []
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        loop = Loop(steps, manager)
        for step in range(8):
            loop.run(model, optimizer, step, step + 1)
            totals.append(manager.last_scores[0].total)
            if saves == "every step" or (saves == "as told" and manager.should_save_metrics(step)):
                manager.save_metrics(step)
    found = list(steps_of(run_of(tmp_path / "store")))
    assert len(found) == 8
    for step, places, scores in found:
        assert places.tolist() == steps[step][0]
        np.testing.assert_array_equal(scores, totals[step].float().numpy())


@pytest.mark.thin(2)
@pytest.mark.parametrize("ended", [2, 3, 4, 7])
def test_a_loop_that_ends_early_has_every_step_in_the_store(ended: int, tmp_path: Path) -> None:
    steps = plan(8)
    model = gpt2()
    optimizer = sgd(model)
    manager = GhostEngineManager(config_of(tmp_path / "store", 8), model, optimizer, val_data=VAL_BATCH)
    Loop(steps, manager).run(model, optimizer, 0, ended)
    manager.cleanup()
    found = list(steps_of(run_of(tmp_path / "store")))
    assert [places.tolist() for _, places, _ in found[:ended]] == [step[0] for step in steps[:ended]]
    assert all(len(places) == 0 for _, places, _ in found[ended:])
    assert run_of(tmp_path / "store").steps == min(8, -(-ended // 3) * 3)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.thin(2)
@pytest.mark.parametrize("again", [True, False], ids=["made again", "left out"])
@pytest.mark.parametrize("where", ["forward", "backward", "second micro-batch"])
def test_an_error_in_a_step_then_clear_gradients_and_on(where: str, again: bool, tmp_path: Path) -> None:
    steps = plan(5, 2, 2)
    model = gpt2()
    optimizer = sgd(model)
    expected, seen = oracle(steps)
    config = config_of(tmp_path / "store", 5, gradient_accumulation_steps=2)
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        loop = Loop(steps, manager, seen=seen)
        loop.run(model, optimizer, 0, 2)
        for place, places in enumerate(steps[2]):
            X, Y, batch_idx = batch_of(places)
            manager.attach_train_batch(X, Y, 2, batch_idx)
            manager.prepare_forward_input(X, Y)
            if where != "second micro-batch":
                loss = model(input_ids=X, labels=Y).loss if where == "backward" else None
                break
            if place:
                break
            model(input_ids=X, labels=Y).loss.backward()
            manager.prepare_gradients()
        manager.clear_gradients()
        if where == "backward":
            loss.backward()  # late: not scored any more
        optimizer.zero_grad(set_to_none=True)
        loop.run(model, optimizer, 2 if again else 3, 5)
    found = {step: (places.tolist(), scores) for step, places, scores in steps_of(run_of(tmp_path / "store"))}
    assert sorted(found) == [0, 1, 2, 3, 4]
    for step in (0, 1, 2, 3, 4) if again else (0, 1, 3, 4):
        assert found[step][0] == [place for micro in steps[step] for place in micro]
        close_to(found[step][1], expected[step])
    if not again:
        assert found[2][0] == []


def test_the_with_block_closes_after_an_exception(tmp_path: Path) -> None:
    steps = plan(7)
    model = gpt2()
    optimizer = sgd(model)
    config = config_of(tmp_path / "store")

    def fail_at_step_5(model: Any, step: int) -> None:
        if step == 5:
            raise KeyError("mine")

    with (
        pytest.raises(KeyError, match="mine"),
        GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager,
    ):
        Loop(steps, manager, seen=fail_at_step_5).run(model, optimizer)
    assert not any(module._forward_hooks for module in model.modules())
    assert run_of(tmp_path / "store").steps == 3  # the interval that is full; the next is repeated
    model = gpt2()
    optimizer = sgd(model)
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        Loop(steps, manager).run(model, optimizer)
    assert run_of(tmp_path / "store").complete


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_store_that_cannot_be_written(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ghoststore.errors import StorageError
    from ghoststore.store.run.run import RunWriter

    def refuse(self: Any, *args: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(RunWriter, "append", refuse)
    steps = plan(7)
    model = gpt2()
    optimizer = sgd(model)
    config = config_of(tmp_path / "store", on_store_error=policy)
    if policy == "stop":
        with (
            pytest.raises(StorageError, match="no space"),
            GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager,
        ):
            Loop(steps, manager).run(model, optimizer)
        return
    with (
        pytest.warns(RuntimeWarning, match="no space.*goes on without scores"),
        GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager,
    ):
        Loop(steps, manager).run(model, optimizer)
    assert identical(weights_of(model), weights_of(plain(steps)))
