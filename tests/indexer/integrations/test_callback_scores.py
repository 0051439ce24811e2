"""GhostStoreCallback: weights as without it, scores as batch-of-one autograd says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
)

from ghoststore import GradProjLoraEngine, ProjectionConfig
from indexer.encode.losses import next_token_losses
from query.demo.tokenizer import train_tokenizer
from tests.support.loops import (
    ROWS,
    batch_of,
    close_to,
    exact_scores,
    identical,
    roughly,
    run_of,
    steps_of,
    weights_of,
)
from tests.support.models import gpt2, llama
from tests.support.trainers import (
    SETTINGS,
    Watcher,
    callback_of,
    dataset,
    hooks_of,
    trainer_of,
)


@pytest.fixture(scope="module")
def weights_without(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Tensor], list[float]]]:
    def of(setting: str) -> tuple[dict[str, Tensor], list[float]]:
        watcher = Watcher()
        trainer = trainer_of(
            tmp_path_factory.mktemp("plain"),
            [watcher],
            rows=dataset(sample=False),
            **SETTINGS[setting],
            eval_rows=dataset(sample=False),
        )
        trainer.train()
        return weights_of(trainer.model), watcher.evaluations

    return of


@pytest.mark.thin(1)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_stays_what_it_is_and_scores_are_exact(
    setting: str, weights_without: Callable[..., Any], tmp_path: Path
) -> None:
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = gpt2().train()  # with dropout, which scoring must not disturb
    trainer = trainer_of(tmp_path, [watcher, callback], model=model, **SETTINGS[setting])
    trainer.train()
    weights, evaluations = weights_without(setting)
    assert identical(weights_of(model), weights)
    assert watcher.evaluations == evaluations
    assert bool(evaluations) == ("eval_strategy" in SETTINGS[setting])
    assert not hooks_of(model)
    run = run_of(tmp_path / "store", "trainer")
    assert run.complete
    assert run.steps == len(watcher.weights) >= 20
    np.testing.assert_array_equal(run.read_committed("learning_rate"), watcher.rates)
    sizes = set()
    for _step, places, scores in steps_of(run):
        assert np.isfinite(scores).all()
        sizes.add(len(places))
    assert len(sizes) > 1  # a smaller last batch


SCORED = {name: value for name, value in SETTINGS.items() if name not in ("clipping", "reentrant", "by epoch")}


@pytest.mark.thin(1)
@pytest.mark.parametrize("setting", SCORED)
def test_scores_are_those_of_batch_of_one_autograd(setting: str, tmp_path: Path) -> None:
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer_of(tmp_path, [watcher, callback], model=model, **{**SCORED[setting], "max_steps": 8}).train()
    run, twin = run_of(tmp_path / "store", "trainer"), gpt2()
    losses, tokens = run.read_committed("train_loss"), run.read_committed("tokens")
    seconds, scoring = run.read_committed("seconds"), run.read_committed("score_seconds")
    assert (scoring > 0).all()
    assert (seconds > scoring).all()
    for step, places, scores in steps_of(run):
        twin.load_state_dict(watcher.weights[step])
        expected = exact_scores(twin, places.tolist())
        if setting == "bf16":
            roughly(scores, expected, 0.05)
        else:
            close_to(scores, expected, 2e-5)
        ids, labels, _ = batch_of(places.tolist())
        with torch.no_grad():
            loss = float(twin(input_ids=ids, labels=labels).loss)  # over all targets of the step
        assert losses[step] == pytest.approx(loss, rel=3e-2 if setting == "bf16" else 1e-5)
        assert tokens[step] == sum(len(ROWS[place][0]) for place in places)


def test_uneven_micro_batches_and_num_items_in_batch(tmp_path: Path) -> None:
    """The Trainer divides the sum over targets by the targets of the whole step, and says so to the model."""
    items: list[int] = []

    class Asking(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            items.append(int(kwargs["num_items_in_batch"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = llama()
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 3}
    trainer_of(tmp_path, [watcher, callback], model=model, trainer=Asking, **settings).train()
    twin = llama()
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        targets = [int((ROWS[place][1][1:] != -100).sum()) for place in places]
        assert len(set(targets)) > 1
        # Older Trainers count the first label of each row, too; scores are of the mean all the same.
        counted = sum(int((ROWS[place][1] != -100).sum()) for place in places)
        older = Version(transformers.__version__) < Version("5.10")
        assert items[4 * step] == sum(targets) or (older and items[4 * step] == counted)
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_scores(twin, places.tolist(), llama), 2e-5)


@pytest.mark.slow
def test_a_model_that_is_told_nothing_of_the_step(tmp_path: Path) -> None:
    """Without num_items_in_batch each micro-batch has its own mean, divided by their number."""
    watcher, callback = Watcher(), callback_of(tmp_path / "store")
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.accepts_loss_kwargs = False
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3}
    trainer_of(tmp_path, [watcher, callback], model=model, **settings).train()
    twin = gpt2()
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_scores(twin, places.tolist()), 2e-5)


def test_the_collator_of_transformers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a cat sleeps", "the dog runs over the stone"] * 5, 300)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = ["a cat", "the dog runs", "over the warm stone a cat sleeps", "sleeps", "the stone runs"]
    rows = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    rows = rows.add_column("sample", [3, 1, 4, 0, 2])
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=24, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    callback = callback_of(tmp_path / "store", samples=5, domains=["x", None, "y", "x", "y"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = {"data_collator": collator, "rows": rows, "max_steps": 4, "per_device_train_batch_size": 2}
    trainer_of(tmp_path, [callback], model=transformers.GPT2LMHeadModel(config), **settings).train()
    run = run_of(tmp_path / "store", "trainer")
    assert sorted(np.concatenate([places for step, places, _ in steps_of(run) if step < 3]).tolist()) == [0, 1, 2, 3, 4]
    assert run.domains == ["x", "y"]


@pytest.mark.slow
def test_projected_gradients_and_scores_by_layer(tmp_path: Path) -> None:
    projection = ProjectionConfig(layers=("mlp",), rank_total=16, seed=2)
    watcher = Watcher()
    callback = callback_of(tmp_path / "store", projection=projection, per_layer=True)
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    trainer_of(tmp_path, [watcher, callback], model=model, max_steps=4).train()
    run, twin = run_of(tmp_path / "store", "trainer"), gpt2()
    vectors, blocks = run.read_committed("vector")[:, 0], run.read_committed("block_score")[:, 0]
    for step, places, scores in steps_of(run):
        twin.load_state_dict(watcher.weights[step])
        ids, labels, _ = batch_of(places.tolist())
        with GradProjLoraEngine(twin, projection) as engine:
            engine.prepare(len(ids))
            expected = engine.collect(next_token_losses(twin(input_ids=ids).logits, labels)[0])
        found = torch.from_numpy(vectors[step, : len(places)])
        assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5
        np.testing.assert_allclose(blocks[step, : len(places)].sum(-1), scores, rtol=1e-4, atol=1e-5)
    assert run.manifest["scoring"]["method"] == "GradProjLora"
