"""Loops whose samples are chosen by the manager or the callback: plain loops on those samples, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ghoststore import Choosing, GhostConfig, GhostEngineManager
from ghoststore.errors import UsageError
from tests.support.loops import VAL_BATCH, batch_of, in_ranks, plan, run_of, weights_of
from tests.support.managed_loops import config_of, sgd
from tests.support.models import gpt2, llama
from tests.support.trainers import SETTINGS, StopAt, callback_of, collate, dataset, hooks_of, trainer_of

Places = list[list[list[int]]]
"""By step and micro-batch."""


def managed(model: Any, steps: Places, manager: GhostEngineManager, optimizer: Any, **extra: Any) -> None:
    """The reference loop."""
    for iteration, micro_batches in enumerate(steps):
        for places in micro_batches:
            X, Y, batch_idx = batch_of(places)
            manager.attach_train_batch(X, Y, iteration, batch_idx)
            X_forward, Y_forward = manager.prepare_forward_input(X, Y)
            loss = model(input_ids=X_forward, labels=Y_forward, **extra).loss
            (loss / len(micro_batches)).backward()
            manager.prepare_gradients()
        optimizer.step()
        manager.aggregate_and_log()
        manager.clear_gradients()
        optimizer.zero_grad(set_to_none=True)


def plainly(model: Any, steps: Places, chosen: Places) -> dict[str, torch.Tensor]:
    """Plain steps on ``chosen``, padded as their candidates are; the model's weights afterwards."""
    optimizer = sgd(model)
    for micro_batches, taken in zip(steps, chosen, strict=True):
        for places, wanted in zip(micro_batches, taken, strict=True):
            X, Y, _ = batch_of(places)
            here = [places.index(place) for place in wanted]
            (model(input_ids=X[here], labels=Y[here]).loss / len(micro_batches)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return weights_of(model)


MODELS = {"tied": gpt2, "untied": lambda: gpt2(tied=False), "llama": llama, "dropout": lambda: gpt2(resid_pdrop=0.2)}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", MODELS)
def test_the_manager_trains_on_the_chosen(tmp_path: Path, name: str) -> None:
    steps = plan(5, accumulation=2)
    model = MODELS[name]().train()
    optimizer = sgd(model)
    config = config_of(tmp_path, steps=5, gradient_accumulation_steps=2, choosing=Choosing(keep=2))
    torch.manual_seed(3)
    weights: list[list[torch.Tensor]] = []
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        record = manager.aggregate_and_log
        manager.aggregate_and_log = lambda: (record(), weights.append(manager.last_weights))  # type: ignore[method-assign]
        managed(model, steps, manager, optimizer)
    run = run_of(tmp_path, "run")
    sample, weight, score = (run.read_committed(array)[:, 0] for array in ("sample", "weight", "score"))
    chosen: Places = []
    for step, micro_batches in enumerate(steps):
        end = 0
        chosen.append([])
        for place, places in enumerate(micro_batches):
            here = slice(end, end + len(places))  # the last batch of an epoch is smaller
            end = here.stop
            assert sample[step, here].tolist() == places
            taken = np.sort(np.argsort(-score[step, here], kind="stable")[:2])
            np.testing.assert_array_equal(np.flatnonzero(weight[step, here]), taken)
            np.testing.assert_array_equal(weights[step][place], weight[step, here])
            chosen[-1].append([places[index] for index in taken])
    fresh = MODELS[name]().train()
    torch.manual_seed(3)
    expected = plainly(fresh, steps, chosen)
    for parameter, given in weights_of(model).items():
        assert torch.equal(given, expected[parameter]), parameter
    assert run.manifest["scoring"]["choosing"]["keep"] == 2
    assert run.manifest["scoring"]["score_layers"] == "blocks"


@pytest.mark.parametrize("choosing", [Choosing(keep=2), Choosing(policy="threshold", threshold=-1e9)], ids=str)
def test_rows_without_targets_are_not_chosen(choosing: Choosing) -> None:
    """They have no loss, which is not one of 0."""
    model = gpt2()
    optimizer = sgd(model)
    with GhostEngineManager(GhostConfig(choosing=choosing), model, optimizer, val_data=VAL_BATCH) as manager:
        X, Y, _ = batch_of([0, 1, 2, 3])
        Y[[0, 3]] = -100
        manager.attach_train_batch(X, Y, 0, None)
        X_forward, Y_forward = manager.prepare_forward_input(X, Y)
        loss = model(input_ids=X_forward, labels=Y_forward).loss
        assert bool(torch.isfinite(loss))
        loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        (scores,), (weights,) = manager.last_scores, manager.last_weights
        assert torch.isnan(scores.total).tolist() == [True, False, False, True]
        assert (weights > 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize("method", ["GradDotProd", "GradProjLora"])
def test_contrast_is_over_the_micro_batch(method: str) -> None:
    """By the engine's own pairs, or the vectors; a row without a target is no part of the mean."""
    model = gpt2()
    optimizer = sgd(model)
    config = GhostConfig(method=method, choosing=Choosing(keep=2, contrast=True))
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
        X, Y, _ = batch_of([0, 1, 2, 3, 4, 5])
        Y[1] = -100
        manager.attach_train_batch(X, Y, 0, None)
        X_forward, Y_forward = manager.prepare_forward_input(X, Y)
        model(input_ids=X_forward, labels=Y_forward).loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        (scores,), (weights,) = manager.last_scores, manager.last_weights
    assert (scores.pairs is None) == (method == "GradProjLora")
    usable = torch.tensor([0, 2, 3, 4, 5])
    if scores.pairs is None:
        assert scores.vectors is not None
        vectors = scores.vectors.double()[usable]
        common = vectors @ vectors.mean(0)
    else:
        common = scores.pairs[usable][:, usable].mean(1)
    highest = usable[(scores.total[usable] - common).argsort(descending=True)[:2]]
    assert sorted(highest.tolist()) == weights.nonzero().flatten().tolist()


@pytest.mark.slow
def test_policies_in_a_loop() -> None:
    """Without a store, too: what was chosen is in last_weights, the candidates' scores in last_scores."""
    steps = plan(3)
    for choosing, check in (
        (Choosing(keep=1, policy="bottom-k"), lambda scores, weights: int(weights.argmax()) == int(scores.argmin())),
        (
            Choosing(policy="threshold", threshold=0.0),
            lambda scores, weights: bool(((scores >= 0) == (weights > 0)).all()),
        ),
        (Choosing(policy=lambda candidates: candidates.losses > 0), lambda scores, weights: bool((weights == 1).all())),
        (Choosing(keep=2, begins_at=9), lambda scores, weights: weights.tolist() == [1, 1, 0, 0]),
    ):
        model = gpt2().train()
        optimizer = sgd(model)
        config = GhostConfig(choosing=choosing)
        with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
            for iteration in range(3):
                managed_step(model, manager, optimizer, steps[iteration][0], iteration)
                (scores,), (weights,) = manager.last_scores, manager.last_weights
                assert len(weights) == len(scores.total) == 4
                assert check(scores.total, weights) or bool((scores.total < 0).all())


def managed_step(model: Any, manager: GhostEngineManager, optimizer: Any, places: list[int], iteration: int) -> None:
    X, Y, batch_idx = batch_of(places)
    manager.attach_train_batch(X, Y, iteration, batch_idx)
    manager.prepare_forward_input(X, Y)
    model(input_ids=X, labels=Y).loss.backward()
    manager.prepare_gradients()
    optimizer.step()
    manager.aggregate_and_log()
    optimizer.zero_grad(set_to_none=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-labels": ({"labels": None}, "gets no `labels` of tokens by name"),
    "past": ({"past_key_values": [1]}, "argument 'past_key_values' of the model's forward pass (list) cannot be cut"),
    "odd": ({"position_ids": torch.zeros(3, 24, dtype=torch.long)}, "argument 'position_ids'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut(name: str) -> None:
    extra, words = REFUSED[name]
    model = gpt2().train()
    X, Y, batch_idx = batch_of(plan(1)[0][0])
    with GhostEngineManager(GhostConfig(choosing=Choosing(keep=2)), model, sgd(model), val_data=VAL_BATCH) as manager:
        manager.attach_train_batch(X, Y, 0, batch_idx)
        manager.prepare_forward_input(X, Y)
        with pytest.raises(UsageError) as caught:
            model(**{"input_ids": X, "labels": Y, **extra})
        assert words in str(caught.value)


def test_another_loss_is_refused() -> None:
    """What the model returns must be what is scored."""
    model = gpt2().train()
    model.loss_function = lambda logits, labels, vocab_size, **rest: 2 * logits.float().square().mean()
    X, Y, batch_idx = batch_of(plan(1)[0][0])
    with GhostEngineManager(GhostConfig(choosing=Choosing(keep=2)), model, sgd(model), val_data=VAL_BATCH) as manager:
        manager.attach_train_batch(X, Y, 0, batch_idx)
        manager.prepare_forward_input(X, Y)
        with pytest.raises(UsageError, match="samples are chosen by that, so train on that"):
            model(input_ids=X, labels=Y)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "`policy=top-k` chooses so many candidates: give `keep`"),
        ({"keep": 2, "policy": "reweight"}, "weighs its samples alike"),
        ({"keep": 2, "policy": "best"}, "`policy` 'best' is unknown"),
        ({"keep": 2, "policy": "random", "contrast": True}, "does not choose by scores alone"),
        ({"keep": 0}, "`keep` must be at least 1"),
        ({"keep": 2, "threshold": 1.0}, "belongs to `policy=threshold`"),
    ],
)
def test_what_choosing_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Choosing(**settings)
    assert words in str(caught.value)


def test_unequal_weights_are_refused() -> None:
    model = gpt2().train()
    choosing = Choosing(policy=lambda candidates: np.arange(len(candidates)) + 1.0)
    X, Y, batch_idx = batch_of(plan(1)[0][0])
    with GhostEngineManager(GhostConfig(choosing=choosing), model, sgd(model), val_data=VAL_BATCH) as manager:
        manager.attach_train_batch(X, Y, 0, batch_idx)
        manager.prepare_forward_input(X, Y)
        with pytest.raises(UsageError, match="weighs its samples alike; give 0 and 1"):
            model(input_ids=X, labels=Y)


def test_choosing_needs_val_data() -> None:
    model = gpt2()
    with pytest.raises(UsageError, match="give `val_data`"):
        GhostEngineManager(GhostConfig(method="GradProjLora", choosing=Choosing(keep=2)), model, sgd(model))


class Cut:
    """A collator that leaves what a run says was chosen, padded as all candidates are."""

    def __init__(self, run: Any) -> None:
        weight, sample = run.read_committed("weight"), run.read_committed("sample")
        self.chosen = [set(of_step[counts > 0].tolist()) for of_step, counts in zip(sample, weight, strict=True)]
        self.batches = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(features)
        places = batch.pop("sample").tolist()
        here = [index for index, place in enumerate(places) if place in self.chosen[min(self.batches, 5)]]
        self.batches += 1
        return {name: values[here] for name, values in batch.items()}


def test_contrast_of_the_callback(tmp_path: Path) -> None:
    """It chooses as the manager does with the same samples."""
    choosing, model = Choosing(keep=2, contrast=True), without_dropout()
    callback = callback_of(tmp_path / "store", choosing=choosing, name="run", dot_prod_save_interval=1)
    trainer_of(tmp_path, [callback], model=model, max_steps=1).train()
    run = run_of(tmp_path / "store", "run")
    sample, weight, score = (run.read_committed(array)[0, 0] for array in ("sample", "weight", "score"))
    fresh = without_dropout()
    with GhostEngineManager(GhostConfig(choosing=choosing), fresh, sgd(fresh), val_data=VAL_BATCH) as manager:
        managed_step(fresh, manager, manager.optimizer, sample.tolist(), 0)
        (scores,), (weights,) = manager.last_scores, manager.last_weights
    np.testing.assert_allclose(score, scores.total, rtol=1e-4)
    np.testing.assert_array_equal(weight, weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "bf16", "checkpointing"])
