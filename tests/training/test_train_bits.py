"""Training with scores is training without them: the same weights, the same optimizer state, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support.trainings import same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym

Options = dict[str, Any]

TRAINING: dict[str, Options] = {
    "float32": {},
    "bfloat16": {"model_dtype": "bfloat16"},
    "autocast-bfloat16": {"train_dtype": "bfloat16"},
    "autocast-float16": {"train_dtype": "float16"},
    "accumulation": {"batch_size": 2, "gradient_accumulation_steps": 3},
    "clipped": {"max_grad_norm": 0.05},
    "not-clipped": {"max_grad_norm": 0.0},
    "dropout": {"model": "dropout"},
    "dropout-checkpointing": {"model": "dropout", "gradient_checkpointing": True, "batch_size": 2},
    "checkpointing-bfloat16": {"model": "two", "gradient_checkpointing": True, "train_dtype": "bfloat16"},
    "windows": {"corpus": "long", "max_length": 9, "model": "two"},
    "prompts": {"corpus": "prompts", "domains": ("law", "news")},
}
"""How the model is trained: both sides of each comparison have it."""

SCORING: dict[str, tuple[str, Options]] = {
    **{name: (name, {}) for name in TRAINING},
    "direct": ("float32", {"route": "direct"}),
    "gram": ("float32", {"route": "gram"}),
    "groups-and-layers": ("accumulation", {"val_groups": True, "per_layer": True}),
    "refresh-3": ("accumulation", {"val_refresh_interval": 3, "val_sampling": "fixed"}),
    "refresh-4-dropout": ("dropout", {"val_refresh_interval": 4}),
    "without-embeddings": ("float32", {"exclude_layers": ("embeddings",)}),
    "sketched": ("float32", {"score": "sketched"}),
    "scores-every-step-saved": ("windows", {"dot_prod_save_interval": 1, "checkpoint_interval": 5}),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", SCORING)
def test_the_same_bits_with_and_without_scores(gym: Gym, name: str) -> None:
    of, scoring = SCORING[name]
    with_scores = gym.train(**TRAINING[of], **scoring)
    without = gym.train(**TRAINING[of], method="Regular")
    assert with_scores.report.steps == 20
    assert same_bits(with_scores.weights(), without.weights()) == []
    assert same_bits(with_scores.optimizer(), without.optimizer()) == []
    first = torch.cat([w.flatten().float() for w in with_scores.weights().values()])
    assert bool(torch.isfinite(first).all())
    found, plain = with_scores.arrays(), without.arrays()
    for array in ("sample", "loss", "train_loss", "val_loss", "grad_norm", "learning_rate", "tokens"):
        assert found[array].tobytes() == plain[array].tobytes(), array
    scored = found["score"]
    if "float16" in name and "bfloat16" not in name:
        scored = scored[2:]  # until the loss scale fits, gradients overflow
    assert (abs(scored) > 0).all()


def test_training_changes_the_weights(gym: Gym) -> None:
    """The comparison above is of something."""
    before = gym.train(checkpoint_interval=1, keep_checkpoints=None).weights(1)
    after = gym.train(checkpoint_interval=1, keep_checkpoints=None).weights()
    assert set(same_bits(before, after)) == set(before)


def test_the_store_changes_nothing(gym: Gym) -> None:
    """Nor does a val set, nor how often something is saved."""
    plain = gym.train(method="Regular", store=None, name=None, val_set=None)
    assert same_bits(plain.weights(), gym.train().weights()) == []
    often = gym.train(checkpoint_interval=1, keep_checkpoints=None)
    assert same_bits(plain.weights(), often.weights()) == []


def test_the_loss_scaler_was_at_work(gym: Gym) -> None:
    import json

    trained = gym.train(**TRAINING["autocast-float16"])
    state = json.loads((trained.checkpoint() / "training_state" / "state.json").read_text())
    assert state["scaler"]["scale"] >= 1024


def test_dropout_was_at_work(gym: Gym) -> None:
    """Another seed of it, other weights; the same seed, the same."""
    one, two = gym.train(model="dropout"), gym.train(model="two")
    assert set(same_bits(one.weights(), two.weights())) == set(one.weights())


def test_the_callers_random_state_is_left_alone(gym: Gym, tmp_path: Any) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    gym.fresh(tmp_path, model="dropout", max_steps=2)
    assert torch.equal(torch.rand(3), expected)
