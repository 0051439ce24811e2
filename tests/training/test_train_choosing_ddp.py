"""Two processes choose as one would, over all their candidates, or each among its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ghoststore.store import Store
from tests.support.trainings import apart, arrays_of, ranks, same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

OPTIONS = (
    "--candidates",
    "8",
    "--batch-size",
    "2",
    "--val-groups",
    "--json",
    "--learning-rate",
    "1e-3",
    "--choosing-begins-at",
    "0",
    "--score",
    "exact",
)
OVER_ALL = {
    "top-k": ("--keep", "4"),
    # Shares of one and two samples; and of one and none.
    "uneven": ("--keep", "3", "--policy", "bottom-k"),
    "one-for-two": ("--policy", "threshold", "--threshold", "1e9"),
    "reweight": ("--policy", "reweight"),
    "one-pass": ("--keep", "4", "--choosing-passes", "one"),
    "contrast": ("--keep", "4", "--score", "sketched"),
    "one-pass-reweight": ("--policy", "reweight", "--choosing-passes", "one"),
}


def by_two(gym: Gym, folder: Path, *options: str) -> None:
    first, second = ranks(gym.lab, "", gym.words(folder, *OPTIONS, *options, corpus="prompts"))
    assert (first.code, second.code) == (0, 0), first.err + second.err


@pytest.mark.parametrize("name", OVER_ALL)
def test_over_all_ranks(gym: Gym, name: str, tmp_path: Path) -> None:
    by_two(gym, tmp_path / "two", *OVER_ALL[name])
    assert gym.run(tmp_path / "one", *OPTIONS, *OVER_ALL[name], corpus="prompts").code == 0
    double, single = (arrays_of(Store.open(tmp_path / each / "store").run("run")) for each in ("two", "one"))
    assert double["weight"].shape == (12, 2, 4)
    for array in ("sample", "tokens", "learning_rate"):
        np.testing.assert_array_equal(double[array].reshape(single[array].shape), single[array])
    for array in ("weight", "loss", "score", "train_loss", "val_loss", "grad_norm"):
        given = double[array].reshape(single[array].shape)
        np.testing.assert_allclose(given, single[array], rtol=1e-4, atol=1e-5, equal_nan=True)
    checkpoints = (tmp_path / each / "out" / "checkpoint-12" for each in ("two", "one"))
    assert apart(*checkpoints, gym.models["tiny"]) < 1e-4


def test_each_rank_among_its_own(gym: Gym, tmp_path: Path) -> None:
    """Two of four on each; killed on the way and resumed, it ends with the same bits."""
    options = ("--keep", "4", "--choose-over", "rank")
    by_two(gym, tmp_path / "whole", *options)
    run = Store.open(tmp_path / "whole" / "store").run("run")
    arrays = arrays_of(run)
    for score, weight in zip(arrays["score"].reshape(-1, 4), arrays["weight"].reshape(-1, 4), strict=True):
        highest = np.argsort(-score, kind="stable")[:2]
        np.testing.assert_array_equal(np.flatnonzero(weight), np.sort(highest))
    by_two(gym, tmp_path / "stopped", *options, "--max-steps", "12", "--seed", "0")
    again = arrays_of(Store.open(tmp_path / "stopped" / "store").run("run"))
    assert same_bits(again, arrays) == []


def test_what_cannot_be_dealt_out(gym: Gym, tmp_path: Path) -> None:
    for options, words in (
        (("--candidates", "7", "--keep", "4"), "--candidates 7 cannot be dealt out to 2 ranks in equal shares"),
        (("--keep", "3", "--choose-over", "rank"), "--keep 3 cannot be dealt out to 2 ranks in equal shares"),
    ):
        outcomes = ranks(gym.lab, "", gym.words(tmp_path, *OPTIONS, *options, corpus="prompts"))
        assert [outcome.code for outcome in outcomes] == [2, 2]
        assert words in outcomes[0].err
