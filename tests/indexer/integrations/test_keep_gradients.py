"""``keep_gradients`` of the manager and of the Trainer callback: one step in so many, whatever the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ghoststore import GhostConfig, GhostEngineManager, GradDotProdEngine, ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.store.run.visits import stream_visits
from tests.support.loops import VAL_BATCH, batch_of, identical, in_ranks, plan, run_of, same_arrays, weights_of
from tests.support.managed_loops import Loop, config_of, plain, sgd, train
from tests.support.models import gpt2
from tests.support.trainers import callback_of, trainer_of

KEPT = ("gradient", "gradient_scale", "val_gradient", "val_gradient_scale", "val_step")
SETTINGS: dict[str, Any] = {"keep_gradients": 2, "proj_rank_total": 16}


def kept(store: Path, name: str = "run") -> dict[str, np.ndarray]:
    run = run_of(store, name)
    return {array: run.read_committed(array) for array in KEPT}


@pytest.mark.slow
def test_beside_exact_scores_as_beside_sketched_ones(tmp_path: Path) -> None:
    """The same vectors; of every other step; and the weights are those of a loop without a manager."""
    steps = plan(7)
    for method in ("GradDotProd", "GradProjLora"):
        model, _ = train(steps, config_of(tmp_path / method, 7, method=method, **SETTINGS))
        assert identical(weights_of(model), weights_of(plain(steps)))
    exact, sketched = (kept(tmp_path / method) for method in ("GradDotProd", "GradProjLora"))
    for array in KEPT:
        np.testing.assert_array_equal(exact[array], sketched[array], err_msg=array)
    assert exact["val_step"].tolist() == [0, 2, 4, 6]
    run = run_of(tmp_path / "GradProjLora")
    assert run.layout.dimension is None
    assert run.layout.interval == 4  # 3, rounded up
    # Scores of the sketched method are products of what is kept, up to its codes.
    for visits in stream_visits(run, run.ranges, val=True, also=("score",)):
        assert visits.val is not None
        products = (visits.vectors * visits.val[visits.of_step]).sum(1)
        assert np.abs(products - visits.data["score"]).max() < 0.02 * np.abs(visits.data["score"]).max()


def test_in_the_metric_of_adam_the_val_gradient_is_the_plain_one(tmp_path: Path) -> None:
    """Whichever way samples are scored: the vector of the val set at the same weights, without the metric."""
    steps, given = plan(3), {**SETTINGS, "keep_gradients": 1, "proj_dtype": "float32"}
    stored = {}
    for method in ("GradDotProd", "GradProjLora"):
        for metric in ("adam", "sgd"):
            torch.manual_seed(0)
            model, store = gpt2(), tmp_path / f"{method}-{metric}"
            adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
            config = config_of(store, 3, method=method, score_metric=metric, **given)
            with GhostEngineManager(config, model, adam, val_data=VAL_BATCH) as manager:
                Loop(steps, manager).run(model, adam)
            stored[method, metric] = run_of(store).read_committed("val_gradient")
    wanted = stored["GradDotProd", "sgd"]
    for name, vectors in stored.items():
        assert np.linalg.norm(vectors - wanted) < 1e-4 * np.linalg.norm(wanted), name


OUT_OF_RANGE = (0, 2, 3, 6)


@pytest.mark.thin(1)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_loss_scaler_leaves_out(fused: bool, tmp_path: Path) -> None:
    """A val gradient lives for three steps that change the weights, and the run says which weights it is of; the
    learning rate of steps that are left out is 0.
    """
    settings = {**SETTINGS, "keep_gradients": 1, "val_refresh_interval": 3, "proj_dtype": "float32"}
    config, steps, weights = config_of(tmp_path, 10, **settings), plan(10), []
    model = gpt2()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with GhostEngineManager(config, model, adam, VAL_BATCH, scaler=scaler) as manager:
        for step in range(10):
            weights.append(weights_of(model))
            handle = model.transformer.ln_f.bias.register_hook(
                lambda gradient, step=step: gradient * (torch.inf if step in OUT_OF_RANGE else 1)
            )
            Loop(steps, manager, scaler=scaler).step(model, adam, step)
            handle.remove()
    run = run_of(tmp_path)
    rates, val_steps = run.read_committed("learning_rate").tolist(), run.read_committed("val_step").tolist()
    assert rates == [0 if step in OUT_OF_RANGE else 1e-3 for step in range(10)]
    for val_step, vector in zip(val_steps, run.read_committed("val_gradient"), strict=True):
        wanted = val_vector(weights[val_step], config)
        assert np.linalg.norm(vector - wanted) < 1e-5 * np.linalg.norm(wanted)
    if not fused:  # a fused optimizer is called in any case: it ages the val gradient sooner
        assert val_steps == [0, 1, 1, 1, 1, 1, 6, 7, 7, 7]


@pytest.mark.thin(1)
@pytest.mark.parametrize("every", [4, 1])
def test_a_val_gradient_that_outlives_steps_left_out(every: int, tmp_path: Path) -> None:
    """Where every fourth step keeps its gradients: it uses the val gradient of before the third."""
    config = config_of(tmp_path, 8, **{**SETTINGS, "keep_gradients": every, "val_refresh_interval": 2})
    model = gpt2()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with GhostEngineManager(config, model, optimizer, VAL_BATCH, scaler=scaler) as manager:
        for step in range(8):
            handle = model.transformer.ln_f.bias.register_hook(
                lambda gradient, step=step: gradient * (torch.inf if step in (2, 3) else 1)
            )
            Loop(plan(8), manager, scaler=scaler).step(model, optimizer, step)
            handle.remove()
    val_steps = run_of(tmp_path).read_committed("val_step").tolist()
    assert val_steps == [0, 0, 2, 3, 4, 4, 6, 6][::every]


@pytest.mark.slow
def test_steps_that_the_scaler_of_the_trainer_leaves_out(tmp_path: Path) -> None:
    keep = ProjectionConfig(rank_total=16)
    callback = callback_of(tmp_path / "store", keep_gradients=1, keep=keep, val_refresh_interval=2)
    trainer = trainer_of(tmp_path, [callback], max_steps=6, lr_scheduler_type="constant")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # accelerate has one on CUDA alone
    trainer.model.transformer.ln_f.bias.register_hook(
        lambda gradient: gradient * (torch.inf if trainer.state.global_step in (1, 2) else 1)
    )
    trainer.train()
    run = run_of(tmp_path / "store", "trainer")
    assert run.read_committed("learning_rate").tolist() == [0.01, 0, 0, 0.01, 0.01, 0.01]
    assert run.read_committed("val_step").tolist() == [0, 0, 0, 0, 4, 4]


def val_vector(weights: dict[str, torch.Tensor], config: GhostConfig) -> np.ndarray:
    """The projected val gradient of a model with ``weights``."""
    model = gpt2()
    model.load_state_dict(weights)
    X, Y, _ = batch_of([0])
    with GradDotProdEngine(model, VAL_BATCH, keep=config.projection()) as engine:
        engine.prepare(1)
        loss = model(input_ids=X, labels=Y).loss
        engine.watch(loss, labels=Y)
        loss.backward()
        vector = engine.collect().val_vector
    assert vector is not None
    return vector.float().numpy()


@pytest.mark.slow
def test_a_resumed_loop_keeps_the_same(tmp_path: Path) -> None:
    steps, settings = plan(9), {**SETTINGS, "dot_prod_save_interval": 4, "proj_dtype": "bfloat16"}
    for store, interrupted in (("whole", False), ("store", True)):
        model = gpt2()
        optimizer = sgd(model)
        manager = GhostEngineManager(config_of(tmp_path / store, 9, **settings), model, optimizer, VAL_BATCH)
        Loop(steps, manager).run(model, optimizer, 0, 5)
        state = manager.state_dict()
        if interrupted:
            manager.cleanup()
            manager = GhostEngineManager(config_of(tmp_path / store, 9, **settings), model, optimizer, VAL_BATCH)
            manager.load_state_dict(state)
        Loop(steps, manager).run(model, optimizer, 5)
        manager.cleanup()
    same_arrays(run_of(tmp_path / "store"), run_of(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_two_ranks(dtype: str, tmp_path: Path) -> None:
    """The samples of both are there, each with the vector that it has on one rank."""
    steps = plan(8, 3)
    config = config_of(tmp_path / "store", 4, batch_size=3, proj_dtype=dtype, **SETTINGS)

    def work(rank: int) -> None:
        model = gpt2()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(model)
        with GhostEngineManager(config, wrapped, optimizer, VAL_BATCH) as manager:
            for iteration in range(4):
                X, Y, batch_idx = batch_of(steps[2 * iteration + rank][0])
                manager.attach_train_batch(X, Y, iteration, batch_idx)
                manager.prepare_forward_input(X, Y)
                wrapped(input_ids=X, labels=Y).loss.backward()
                manager.prepare_gradients()
                optimizer.step()
                manager.aggregate_and_log()
                optimizer.zero_grad(set_to_none=True)

    in_ranks(2, work, tmp_path)
    first = next(iter(stream_visits(run_of(tmp_path / "store"), [(0, 1)])))
    assert sorted(set(first.rank.tolist())) == [0, 1]
    alone = plan(1, 14)
    train(alone, config_of(tmp_path / "alone", 1, batch_size=14, proj_dtype="float32", **SETTINGS))
    whole = next(iter(stream_visits(run_of(tmp_path / "alone"), [(0, 1)])))
    of_row = dict(zip(whole.row.tolist(), whole.vectors, strict=True))
    for row, vector in zip(first.row.tolist(), first.vectors, strict=True):
        assert np.linalg.norm(vector - of_row[row]) < 0.02 * np.linalg.norm(vector)


@pytest.mark.slow
def test_the_callback(tmp_path: Path) -> None:
    """With exact scores by ``keep``, with sketched ones by ``projection``: the same vectors."""
    projection = ProjectionConfig(rank_total=16)
    for name, settings in (("exact", {"keep": projection}), ("sketched", {"projection": projection})):
        callback = callback_of(tmp_path / name, keep_gradients=2, **settings)
        trainer_of(tmp_path / f"out-{name}", [callback]).train()
    exact, sketched = (kept(tmp_path / name, "trainer") for name in ("exact", "sketched"))
    assert len(exact["gradient"]) > 1
    for array in KEPT:
        np.testing.assert_array_equal(exact[array], sketched[array], err_msg=array)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for settings, words in (
        ({"keep_gradients": 2}, "keep_gradients keeps them in a store"),
        ({"keep_gradients": 0}, "`keep_gradients` must be at least 1"),
        ({"proj_dtype": "float16"}, "`proj_dtype=float16` belongs to `keep_gradients`"),
        ({"proj_rank_total": 16}, "belongs to method GradProjLora, or to keep_gradients"),
    ):
        with pytest.raises(UsageError, match=words):
            GhostConfig(**settings)
    with pytest.raises(UsageError, match="keep says how the gradients of keep_gradients are projected"):
        callback_of(tmp_path, keep=ProjectionConfig())