def test_the_callback_trains_on_the_chosen(tmp_path: Path, name: str) -> None:
    """A Trainer that is given the chosen rows alone ends with the same bits, and logs the same losses."""
    settings = {**SETTINGS[name], "max_steps": 6, "logging_steps": 1}
    callback = callback_of(tmp_path / "store", choosing=Choosing(keep=2), name="run")
    scored = trainer_of(tmp_path, [callback], **settings)
    scored.train()
    run = run_of(tmp_path / "store", "run")
    assert (run.read_committed("weight") > 0).sum((1, 2)).tolist() == [2] * 6
    plain = trainer_of(tmp_path, [], data_collator=Cut(run), **settings)
    plain.train()
    for parameter, given in weights_of(scored.model).items():
        assert torch.equal(given, weights_of(plain.model)[parameter]), parameter
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (scored, plain)]
    assert losses[0] == losses[1]
    assert np.isfinite(run.read_committed("train_loss")).all()
    assert not hooks_of(scored.model)


@pytest.mark.slow
def test_the_callback_with_accumulation_resumes(tmp_path: Path) -> None:
    """Each micro-batch chooses by itself; a training that stops and goes on chooses as one that did not."""
    settings = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        choosing = Choosing(keep=2, policy="random", seed=5)
        callback = callback_of(folder / "store", choosing=choosing, name="run")
        stops = [StopAt(3)] if name == "stopped" else []
        trainer_of(folder, [callback, *stops], **settings).train()
        if stops:
            callback = callback_of(folder / "store", choosing=choosing, name="run")
            trainer_of(folder, [callback], **settings).train(
                resume_from_checkpoint=str(folder / "out" / "checkpoint-3")
            )
    runs = [run_of(tmp_path / name / "store", "run") for name in ("whole", "stopped")]
    for array in ("sample", "weight", "score", "loss"):
        one, other = (run.read_committed(array) for run in runs)
        np.testing.assert_array_equal(one, other)
    assert runs[0].read_committed("weight").shape == (6, 1, 8)


