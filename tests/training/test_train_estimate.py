"""About how long a training takes, before its first step: measured, and without a trace in what is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import indexer.training.train
from ghoststore.cli.terminal import Bars
from ghoststore.progress import Silent
from tests.support.trainings import Trained, in_two, same_bits

if TYPE_CHECKING:
    from ghoststore.progress import Task
    from tests.support.trainings import Gym

SETTINGS: dict[str, dict[str, Any]] = {
    "dropout": {"model": "dropout", "gradient_accumulation_steps": 2, "val_refresh_interval": 3},
    "choosing": {"candidates": 6, "keep": 2, "val_groups": True, "choosing_begins_at": 0, "score_metric": "adam"},
    "one pass": {"candidates": 6, "keep": 2, "choosing_passes": "one", "choosing_begins_at": 0, "batch_size": 2},
    "cuts of several sizes": {
        "candidates": 6,
        "keep": 2,
        "batch_size": 5,
        "score": "exact",
        "choosing_begins_at": 0,
        "val_batch_size": 3,
    },
    "float16": {"train_dtype": "float16"},
    "sketched": {"score": "sketched", "keep_gradients": 2, "train_dtype": "bfloat16"},
    "regular": {"method": "Regular", "gradient_checkpointing": True},
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_stays_of_a_rehearsal(gym: Gym, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, optimizer, scores and losses are those of a training without one, bit for bit, where it resumes, too."""
    trained = []
    for rehearsed in (1, 100):
        monkeypatch.setattr(indexer.training.train, "REHEARSED", rehearsed)
        options = {"max_steps": 4, "eval_interval": 2, "dot_prod_save_interval": 2, **SETTINGS[name]}
        trained.append(gym.fresh(tmp_path / str(rehearsed), **options))
    one, other = trained
    shutil.rmtree(one.checkpoint())
    monkeypatch.setattr(indexer.training.train, "REHEARSED", 1)
    assert gym.fresh(tmp_path / "1", **options).report.resumed_from == 2
    assert same_bits(one.weights(), other.weights()) == []
    assert same_bits(one.optimizer(), other.optimizer()) == []
    assert same_bits(one.arrays(), other.arrays()) == []


class Listener(Silent):
    """What a training expects, and how many steps it had made by then."""

    def __init__(self) -> None:
        self.steps = 0
        self.expected: list[tuple[int, float, str]] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        return self if unit == "steps" else super().task(description, total, done, unit)  # type: ignore[return-value]

    def expect(self, seconds: float, besides: str) -> None:
        self.expected.append((self.steps, seconds, besides))

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.steps += rows

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def test_before_the_first_step(gym: Gym, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there are few; a policy of the user's own is not asked for it."""
    monkeypatch.setattr(indexer.training.train, "REHEARSED", 4)
    asked = []

    def policy(candidates: Any) -> list[float]:
        asked.append(candidates.step)
        return [1.0] * len(candidates)

    listener, options = Listener(), {"candidates": 3, "policy": policy, "choosing_begins_at": 0, "keep": 3}
    gym.fresh(tmp_path / "long", progress=listener, max_steps=4, **options)
    ((steps, seconds, besides),) = listener.expected
    assert (steps, besides) == (0, "val losses and checkpoints")
    assert seconds > 0
    assert asked == list(range(4))
    listener = Listener()
    gym.fresh(tmp_path / "short", progress=listener, max_steps=3)
    assert listener.expected == []


@pytest.mark.slow
def test_the_events_say_it(gym: Gym, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, "--log-json", "--max-steps", "20")
    assert outcome.code == 0
    events = [json.loads(line) for line in outcome.err.splitlines()]
    (estimate,) = (event for event in events if event["event"] == "estimate")
    assert (estimate["description"], estimate["total"], estimate["done"]) == ("training", 20, 0)
    assert estimate["seconds"] > 0


def test_a_person_sees_it(capsys: pytest.CaptureFixture[str]) -> None:
    task = Bars().task("training", 1000, 10, "steps")
    task.expect(200.0, "val losses and checkpoints")
    task.close()
    assert "training: about 3 min, val losses and checkpoints aside\n" in capsys.readouterr().err


RANKS = """
import indexer.training.train
indexer.training.train.REHEARSED = {rehearsed}
import ghoststore.cli
ghoststore.cli.main({words!r})
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--candidates", "6", "--keep", "4")], ids=["plain", "choosing"])
def test_of_two_ranks(gym: Gym, options: tuple[str, ...], tmp_path: Path) -> None:
    trained = []
    for rehearsed in (1, 100):
        folder = tmp_path / str(rehearsed)
        words = ["train", *gym.words(folder, *options, "--max-steps", "4")]
        outcomes = in_two(gym.lab, RANKS.format(rehearsed=rehearsed, words=words))
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err + outcomes[1].err
        trained.append(Trained(folder / "out", folder / "store", None))
    one, other = trained
    assert same_bits(one.weights(4), other.weights(4)) == []
    assert same_bits(one.arrays(), other.arrays()) == []
