"""Scores and weights of loops as users write them, against batch-of-one autograd and plain training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststore import GhostEngineManager, GradProjLoraEngine
from indexer.encode.losses import next_token_losses
from tests.support.loops import (
    ROWS,
    VAL_BATCH,
    batch_of,
    close_to,
    identical,
    plan,
    roughly,
    run_of,
    steps_of,
    weights_of,
)
from tests.support.managed_loops import (
    METHODS,
    SETTINGS,
    VAL_FORMS,
    Loop,
    check_scores,
    config_of,
    oracle,
    plain,
    sgd,
    train,
)
from tests.support.models import gpt2
from tests.support.scoring import agree


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


@pytest.mark.thin(2)
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


@pytest.mark.thin(1)
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


@pytest.mark.thin(1)
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