def of_rank(rank: int, steps: Places) -> Places:
    """Every other step of a plan is this rank's."""
    return steps[rank::2]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["top-k", "threshold"])
def test_two_ranks_of_the_manager(name: str, tmp_path: Path) -> None:
    """Each rank chooses among the samples of its micro-batches; the update is DDP's own on the chosen, bit for bit: the
    mean over ranks of the mean loss of what each chose, however many that are.
    """
    steps = plan(8, accumulation=2)
    choosing = {"top-k": Choosing(keep=2), "threshold": Choosing(policy="threshold", threshold=0.0)}[name]
    config = config_of(tmp_path / "store", 4, gradient_accumulation_steps=2, choosing=choosing)

    def work(rank: int) -> None:
        inner = gpt2()
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = sgd(inner)
        own = of_rank(rank, steps)
        with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager:
            managed(model, own, manager, optimizer)
        torch.distributed.barrier()
        run = run_of(tmp_path / "store", "run")
        sample, weight = (run.read_committed(array)[:, rank] for array in ("sample", "weight"))
        chosen = [
            [[place for place in places if place in set(trained.tolist())] for places in micro_batches]
            for micro_batches, trained in zip(own, (s[w > 0] for s, w in zip(sample, weight, strict=True)), strict=True)
        ]
        twin = nn.parallel.DistributedDataParallel(gpt2())
        expected = plainly(twin, own, chosen)
        for parameter, given in weights_of(inner).items():
            assert torch.equal(given, expected[f"module.{parameter}"]), parameter
        other = [torch.zeros_like(inner.lm_head.weight) for _ in range(2)]
        torch.distributed.all_gather(other, inner.lm_head.weight.detach())
        assert torch.equal(*other)

    in_ranks(2, work, tmp_path)
    run = run_of(tmp_path / "store", "run")
    sample, weight, score = (run.read_committed(array) for array in ("sample", "weight", "score"))
    assert sample.shape == (4, 2, 8)
    for step in range(4):
        for rank in range(2):
            places = [place for micro_batch in of_rank(rank, steps)[step] for place in micro_batch]
            there = sample[step, rank] >= 0
            assert sample[step, rank, there].tolist() == places
            assert np.isfinite(score[step, rank, there]).all()
            assert np.isin(weight[step, rank, there], (0, 1)).all()
    counts = (weight > 0).sum(2)
    if name == "top-k":
        assert (counts == 4).all()
    else:
        assert (counts[:, 0] != counts[:, 1]).any()


