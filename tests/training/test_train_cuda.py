"""Training on a GPU: scores as on the CPU, the same weights with and without them, and resuming to the same bits."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.support.trainings import same_bits

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.trainings import Gym

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("settings", [{}, {"score": "sketched"}, {"val_groups": True, "per_layer": True}], ids=str)
def test_the_scores_of_a_cpu(gym: Gym, settings: dict[str, Any]) -> None:
    options = {"max_steps": 4, "learning_rate": 1e-4, "dot_prod_save_interval": 2, **settings}
    runs = [gym.train(**options, device=device).arrays() for device in ("cpu", "cuda")]
    assert np.array_equal(runs[0]["sample"], runs[1]["sample"])
    for name in ("loss", "score", "group_score", "block_score"):
        if name in runs[0]:
            size = np.nanmax(np.abs(runs[0][name]))
            np.testing.assert_allclose(runs[1][name], runs[0][name], rtol=1e-3, atol=2e-4 * size)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_scoring_changes_no_weight(gym: Gym, dtype: str | None) -> None:
    given: dict[str, Any] = {"device": "cuda", "train_dtype": dtype, "max_steps": 8}
    scored, plain = gym.train(**given), gym.train(**given, method="Regular")
    assert same_bits(scored.weights(), plain.weights()) == []


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_resumed_to_the_same_bits(gym: Gym, tmp_path: Path, dtype: str | None) -> None:
    given: dict[str, Any] = {"device": "cuda", "train_dtype": dtype, "max_steps": 8, "checkpoint_interval": 4}
    whole = gym.train(**given, keep_checkpoints=None)
    halved = gym.fresh(tmp_path / "halved", **given, keep_checkpoints=None)
    shutil.rmtree(halved.checkpoint(8))
    resumed = gym.fresh(tmp_path / "halved", **given, keep_checkpoints=None)
    assert same_bits(resumed.weights(8), whole.weights(8)) == []
    assert same_bits(resumed.arrays(), whole.arrays()) == []


@pytest.mark.parametrize("passes", ["two", "one"])
@pytest.mark.parametrize("policy", ["top-k", "reweight"])
@pytest.mark.parametrize("score", [{}, {"score": "exact"}, {"score": "exact", "contrast": False}], ids=str)
def test_choosing_as_on_a_cpu(gym: Gym, passes: str, policy: str, score: dict[str, Any]) -> None:
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-4, "dot_prod_save_interval": 2, "batch_size": 6}
    options |= {"candidates": 6, "policy": policy, "choosing_passes": passes, "choosing_begins_at": 0, **score}
    options |= {"keep": 3} if policy == "top-k" else {}
    runs = [gym.train(**options, device=device) for device in ("cpu", "cuda")]
    ours, theirs = (run.arrays() for run in runs)
    np.testing.assert_allclose(theirs["weight"], ours["weight"], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=1e-3)
    for name, weight in runs[0].weights().items():
        torch.testing.assert_close(runs[1].weights()[name], weight, rtol=1e-3, atol=5e-4)


def test_gradients_that_are_kept(gym: Gym) -> None:
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-4, "dot_prod_save_interval": 2}
    options |= {"keep_gradients": 2, "proj_dtype": "float32"}
    ours, theirs = (gym.train(**options, device=device).arrays() for device in ("cpu", "cuda"))
    for name in ("gradient", "val_gradient"):
        assert np.linalg.norm(theirs[name] - ours[name]) <= 1e-3 * np.linalg.norm(ours[name])
