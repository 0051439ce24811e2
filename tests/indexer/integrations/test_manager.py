"""GhostEngineManager: every method, in loops as users write them, against batch-of-one autograd and plain training."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore import GhostConfig, GhostEngineManager, GradProjLoraEngine
from ghoststore.errors import BusyError, CaptureError, MismatchError, UsageError, WorkerError
from indexer.encode.losses import next_token_losses
from indexer.integrations.model_loss import own_loss
from tests.support.loops import (
    ROWS,
    VAL,
    VAL_BATCH,
    Plan,
    arrays_of,
    batch_of,
    close_to,
    exact_scores,
    identical,
    in_ranks,
    plan,
    roughly,
    run_of,
    same_arrays,
    steps_of,
    weights_of,
)
from tests.support.models import gpt2, perceptron
from tests.support.scoring import agree, exact_of, val_batch

METHODS = ("GradDotProd", "GradProjLora", "Regular")


def config_of(store: Path | None, steps: int = 7, **settings: Any) -> GhostConfig:
    given = {"max_steps": steps, "batch_size": 4, "samples": len(ROWS), "dot_prod_save_interval": 3, **settings}
    return GhostConfig(store=store, **given)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@dataclass
class Loop:
    """A training loop with the manager's calls, or without any."""

    steps: Plan
    manager: GhostEngineManager | None = None
    clip: float | None = None
    autocast: torch.dtype | None = None
    scaler: Any = None
    seen: Callable[[Any, int], None] = lambda model, step: None

    def run(self, model: Any, optimizer: torch.optim.Optimizer, first: int = 0, last: int | None = None) -> None:
        for iteration in range(first, len(self.steps) if last is None else last):
            self.seen(model, iteration)
            self.step(model, optimizer, iteration)

    def step(self, model: Any, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        manager, micro_batches = self.manager, self.steps[iteration]
        for places in micro_batches:
            X, Y, batch_idx = batch_of(places)
            with torch.autocast("cpu", dtype=self.autocast) if self.autocast else nullcontext():
                if manager:
                    manager.attach_train_batch(X, Y, iteration, batch_idx)
                    X, Y = manager.prepare_forward_input(X, Y)
                loss = model(input_ids=X, labels=Y).loss
            loss = loss / len(micro_batches)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if manager:
                manager.prepare_gradients()
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        if manager:
            manager.aggregate_and_log()
            manager.clear_gradients()
        optimizer.zero_grad(set_to_none=True)


def oracle(steps: Plan) -> tuple[dict[int, Tensor], Callable[[Any, int], None]]:
    """Exact scores by step, and what a loop calls before each step to fill them in."""
    found: dict[int, Tensor] = {}

    def seen(model: Any, step: int) -> None:
        found[step] = exact_scores(model, [place for places in steps[step] for place in places])

    return found, seen


def train(
    steps: Plan, config: Any, *, val: Any = VAL_BATCH, fresh: Callable[[], Any] = gpt2, **settings: Any
) -> tuple[Any, dict[int, Tensor]]:
    """A whole training with the manager; the model and the exact scores."""
    model = fresh()
    optimizer = sgd(model)
    expected, seen = oracle(steps)
    scaler = settings.get("scaler")
    with GhostEngineManager(config, model, optimizer, val_data=val, scaler=scaler) as manager:
        Loop(steps, manager, seen=seen, **settings).run(model, optimizer)
    return model, expected


def plain(steps: Plan, *, fresh: Callable[[], Any] = gpt2, **settings: Any) -> Any:
    model = fresh()
    Loop(steps, **settings).run(model, sgd(model))
    return model


def check_scores(store: Path, steps: Plan, expected: dict[int, Tensor], tolerance: float = 1e-5) -> None:
    found = list(steps_of(run_of(store)))
    assert [step for step, _, _ in found] == list(range(len(steps)))
    for step, places, scores in found:
        assert places.tolist() == [place for micro in steps[step] for place in micro]
        close_to(scores, expected[step], tolerance)


# The loop, and what it leaves in the store.


def test_the_reference_loop(tmp_path: Path) -> None:
    steps = plan(7)
    model = gpt2()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=7)
    expected, seen = oracle(steps)
    ids = [f"row-{i}" for i in range(len(ROWS))]
    domains = [None if i == 3 else ("sky", "earth")[i % 2] for i in range(len(ROWS))]
    config = config_of(tmp_path / "store", samples=ids, domains=domains, name="mine")
    X_val, Y_val = VAL_BATCH["input_ids"], VAL_BATCH["labels"]
    rates, losses, tokens = [], [], []

    manager = GhostEngineManager(config=config, model=model, optimizer=optimizer, val_data=(X_val, Y_val))
    for iteration in range(7):
        X_train, Y_train, batch_idx = batch_of(steps[iteration][0])
        seen(model, iteration)
        rates.append(optimizer.param_groups[0]["lr"])
        manager.attach_train_batch(X_train, Y_train, iteration, batch_idx)
        X_forward, Y_forward = manager.prepare_forward_input(X_train, Y_train)
        outputs = model(input_ids=X_forward, labels=Y_forward)
        loss = outputs.loss
        losses.append(loss.item())
        tokens.append(X_train.numel())
        loss.backward()
        manager.prepare_gradients()
        optimizer.step()
        manager.aggregate_and_log()
        manager.clear_gradients()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if manager.should_save_metrics(iteration):
            manager.save_metrics(iteration)
    manager.cleanup()

    run = run_of(tmp_path / "store", "mine")
    assert run.complete
    for step, places, scores in steps_of(run):
        assert places.tolist() == steps[step][0]
        close_to(scores, expected[step])
        assert run.rows.read_rows("sample_id", places).tolist() == [ids[place] for place in places]
        index = run.rows.read_rows("domain", places)
        assert [None if i < 0 else run.domains[i] for i in index] == [domains[place] for place in places]
    assert sorted({len(micro) for step in steps for micro in step}) == [2, 4]
    np.testing.assert_array_equal(run.read_committed("learning_rate"), rates)
    np.testing.assert_allclose(run.read_committed("train_loss"), losses, rtol=1e-6)
    np.testing.assert_array_equal(run.read_committed("tokens"), tokens)
    seconds, scoring = run.read_committed("seconds"), run.read_committed("score_seconds")
    assert (scoring > 0).all()
    assert (seconds > scoring).all()
    assert run.manifest["scoring"]["method"] == "GradDotProd"


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulation": 4, "batch": 2},
    "clipping": {"clip": 0.1},
    "autocast": {"autocast": torch.bfloat16},
    "scaler": {"scaled": True, "accumulation": 2},
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_a_loop_without_it(method: str, setting: str, tmp_path: Path) -> None:
    settings = dict(SETTINGS[setting])
    accumulation, batch = settings.pop("accumulation", 1), settings.pop("batch", 4)
    scaled = settings.pop("scaled", False)
    steps = plan(6, batch, accumulation)

    def dropout() -> Any:
        torch.manual_seed(3)
        return gpt2().train()  # dropout of 0.1: the random state must stay in step, too

    def scaler() -> dict[str, Any]:
        return {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=2)} if scaled else {}

    expected = plain(steps, fresh=dropout, **settings, **scaler())
    config = config_of(tmp_path / "store", 6, method=method, gradient_accumulation_steps=accumulation)
    model = dropout()
    optimizer = sgd(model)
    given = scaler()
    val = None if method == "GradProjLora" and setting == "plain" else VAL_BATCH
    with GhostEngineManager(config, model, optimizer, val_data=val, **given) as manager:
        assert manager.is_active() == (method != "Regular")
        assert manager.get_method() == method
        Loop(steps, manager, **settings, **given).run(model, optimizer)
    assert identical(weights_of(model), weights_of(expected))
    assert model.training
    assert (tmp_path / "store").exists() == (method != "Regular")
    if method != "Regular":
        assert run_of(tmp_path / "store").complete