def as_torchrun_sets(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


IN_RANKS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 7, "ddp_backend": "gloo"}


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["top-k", "threshold"])
def test_two_ranks_of_the_callback(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer under DDP that is given the chosen rows alone ends with the same bits, where each rank's loss is the
    mean over its own targets.
    """
    choosing = {"top-k": Choosing(keep=2), "threshold": Choosing(policy="threshold", threshold=0.0)}[name]
    settings = {**IN_RANKS, "average_tokens_across_devices": False}

    def work(rank: int) -> None:
        as_torchrun_sets(monkeypatch, rank)
        callback = callback_of(tmp_path / "store", choosing=choosing, name="run")
        scored = trainer_of(tmp_path, [callback], model=without_dropout(), **settings)
        scored.train()
        torch.distributed.barrier()
        cut = Cut(run_of(tmp_path / "store", "run"))
        plain = trainer_of(tmp_path, [], model=without_dropout(), data_collator=cut, **settings)
        plain.train()
        for parameter, given in weights_of(scored.model).items():
            assert torch.equal(given, weights_of(plain.model)[parameter]), parameter
        other = [torch.zeros_like(scored.model.lm_head.weight) for _ in range(2)]
        torch.distributed.all_gather(other, scored.model.lm_head.weight.detach())
        assert torch.equal(*other)

    in_ranks(2, work, tmp_path)
    run = run_of(tmp_path / "store", "run")
    sample, weight = run.read_committed("sample"), run.read_committed("weight")
    assert sample.shape == (4, 2, 7)
    assert [sorted(step.ravel().tolist()) for step in sample] == [list(range(14))] * 4
    counts = (weight > 0).sum(2)
    assert (counts == 2).all() if name == "top-k" else (counts[:, 0] != counts[:, 1]).any()


@pytest.mark.slow
@pytest.mark.ddp
def test_ranks_of_the_trainer_weigh_by_their_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a rank's chosen samples count as much as all that it had to choose from."""
    # Some releases count the first label, too, which nothing predicts.
    rows = dataset().map(lambda row: {"labels": [-100, *row["labels"][1:]]})
    settings = {**IN_RANKS, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "rows": rows}

    def work(rank: int) -> None:
        as_torchrun_sets(monkeypatch, rank)
        callback = callback_of(tmp_path / "store", choosing=Choosing(policy=uneven), name="run")
        trainer = trainer_of(tmp_path, [callback], model=without_dropout(), **settings)
        trainer.train()
        if rank == 0:
            torch.save(weights_of(trainer.model), tmp_path / "weights")

    in_ranks(2, work, tmp_path)
    run, model = run_of(tmp_path / "store", "run"), without_dropout()
    sample, weight = run.read_committed("sample")[0], run.read_committed("weight")[0]
    assert (weight > 0).sum(1).tolist() != [7, 7]
    targets = [int((batch_of(of_rank.tolist())[1][:, 1:] != -100).sum()) for of_rank in sample]
    for of_rank, counted, share in zip(sample, weight, targets, strict=True):
        X, Y, _ = batch_of(of_rank[counted > 0].tolist())
        (model(input_ids=X, labels=Y).loss * share / sum(targets)).backward()
    given = torch.load(tmp_path / "weights")
    for parameter, value in model.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(given[parameter], value.detach() - 0.01 * value.grad, rtol=0, atol=1e-7)


def uneven(candidates: Any) -> Any:
    """Those of rows below 5: another number of them on each rank."""
    return candidates.rows < 5


def without_dropout() -> Any:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
