"""Calls out of order, and a model or run that cannot be used: errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ghoststore import GhostEngineManager
from ghoststore.errors import BusyError, CaptureError, MismatchError, UsageError
from tests.support.loops import (
    VAL_BATCH,
    batch_of,
    plan,
    run_of,
)
from tests.support.managed_loops import (
    Bench,
    Loop,
    config_of,
    sgd,
)
from tests.support.models import gpt2


def no_watch(bench: Bench) -> None:
    bench.attach()
    bench.prepare()
    bench.model(input_ids=bench.X).logits.sum().backward()
    bench.manager.prepare_gradients()


def watch_another(bench: Bench) -> None:
    bench.attach()
    bench.prepare()
    bench.manager.watch(bench.forward() / 2)


def no_backward(bench: Bench) -> None:
    bench.attach()
    bench.prepare()
    bench.forward()
    bench.manager.prepare_gradients()


def in_order(*calls: Any) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        for call in calls:
            name, *args = call if isinstance(call, tuple) else (call,)
            getattr(bench if hasattr(bench, name) else bench.manager, name)(*args)

    return do


def without_places(bench: Bench) -> None:
    bench.manager.attach_train_batch(bench.X, bench.Y, 0)


MISUSE: dict[str, tuple[Callable[[Bench], None], str]] = {
    "no batch_idx": (without_places, "needs `batch_idx`"),
    "a counter": (in_order(("attach", 0, 7)), "place of each of the 4 samples.*shape"),
    "a counter in a tensor": (in_order(("attach", 0, torch.tensor(7))), "place of each"),
    "too few": (in_order(("attach", 0, [0, 1, 2])), "place of each of the 4"),
    "floats": (in_order(("attach", 0, torch.rand(4))), "float32"),
    "booleans": (in_order(("attach", 0, torch.ones(4, dtype=torch.bool))), "bool"),
    "ids": (in_order(("attach", 0, ["a", "b", "c", "d"])), "place of each"),
    "out of range": (in_order(("attach", 0, [0, 1, 2, 14])), "places 0 to 14; there are 14 samples"),
    "negative": (in_order(("attach", 0, [0, 1, 2, -1])), "places -1 to 2"),
    "prepare first": (in_order("prepare"), "attach_train_batch"),
    "gradients first": (in_order("prepare_gradients"), "attach_train_batch"),
    "log first": (in_order("aggregate_and_log"), "no scored batch"),
    "log too early": (in_order("attach", "prepare", "forward", "aggregate_and_log"), "no scored batch"),
    "no prepare": (in_order("attach", "forward", "prepare_gradients"), "prepare_forward_input"),
    "attach twice": (in_order("attach", "attach"), "still open"),
    "prepare twice": (in_order("attach", "prepare", "prepare"), "already"),
    "gradients twice": (in_order("score", "prepare_gradients"), "no batch is open"),
    "log twice": (in_order("whole", "aggregate_and_log"), "no scored batch"),
    "log forgotten": (in_order("score", ("attach", 1)), "step 0 is open.*aggregate_and_log"),
    "too many micro-batches": (in_order("score", "score", "attach"), "2 micro-batches already"),
    "starts late": (in_order(("attach", 5)), "step 5 comes, but step 0 is next.*load_state_dict"),
    "jumps": (in_order("whole", ("attach", 2)), "step 2 comes, but step 1 is next"),
    "goes back": (in_order("whole", ("attach", 0)), "step 0 comes, but step 1 is next"),
    "negative step": (in_order(("attach", -1)), "step -1 comes"),
    "no number": (in_order(("attach", 0.5)), "`iteration` is the number"),
    "no loss": (no_watch, "manager.watch"),
    "another loss": (watch_another, "watched already"),
    "watch without a batch": (in_order(("watch", torch.zeros(()))), "attach_train_batch"),
    "watch before prepare": (in_order("attach", ("watch", torch.zeros(()))), "prepare_forward_input"),
    "save too early": (in_order("whole", ("save_metrics", 1)), "step 1 is not finished"),
    "evaluation too early": (in_order("attach", "prepare", "forward", "detach_for_evaluation"), "a batch is open"),
    "state too early": (in_order("score", "state_dict"), "step 0 is open"),
    "load too late": (in_order("whole", ("load_state_dict", {"step": 1, "pending": {}})), "before the first batch"),
    "load something": (in_order(("load_state_dict", {"step": 1})), "has step and pending"),
    "detached": (in_order("detach_for_evaluation", "attach", "prepare"), "reattach_after_evaluation"),
    "closed": (in_order("cleanup", "attach"), "was closed"),
    "closed, attached again": (in_order("cleanup", "reattach_after_evaluation"), "was closed"),
}


@pytest.mark.thin(5)
@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_an_error_that_says_what_to_do(case: str, bench: Bench) -> None:
    do, message = MISUSE[case]
    with pytest.raises(UsageError, match=message):
        do(bench)


def test_a_backward_that_did_not_come(bench: Bench) -> None:
    with pytest.raises(CaptureError, match="backward"):
        no_backward(bench)


def test_a_batch_that_is_larger_than_the_configuration_says(bench: Bench) -> None:
    with pytest.raises(UsageError, match="5 samples; the configuration says `batch_size=4`"):
        bench.manager.attach_train_batch(*batch_of([0, 1, 2, 3, 4])[:2], 0, torch.arange(5))


def test_a_forward_of_another_batch(bench: Bench) -> None:
    bench.attach()
    with pytest.raises(UsageError, match="4 samples, this one 2"):
        bench.manager.prepare_forward_input(bench.X[:2], bench.Y[:2])


def test_more_steps_than_the_configuration_says(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    with GhostEngineManager(config_of(tmp_path / "store", 2), model, optimizer, val_data=VAL_BATCH) as manager:
        loop = Loop(plan(3), manager)
        with pytest.raises(UsageError, match="max_steps=2"):
            loop.run(model, optimizer)
    assert run_of(tmp_path / "store").complete


def test_calls_that_may_come_again(bench: Bench) -> None:
    bench.whole()
    for _ in range(2):
        bench.manager.clear_gradients()
        bench.manager.save_metrics(0)
    bench.manager.cleanup()
    bench.manager.cleanup()


def test_a_model_that_is_refused_is_left_alone_and_so_is_the_run(tmp_path: Path) -> None:
    model = gpt2()
    model.extra = nn.ParameterList([nn.Parameter(torch.ones(2))])
    with pytest.raises(UsageError, match="extra"):
        GhostEngineManager(config_of(tmp_path / "store"), model, sgd(model), val_data=VAL_BATCH)
    assert not (tmp_path / "store").exists()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_second_manager_on_the_run_waits_for_the_first(bench: Bench, tmp_path: Path) -> None:
    model = gpt2()
    config = config_of(tmp_path / "store", gradient_accumulation_steps=2)
    with pytest.raises(BusyError, match="run"):
        GhostEngineManager(config, model, sgd(model), val_data=VAL_BATCH)
    assert not any(module._forward_hooks for module in model.modules())
    bench.manager.cleanup()
    GhostEngineManager(config, model, sgd(model), val_data=VAL_BATCH).cleanup()


OTHERS: dict[str, dict[str, Any]] = {
    "steps": {"steps": 9},
    "batch": {"batch_size": 3},
    "interval": {"dot_prod_save_interval": 2},
    "samples": {"samples": 15},
    "ids": {"samples": [f"x{i}" for i in range(14)]},
    "refresh": {"val_refresh_interval": 2},
    "layers": {"per_layer": True},
    "excluded": {"exclude_layers": "h.0"},
    "method": {"method": "GradProjLora"},
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_with_other_settings(case: str, bench: Bench, tmp_path: Path) -> None:
    bench.manager.cleanup()
    model = gpt2()
    settings = {"gradient_accumulation_steps": 2, **OTHERS[case]}
    with pytest.raises(MismatchError, match="stored"):
        GhostEngineManager(config_of(tmp_path / "store", **settings), model, sgd(model), val_data=VAL_BATCH)


@pytest.mark.parametrize(
    ("field", "stored", "asked"),
    [("activation_function", "gelu_new", "relu"), ("layer_norm_epsilon", 1e-05, 0.1), ("resid_pdrop", 0.1, 0.2)],
)
def test_a_run_with_another_model_of_the_same_weights(
    field: str, stored: Any, asked: Any, bench: Bench, tmp_path: Path
) -> None:
    bench.manager.cleanup()
    model = gpt2(**{field: asked})
    with pytest.raises(MismatchError, match=rf"model\.config\.{field}: stored {stored!r}, asked for {asked!r}"):
        GhostEngineManager(
            config_of(tmp_path / "store", gradient_accumulation_steps=2), model, sgd(model), val_data=VAL_BATCH
        )


def test_a_run_with_another_val_set_or_frozen_layers(bench: Bench, tmp_path: Path) -> None:
    bench.manager.cleanup()
    config = config_of(tmp_path / "store", gradient_accumulation_steps=2)
    other = {**VAL_BATCH, "labels": VAL_BATCH["labels"].clone()}
    other["labels"][0, 7] = 3
    with pytest.raises(MismatchError, match=r"val\.fingerprint"):
        GhostEngineManager(config, gpt2(), sgd(gpt2()), val_data=other)
    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    with pytest.raises(MismatchError, match=r"model\.trainable"):
        GhostEngineManager(config, model, sgd(model), val_data=VAL_BATCH)
