"""Val data in every form, and evaluation between the steps of a managed loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ghoststore import GhostEngineManager
from ghoststore.errors import UsageError
from tests.support.loops import (
    VAL_BATCH,
    close_to,
    plan,
    run_of,
    steps_of,
)
from tests.support.managed_loops import (
    VAL_FORMS,
    Loop,
    check_scores,
    class_losses,
    config_of,
    oracle,
    sgd,
    train,
)
from tests.support.models import gpt2


@pytest.mark.parametrize("form", VAL_FORMS)
def test_forms_of_val_data(form: str, tmp_path: Path) -> None:
    steps = plan(2)
    _, expected = train(steps, config_of(tmp_path / "store", 2), val=VAL_FORMS[form])
    check_scores(tmp_path / "store", steps, expected)


def test_val_data_and_its_settings() -> None:
    model = gpt2()
    for config, message in (
        ({"method": "GradDotProd"}, "give `val_data`"),
        ({"method": "GradProjLora", "val_refresh_interval": 2}, "give `val_data`"),
    ):
        with pytest.raises(UsageError, match=message):
            GhostEngineManager(config, model, sgd(model))
    with pytest.raises(UsageError, match="give `val_data`"):
        GhostEngineManager({"method": "GradProjLora"}, model, sgd(model), val_losses=class_losses)


def test_scores_by_layer_need_layers_and_val_data(tmp_path: Path) -> None:
    model = gpt2()
    for settings, val in (({}, VAL_BATCH), ({"proj_rank_total": 16}, None)):
        config = config_of(tmp_path / "store", method="GradProjLora", per_layer=True, **settings)
        with pytest.raises(UsageError, match="per_layer"):
            GhostEngineManager(config, model, sgd(model), val_data=val)
    assert not any(module._forward_hooks for module in model.modules())


def test_evaluation_between_steps(tmp_path: Path) -> None:
    steps = plan(4, 2, 2)
    expected, seen = oracle(steps)
    model = gpt2()
    optimizer = sgd(model)
    config = config_of(tmp_path / "store", 4, gradient_accumulation_steps=2, val_refresh_interval=4)
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        loop = Loop(steps, manager, seen=seen)
        for step in range(4):
            loop.run(model, optimizer, step, step + 1)
            ages = [scores.val_age for scores in manager.last_scores]
            assert ages == [step, step]  # the val gradient is kept
            manager.detach_for_evaluation()
            assert not any(module._forward_hooks for module in model.modules())
            model.eval()
            with torch.no_grad():
                model(**VAL_BATCH)
            model(**VAL_BATCH).loss.backward()
            optimizer.zero_grad()
            manager.detach_for_evaluation()  # a second time, nothing
            manager.reattach_after_evaluation()
            manager.reattach_after_evaluation()
    found = {step: scores for step, _, scores in steps_of(run_of(tmp_path / "store"))}
    assert len(found) == 4
    close_to(found[0], expected[0])  # later ones are against a val gradient of older weights


def test_evaluation_with_the_engine_in_place(tmp_path: Path) -> None:
    steps = plan(3)
    expected, seen = oracle(steps)
    model = gpt2()
    optimizer = sgd(model)
    with GhostEngineManager(config_of(tmp_path / "store", 3), model, optimizer, val_data=VAL_BATCH) as manager:
        loop = Loop(steps, manager, seen=seen)
        for step in range(3):
            loop.run(model, optimizer, step, step + 1)
            with torch.no_grad():
                model(**VAL_BATCH)
    check_scores(tmp_path / "store", steps, expected)