@pytest.mark.parametrize(("setting", "tolerance"), [("accumulation", 1e-5), ("autocast", 0.05), ("scaler", 1e-5)])
def test_scores_are_those_of_batch_of_one_autograd(setting: str, tolerance: float, tmp_path: Path) -> None:
    settings = dict(SETTINGS[setting])
    accumulation, batch = settings.pop("accumulation", 1), settings.pop("batch", 4)
    if settings.pop("scaled", False):
        settings["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    steps = plan(5, batch, accumulation)
    config = config_of(tmp_path / "store", 5, gradient_accumulation_steps=accumulation, batch_size=batch)
    _, expected = train(steps, config, **settings)
    if setting == "autocast":
        for step, _, scores in steps_of(run_of(tmp_path / "store")):
            roughly(scores, expected[step], tolerance)
    else:
        check_scores(tmp_path / "store", steps, expected, tolerance)


def test_float16_with_a_loss_scaler(tmp_path: Path) -> None:
    steps = plan(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, expected = train(steps, config_of(tmp_path / "store", 3), autocast=torch.float16, scaler=scaler)
    for step, _, scores in steps_of(run_of(tmp_path / "store")):
        roughly(scores, expected[step], 0.02)


def test_train_loss_of_uneven_micro_batches_is_the_mean_over_targets(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    micro_batches = [[0], [1, 4, 7, 13]]  # 24 tokens, and four short rows
    total, losses = 0, 0.0
    with GhostEngineManager(
        config_of(tmp_path / "store", 1, gradient_accumulation_steps=2), model, optimizer, VAL_BATCH
    ) as manager:
        for places in micro_batches:
            X, Y, batch_idx = batch_of(places)
            manager.attach_train_batch(X, Y, 0, batch_idx)
            manager.prepare_forward_input(X, Y)
            items = int((Y[:, 1:] != -100).sum())
            loss = model(input_ids=X, labels=Y).loss
            loss.backward()
            manager.prepare_gradients()
            total, losses = total + items, losses + loss.item() * items
        optimizer.step()
        manager.aggregate_and_log()
    assert run_of(tmp_path / "store").read_committed("train_loss")[0] == pytest.approx(losses / total, rel=1e-6)


VAL_FORMS: dict[str, Any] = {
    "tuple": (VAL_BATCH["input_ids"], VAL_BATCH["labels"], VAL_BATCH["attention_mask"]),
    "dict": VAL_BATCH,
    "batches": [val_batch(VAL[:1]), val_batch(VAL[1:])],
}


@pytest.mark.parametrize("form", VAL_FORMS)
def test_forms_of_val_data(form: str, tmp_path: Path) -> None:
    steps = plan(2)
    _, expected = train(steps, config_of(tmp_path / "store", 2), val=VAL_FORMS[form])
    check_scores(tmp_path / "store", steps, expected)


def test_batches_that_are_mappings(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    exact = exact_scores(model, [0, 1, 2])
    X, Y, batch_idx = batch_of([0, 1, 2])
    mask = torch.arange(X.shape[1]) < torch.tensor([[24], [3], [11]])
    batch = {"input_ids": X, "attention_mask": mask.long(), "labels": Y}
    with GhostEngineManager(config_of(tmp_path / "store", 1), model, optimizer, val_data=VAL_BATCH) as manager:
        manager.attach_train_batch(batch, None, 0, batch_idx)
        forward, _ = manager.prepare_forward_input(batch, None)
        assert forward is batch
        model(**forward).loss.backward()  # the mean over targets, of which each row has another number
        manager.prepare_gradients()
        optimizer.step()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact)
    assert run_of(tmp_path / "store").read_committed("tokens").tolist() == [24 + 3 + 11]


# Models of any kind.


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randint(5, (count,), generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_perceptron_with_losses_of_its_own(weighted: bool, tmp_path: Path) -> None:
    x, y = classes(12, 0)
    val = classes(4, 1)
    model = perceptron()
    optimizer = sgd(model)
    config = config_of(tmp_path / "store", 3, samples=12, per_layer=True)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5]) if weighted else None
    expected, blocks, losses = [], [], []
    with GhostEngineManager(config, model, optimizer, val_data=val, val_losses=class_losses) as manager:
        for step in range(3):
            places = torch.arange(4 * step, 4 * step + 4)
            twin = perceptron()
            twin.load_state_dict(model.state_dict())
            exact = exact_of(
                twin,
                4,
                lambda m, i, p=places: class_losses(m, (x[p[i : i + 1]], y[p[i : i + 1]])).sum(),
                4,
                lambda m, i: class_losses(m, (val[0][i : i + 1], val[1][i : i + 1])).sum(),
            )
            expected.append(exact.total().mean(1))
            blocks.append(exact.only(lambda name: name.startswith("2.")).total().mean(1))
            X, Y = x[places], y[places]
            manager.attach_train_batch(X, Y, step, places)
            X, Y = manager.prepare_forward_input(X, Y)
            each = class_losses(model, (X, Y))
            loss = each.mean() if weights is None else each @ weights
            manager.watch(loss, weights=weights)
            losses.append(loss.item() / (1.0 if weights is None else float(weights.sum())))
            loss.backward()
            manager.prepare_gradients()
            optimizer.step()
            manager.aggregate_and_log()
            optimizer.zero_grad()
            assert set(manager.last_scores[0].parameters) == {name for name, _ in model.named_parameters()}
    run = run_of(tmp_path / "store")
    for step, _, scores in steps_of(run):
        close_to(scores, expected[step])
    of_block = run.read_committed("block_score")[:, 0, :, run.layout.blocks.index("2")]
    np.testing.assert_allclose(of_block, torch.stack(blocks).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(run.read_committed("train_loss"), losses, rtol=1e-6)


def test_a_loss_of_ones_own_for_a_language_model(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    exact = exact_scores(model, [0, 1, 2, 3])
    with GhostEngineManager(config_of(None), model, optimizer, val_data=VAL_BATCH) as manager:
        X, Y, batch_idx = batch_of([0, 1, 2, 3])
        manager.attach_train_batch(X, Y, 0, batch_idx)
        X, Y = manager.prepare_forward_input(X, Y)
        logits = model(input_ids=X).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), Y[:, 1:], ignore_index=-100)
        manager.watch(loss, labels=Y)
        loss.backward()
        manager.prepare_gradients()
        optimizer.step()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact)


# The configuration.


class PlainConfig:
    """As scripts write them: attributes of the class, and things that are not ours."""

    method = "GradDotProd"
    dot_prod_save_interval = 3
    batch_size = 4
    max_steps = 3
    samples = len(ROWS)
    learning_rate = 0.1

    def __init__(self, store: Path) -> None:
        self.store = store


def forms(store: Path) -> dict[str, Any]:
    given = {"method": "GradDotProd", "store": store, "max_steps": 3, "batch_size": 4, "samples": len(ROWS)}
    given |= {"dot_prod_save_interval": 3}
    return {
        "config": GhostConfig(**given),
        "dict": {**given, "learning_rate": 0.1},
        "namespace": argparse.Namespace(**given, learning_rate=0.1),
        "object": PlainConfig(store),
        "simple": SimpleNamespace(**given),
    }


@pytest.mark.parametrize("form", ["config", "dict", "namespace", "object", "simple"])
def test_forms_of_the_configuration(form: str, tmp_path: Path) -> None:
    steps = plan(3)
    config = forms(tmp_path / "store")[form]
    assert GhostConfig.of(config) == forms(tmp_path / "store")["config"]
    _, expected = train(steps, config)
    check_scores(tmp_path / "store", steps, expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "GradDot"}, "GradDot.*known"),
    "no steps": ({"store": "s", "batch_size": 4, "samples": 3}, "needs max_steps"),
    "nothing": ({"store": "s"}, "needs max_steps, batch_size, samples"),
    "interval": ({"dot_prod_save_interval": 0}, "dot_prod_save_interval.*at least 1"),
    "float": ({"dot_prod_save_interval": 2.5}, "whole number"),
    "none": ({"val_refresh_interval": None}, "val_refresh_interval.*None"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    "batch": ({"batch_size": 0}, "batch_size"),
    "store error": ({"on_store_error": "ignore"}, "on_store_error 'ignore'"),
    "domains": ({"domains": ["a"]}, "give samples"),
    "projection unused": ({"proj_rank_total": 16}, "proj_rank_total=16 belongs to method GradProjLora"),
    "embeddings unused": ({"include_embeddings": True}, "include_embeddings"),
    "kind": ({"method": "GradProjLora", "proj_kind": "uniform"}, "'uniform' is unknown"),
    "two kinds": ({"method": "GradProjLora", "proj_kind": "rademacher", "proj_row_orthonormal": True}, "contradicts"),
    "a rank": ({"method": "GradProjLora", "proj_rank_total": -1}, "at least 1"),
    "misspelt": ({"dot_prod_interval": 3, "method": "GradDotProd"}, "'dot_prod_interval'.*not known"),
    "of nothing": ({"learning_rate": 0.1}, "none of the fields"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_cannot_be(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        GhostConfig.of(given)
    with pytest.raises(UsageError, match=message):
        GhostConfig.of(SimpleNamespace(**given))


def test_regular_does_nothing_at_all(tmp_path: Path) -> None:
    model = gpt2()
    manager = GhostEngineManager({"method": "Regular", "store": tmp_path / "store"}, model, sgd(model))
    assert manager.state_dict() == {}
    manager.load_state_dict({"step": 3, "pending": {}})
    assert manager.prepare_forward_input("x", "y") == ("x", "y")
    manager.detach_for_evaluation()
    manager.reattach_after_evaluation()
    assert not manager.should_save_metrics(9)
    manager.cleanup()
    assert not (tmp_path / "store").exists()
    assert not any(module._forward_hooks for module in model.modules())


# Evaluation between steps.


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


# Nothing is dropped.


@pytest.mark.thin
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


# Projected gradients.


@pytest.mark.thin
@pytest.mark.parametrize("with_val", [False, True])
@pytest.mark.parametrize("rank_total", [None, 16])
def test_projected_gradients(rank_total: int | None, with_val: bool, tmp_path: Path) -> None:
    steps = plan(3)
    model = gpt2()
    optimizer = sgd(model)
    config = config_of(
        tmp_path / "store",
        3,
        method="GradProjLora",
        proj_rank_total=rank_total,
        proj_seed=4,
        proj_layers="mlp",
        per_layer=with_val and rank_total is not None,
        proj_row_orthonormal=True,
        exclude_layers="h.0",
    )
    naive = []
    val = VAL_BATCH if with_val else None

    def seen(model: Any, step: int) -> None:
        twin = gpt2()
        twin.load_state_dict(model.state_dict())
        engine = GradProjLoraEngine(twin, config.projection())
        with engine:
            for (X, Y, _), into in ((batch_of(steps[step][0]), naive), ((*VAL_FORMS["tuple"][:2], None), naive)):
                engine.prepare(len(X))
                into.append(engine.collect(next_token_losses(twin(input_ids=X).logits, Y)[0]))

    with GhostEngineManager(config, model, optimizer, val_data=val) as manager:
        Loop(steps, manager, seen=seen).run(model, optimizer)
    run = run_of(tmp_path / "store")
    vectors, scores = run.read_committed("vector")[:, 0], run.read_committed("score")[:, 0]
    for step in range(3):
        count = len(steps[step][0])
        expected, expected_val = naive[2 * step], naive[2 * step + 1]
        error = (torch.from_numpy(vectors[step, :count]) - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(error.max()) < 1e-5
        if with_val:
            close_to(scores[step, :count], expected.double() @ expected_val.double().mean(0), 2e-5)
        else:
            assert np.isnan(scores[step]).all()
    if with_val and rank_total is not None:
        np.testing.assert_allclose(run.read_committed("block_score")[:, 0].sum(-1), scores, rtol=1e-4, atol=1e-5)
    assert run.manifest["scoring"]["method"] == "GradProjLora"


def test_scores_by_layer_need_layers_and_val_data(tmp_path: Path) -> None:
    model = gpt2()
    for settings, val in (({}, VAL_BATCH), ({"proj_rank_total": 16}, None)):
        config = config_of(tmp_path / "store", method="GradProjLora", per_layer=True, **settings)
        with pytest.raises(UsageError, match="per_layer"):
            GhostEngineManager(config, model, sgd(model), val_data=val)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["GradDotProd", "GradProjLora"])
def test_scores_do_not_depend_on_the_batch_size(method: str) -> None:
    found = []
    for size in (1, 3, 14):
        model = gpt2()
        scores, vectors = [], []
        manager = GhostEngineManager({"method": method}, model, sgd(model), val_data=VAL_BATCH)
        for step, start in enumerate(range(0, 14, size)):
            X, Y, _ = batch_of(range(14)[start : start + size])
            manager.attach_train_batch(X, Y, step)
            manager.prepare_forward_input(X, Y)
            model(input_ids=X, labels=Y).loss.backward()
            manager.prepare_gradients()
            manager.aggregate_and_log()
            scores.append(manager.last_scores[0].total)
            if manager.last_scores[0].vectors is not None:
                vectors.append(manager.last_scores[0].vectors.double())
        manager.cleanup()
        found.append((torch.cat(scores), torch.cat(vectors) if vectors else torch.zeros(1, 1)))
    for scores, vectors in found[1:]:
        agree(scores, found[0][0])
        torch.testing.assert_close(vectors, found[0][1], rtol=1e-3, atol=1e-4)


# Misuse.


class Bench:
    """A manager half way: what a test does to it must be an error that says what to do."""

    def __init__(self, store: Path) -> None:
        self.model = gpt2()
        self.optimizer = sgd(self.model)
        self.manager = GhostEngineManager(
            config_of(store, gradient_accumulation_steps=2), self.model, self.optimizer, val_data=VAL_BATCH
        )
        self.X, self.Y, self.batch_idx = batch_of([0, 1, 2, 3])

    def attach(self, step: int = 0, places: Any = None) -> None:
        self.manager.attach_train_batch(self.X, self.Y, step, self.batch_idx if places is None else places)

    def prepare(self) -> None:
        self.manager.prepare_forward_input(self.X, self.Y)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.X, labels=self.Y).loss

    def score(self, step: int = 0) -> None:
        self.attach(step)
        self.prepare()
        self.forward().backward()
        self.manager.prepare_gradients()

    def whole(self, step: int = 0) -> None:
        self.score(step)
        self.optimizer.step()
        self.manager.aggregate_and_log()
        self.optimizer.zero_grad()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path / "store")
    yield found
    found.manager.cleanup()


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


def twice(call: str, before: str) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        getattr(bench, before)()
        target = bench if hasattr(bench, call) else bench.manager
        getattr(target, call)()
        getattr(target, call)()

    return do


def in_order(*calls: Any) -> Callable[[Bench], None]:
    def do(bench: Bench) -> None:
        for call in calls:
            name, *args = call if isinstance(call, tuple) else (call,)
            getattr(bench if hasattr(bench, name) else bench.manager, name)(*args)

    return do


def without_places(bench: Bench) -> None:
    bench.manager.attach_train_batch(bench.X, bench.Y, 0)


MISUSE: dict[str, tuple[Callable[[Bench], None], str]] = {
    "no batch_idx": (without_places, "needs batch_idx"),
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
    "no number": (in_order(("attach", 0.5)), "iteration is the number"),
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
    with pytest.raises(UsageError, match="5 samples; the configuration says batch_size=4"):
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


def test_val_data_and_its_settings() -> None:
    model = gpt2()
    for config, message in (
        ({"method": "GradDotProd"}, "give val_data"),
        ({"method": "GradProjLora", "val_refresh_interval": 2}, "give val_data"),
    ):
        with pytest.raises(UsageError, match=message):
            GhostEngineManager(config, model, sgd(model))
    with pytest.raises(UsageError, match="give val_data"):
        GhostEngineManager({"method": "GradProjLora"}, model, sgd(model), val_losses=class_losses)


class Scaled(nn.Module):
    """A model whose loss is not what its labels say."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = gpt2()
        self.change = change

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        output = self.inner(input_ids=input_ids, labels=labels)
        if labels is not None:
            output["loss"] = self.change(output["loss"])
        return output


@pytest.mark.parametrize("change", [lambda loss: loss * 1.5, lambda loss: loss + 0.3], ids=["scaled", "regularised"])
def test_a_loss_that_is_not_the_mean_over_targets_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = Scaled(change)
    X, Y, _ = batch_of([0, 1])

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return next_token_losses(model(batch[0]).logits, batch[1])[0]

    manager = GhostEngineManager({"method": "GradDotProd"}, model, sgd(model), VAL_FORMS["tuple"], val_losses=losses)
    manager.attach_train_batch(X, Y, 0)
    manager.prepare_forward_input(X, Y)
    with pytest.raises(UsageError, match="not the mean next-token loss"):
        model(input_ids=X, labels=Y)
    manager.cleanup()


def test_what_a_model_s_own_loss_is_of() -> None:
    model = gpt2()
    X, Y, _ = batch_of([0, 1])
    items = model(input_ids=X, labels=Y, num_items_in_batch=torch.tensor(77))
    own = own_loss(items.loss, Y, torch.tensor(77))
    assert own.divisor == 77
    assert float(own.weights.sum()) == pytest.approx(int((Y[:, 1:] != -100).sum()) / 77)


# Errors in the middle.


@pytest.mark.thin
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


def test_a_model_that_is_refused_is_left_alone_and_so_is_the_run(tmp_path: Path) -> None:
    model = gpt2()
    model.extra = nn.Conv1d(2, 2, 1)
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


# Resuming.


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


@pytest.mark.thin(3)
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


# A store that cannot be written.


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


# Ranks.


@pytest.mark.parametrize("info", [{"rank": 0, "world_size": 1}, {"ddp_rank": 0, "ddp_world_size": 1}, {"ddp": False}])
def test_forms_of_ddp_info(info: dict[str, Any]) -> None:
    model = gpt2()
    with GhostEngineManager({"method": "GradDotProd"}, model, sgd(model), VAL_BATCH, ddp_info=info) as manager:
        assert manager.ranks.leads


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "needs rank and world_size"),
        ({"rank": 0}, "needs rank and world_size.*'rank'"),
        ({"rank": 1, "world_size": 2}, "rank 1 of 2; torch.distributed says rank 0 of 1"),
    ],
)
def test_ddp_info_that_cannot_be(info: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GhostEngineManager({"method": "GradDotProd"}, gpt2(), sgd(gpt2()), VAL_BATCH, ddp_info=info)


@pytest.mark.ddp
def test_two_processes_and_a_model_in_ddp(tmp_path: Path) -> None:
    steps = plan(8, 3)
    config = config_of(tmp_path / "store", 4, batch_size=3)
    states = tmp_path / "states"

    def rank_loop(rank: int, first: int, last: int, *, scored: bool, resume: bool = False) -> dict[str, Tensor]:
        inner = gpt2()
        if resume:
            inner.load_state_dict(torch.load(f"{states}-model"))
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        mine = [steps[2 * step + rank] for step in range(4)]
        if not scored:
            Loop(mine).run(model, optimizer, first, last)
            return weights_of(inner)
        info = {"rank": rank, "world_size": 2}
        manager = GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH, ddp_info=info)
        if resume:
            manager.load_state_dict(torch.load(f"{states}-ghosts"))
        Loop(mine, manager).run(model, optimizer, first, last)
        if last == 2:
            found = manager.state_dict()
            if rank == 0:
                torch.save(found, f"{states}-ghosts")
                torch.save(inner.state_dict(), f"{states}-model")
        manager.cleanup()
        return weights_of(inner)

    def work(rank: int) -> None:
        rank_loop(rank, 0, 2, scored=True)
        torch.distributed.barrier()
        found = rank_loop(rank, 2, 4, scored=True, resume=True)
        assert identical(found, rank_loop(rank, 0, 4, scored=False))
        # What the first rank cannot do is an error on both.
        other = replace(config, val_refresh_interval=2)
        with pytest.raises(MismatchError if rank == 0 else WorkerError):
            GhostEngineManager(other, gpt2(), sgd(gpt2()), val_data=VAL_BATCH)
        # Data in another order: both hear of it.
        model = gpt2()
        optimizer = sgd(model)
        with (
            pytest.raises(MismatchError, match="has step 0 already"),
            GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager,
        ):
            Loop([steps[2 * step + 1 - rank] for step in range(4)], manager).run(model, optimizer)

    in_ranks(2, work, tmp_path)
    run = run_of(tmp_path / "store")
    assert run.complete
    sample, score = run.read_committed("sample"), run.read_committed("score")
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        for rank in range(2):
            places = steps[2 * step + rank][0]
            assert sample[step, rank][: len(places)].tolist() == places
            close_to(score[step, rank][: len(places)], exact_scores(model, places))
        for rank in range(2):  # gradients of DDP are the mean over ranks
            X, Y, _ = batch_of(steps[2 * step + rank][0])
            (model(input_ids=X, labels=Y).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (run.read_committed("tokens") > 0).all()
