"""What the store says of a training is true: every number is computed again from the saved checkpoints, sample by
sample, with plain autograd in float64, no padding, no hook, and the tokenizer's own tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.train_oracle import Oracle, gradient_of, loss_of, model_at

if TYPE_CHECKING:
    from tests.support.trainings import Gym, Trained

STEPS = (0, 1, 7, 12, 19)
"""Steps that are computed again."""
KEPT = {"checkpoint_interval": 1, "keep_checkpoints": None}
TOLERANCE = 1e-6
"""Of a score, relative to the product of the norms of the two gradients."""

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups-accumulation-4": {
        "val_groups": True,
        "per_layer": True,
        "gradient_accumulation_steps": 4,
        "batch_size": 2,
        "model": "two",
    },
    "prompts": {"corpus": "prompts", "val_groups": True, "val_batch_size": 8, "per_layer": True},
    "windows": {"corpus": "long", "max_length": 9, "per_layer": True, "gradient_accumulation_steps": 2},
    "gram": {"corpus": "prompts", "route": "gram", "val_sampling": "fixed"},
    "domain": {"corpus": "prompts", "domains": ("code",), "max_length": 7, "overlong": "truncate"},
}


def before(gym: Gym, trained: Trained, step: int, model: str) -> Any:
    """The model with which ``step`` (from 0) was made."""
    return model_at(trained.checkpoint(step) if step else gym.models[model])


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", CASES)
def test_scores_and_losses_are_those_of_autograd(gym: Gym, name: str) -> None:
    case = CASES[name]
    trained = gym.train(**case, **KEPT)
    max_length = case.get("max_length", 32)
    oracle = Oracle(gym, trained, case.get("corpus", "plain"), max_length)
    arrays, run = trained.arrays(), trained.run
    size = case.get("val_batch_size", 3)
    worst = {"score": 0.0, "group": 0.0, "block": 0.0, "loss": 0.0}
    for step in STEPS:
        model = before(gym, trained, step, case.get("model", "tiny"))
        chosen = oracle.chooser.chosen(step, size, case.get("val_sampling", "rotate")).tolist()
        val = oracle.val_gradients(model, chosen)
        norm = {group: math.sqrt(sum(float(g.square().sum()) for g in some.values())) for group, some in val.items()}
        losses, targets = [], []
        for place, row in enumerate(arrays["sample"][step, 0].tolist()):
            tokens, first = oracle.rows[row]
            loss = loss_of(model, tokens, first)
            losses.append(loss.item())
            targets.append(len(tokens) - first)
            gradient = gradient_of(model, loss)
            own = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
            dots = {n: {g: float((gradient[n] * val[g][n]).sum()) for g in val} for n in gradient}
            total = sum(dot[""] for dot in dots.values())
            found = float(arrays["score"][step, 0, place])
            worst["score"] = max(worst["score"], abs(found - total) / (own * norm[""]))
            for column, group in enumerate(run.layout.groups):
                score = float(arrays["group_score"][step, 0, place, column])
                if group not in val:
                    assert math.isnan(score)
                    continue
                error = abs(score - sum(dot[group] for dot in dots.values())) / (own * norm[group])
                worst["group"] = max(worst["group"], error)
            for column, block in enumerate(run.layout.blocks):
                score = float(arrays["block_score"][step, 0, place, column])
                expected = sum(dot[""] for n, dot in dots.items() if n.rpartition(".")[0] == block)
                worst["block"] = max(worst["block"], abs(score - expected) / (own * norm[""]))
        worst["loss"] = max(worst["loss"], float(np.abs(arrays["loss"][step, 0] / losses - 1).max()))
        mean = float(np.dot(losses, targets) / sum(targets))
        assert arrays["train_loss"][step] == pytest.approx(mean, rel=2e-6)
        assert arrays["tokens"][step] == sum(len(oracle.rows[row][0]) for row in arrays["sample"][step, 0])
    print(name, worst)  # noqa: T201 - shown by pytest -s
    assert max(worst.values()) < TOLERANCE, worst
    if run.layout.blocks:
        total = arrays["block_score"].astype(np.float64).sum(-1)
        scale = np.abs(arrays["block_score"]).sum(-1)
        assert (np.abs(total - arrays["score"]) <= 1e-6 * scale).all()


@pytest.mark.thin(1)
@pytest.mark.parametrize("interval", [3, 5])
def test_an_older_val_gradient(gym: Gym, interval: int) -> None:
    """It is that of the weights at the last refresh, or at the last checkpoint (here every 4 steps) after it."""
    trained = gym.train(val_refresh_interval=interval, checkpoint_interval=4, keep_checkpoints=None)
    every = gym.train(**KEPT)  # the same weights, with a checkpoint at every step
    oracle = Oracle(gym, trained, "plain", 32)
    arrays = trained.arrays()
    for step in (1, 2, 5, 7, 8, 11, 14, 19):
        refreshed = max(step - step % interval, step - step % 4)
        at_refresh = before(gym, every, refreshed, "tiny")
        val = oracle.val_gradients(at_refresh, oracle.chooser.chosen(step // interval, 3, "rotate").tolist())[""]
        model = before(gym, every, step, "tiny")
        for place, row in enumerate(arrays["sample"][step, 0].tolist()):
            gradient = gradient_of(model, loss_of(model, *oracle.rows[row]))
            dot, sizes = (
                sum(float((gradient[n] * val[n]).sum()) for n in val),
                math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
                * math.sqrt(sum(float(g.square().sum()) for g in val.values())),
            )
            assert abs(float(arrays["score"][step, 0, place]) - dot) < TOLERANCE * sizes, step


def test_learning_rates(gym: Gym) -> None:
    trained = gym.train(warmup_steps=4, min_learning_rate_ratio=0.25)
    found = trained.arrays()["learning_rate"]
    peak = 5e-3
    np.testing.assert_allclose(found[:4], [peak * k / 4 for k in (1, 2, 3, 4)], rtol=1e-15)
    cosine = [peak * (0.25 + 0.75 * (1 + math.cos(math.pi * k / 16)) / 2) for k in range(16)]
    np.testing.assert_allclose(found[4:], cosine, rtol=1e-15)


def test_val_loss_is_kept_where_it_was_computed(gym: Gym) -> None:
    trained = gym.train(**KEPT)
    oracle = Oracle(gym, trained, "plain", 32)
    found = trained.arrays()["val_loss"]
    assert np.isfinite(found).nonzero()[0].tolist() == [9, 19]
    for done in (10, 20):
        model = model_at(trained.checkpoint(done))
        sums = [(loss_of(model, t, f).item() * (len(t) - f), len(t) - f) for t, f, _ in oracle.val]
        expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
        assert found[done - 1] == pytest.approx(expected, rel=1e-6)
    assert trained.report.val_loss == pytest.approx(expected, rel=1e-6)


def test_scores_do_not_depend_on_how_the_step_is_cut(gym: Gym) -> None:
    """Four micro-batches of two or one of eight: the same samples in the same order, the same scores."""
    one = gym.train(batch_size=8, max_steps=3).arrays()
    four = gym.train(batch_size=2, gradient_accumulation_steps=4, max_steps=3).arrays()
    np.testing.assert_array_equal(one["sample"], four["sample"])
    scale = np.abs(one["score"]).max()
    assert np.abs(one["score"][0] - four["score"][0]).max() < 1e-6 * scale
    np.testing.assert_allclose(one["train_loss"], four["train_loss"], rtol=1e-5)


@pytest.mark.slow
def test_sketched_scores_resemble_the_exact_ones(gym: Gym) -> None:
    """Over the projected layers; blocks sum to the score."""
    from ghoststore import ProjectionConfig

    wide = ProjectionConfig(rank_total="full", compress="none")
    sketched = gym.train(model="two", score="sketched", projection=wide, per_layer=True, max_steps=4).arrays()
    exact = gym.train(model="two", per_layer=True, max_steps=4).arrays()
    np.testing.assert_allclose(sketched["block_score"].sum(-1), sketched["score"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(sketched["sample"], exact["sample"])
    assert np.corrcoef(sketched["score"].ravel(), exact["score"].ravel())[0, 1] > 0.8
