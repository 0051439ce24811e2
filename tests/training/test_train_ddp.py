"""Two processes are one with twice the batch: the same samples, losses and scores, and the same weights on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import load_file

from ghoststore.store import Store
from indexer.training.state import checkpoints
from tests.support.trainings import apart, arrays_of, ranks, same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym

pytestmark = pytest.mark.ddp

OPTIONS = (
    "--gradient-accumulation-steps",
    "2",
    "--batch-size",
    "2",
    "--val-groups",
    "--per-layer",
    "--json",
    "--keep-checkpoints",
    "all",
    "--learning-rate",
    "1e-3",
)


@pytest.fixture(scope="module")
def two(gym: Gym) -> Path:
    """The folder of a training by two processes."""
    folder = gym.folder / "two"
    first, second = ranks(gym.lab, "", gym.words(folder, *OPTIONS, corpus="prompts"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (first.json["steps"], first.json["resumed_from"]) == (12, 0)
    assert (second.out, second.err) == ("", "")
    return folder


@pytest.fixture(scope="module")
def one(gym: Gym) -> Path:
    """The same training by one process: its batch is twice as large, and not cut."""
    folder = gym.folder / "one"
    outcome = gym.run(folder, *OPTIONS, "--batch-size", "8", "--gradient-accumulation-steps", "1", corpus="prompts")
    assert outcome.code == 0, outcome.err
    return folder


def test_scores_and_losses_are_those_of_one_process(one: Path, two: Path) -> None:
    single, double = (arrays_of(Store.open(folder / "store").run("run")) for folder in (one, two))
    assert double["sample"].shape == (12, 2, 4)
    np.testing.assert_array_equal(double["sample"].reshape(12, 8), single["sample"].reshape(12, 8))
    for name in ("learning_rate", "tokens"):
        np.testing.assert_array_equal(double[name], single[name])
    for name in ("train_loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(double[name], single[name], rtol=1e-6, equal_nan=True)
    np.testing.assert_allclose(double["loss"].reshape(12, 8), single["loss"].reshape(12, 8), rtol=1e-6)
    for name in ("score", "group_score", "block_score"):
        found, expected = (each[name].reshape(12, 8, -1).astype(np.float64) for each in (double, single))
        scale = np.nanmax(np.abs(expected), axis=(1, 2), keepdims=True)
        print(name, float(np.nanmax(np.abs(found - expected) / scale)))  # noqa: T201 - shown by pytest -s
        assert np.nanmax(np.abs(found - expected) / scale) < 1e-6


def test_ranks_see_different_samples(two: Path) -> None:
    """Of an epoch of 30 rows, 3 steps of 8 and one that reaches into the next."""
    sample = Store.open(two / "store").run("run").read_committed("sample")
    epoch = sample.reshape(-1)[:30].tolist()
    assert sorted(epoch) == list(range(30))
    for step in sample:
        assert not set(step[0].tolist()) & set(step[1].tolist())


def test_weights_are_those_of_one_process(gym: Gym, one: Path, two: Path) -> None:
    worst = apart(*(folder / "out" / "checkpoint-12" for folder in (two, one)), gym.models["tiny"])
    print("weights", worst)  # noqa: T201 - shown by pytest -s
    assert worst < 1e-4


SIGNAL = """
import os, signal
from indexer.training.loop import Trainer
real = Trainer.step
def step(self, number):
    if number == 7 and os.environ["RANK"] == "{rank}":
        signal.raise_signal(signal.{signal})
    return real(self, number)
Trainer.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "signal", "code"), [(1, "SIGTERM", 143), (0, "SIGINT", 130)])
def test_a_signal_to_one_rank_stops_all(gym: Gym, two: Path, rank: int, signal: str, code: int, tmp_path: Path) -> None:
    """After the same step, which is saved; the first rank says so, and the same command ends as if none had come."""
    words = gym.words(tmp_path, *OPTIONS, corpus="prompts")
    outcomes = ranks(gym.lab, SIGNAL.format(rank=rank, signal=signal), words)
    assert [outcome.code for outcome in outcomes] == [code, code]
    (line,) = outcomes[0].err.strip().splitlines()
    assert line.endswith(f"after step 8 of 12; the same command resumes from {tmp_path}/out/checkpoint-8")
    assert outcomes[1].err.strip() == ""
    assert Store.open(tmp_path / "store").run("run").steps == 8
    again = ranks(gym.lab, "", words)
    assert [outcome.code for outcome in again] == [0, 0], again[0].err + again[1].err
    assert again[0].json["resumed_from"] == 8
    runs = [Store.open(folder / "store").run("run") for folder in (tmp_path, two)]
    assert same_bits(*map(arrays_of, runs)) == []


CRASH = """
import os, signal, sys
from indexer.training.loop import Trainer
real = Trainer.step
def step(self, number):
    if number == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, number)
Trainer.step = step
import ghoststore.cli
ghoststore.cli.main(sys.argv[1:])
"""


@pytest.mark.kill
@pytest.mark.slow
def test_one_rank_is_killed_under_torchrun(gym: Gym, two: Path, tmp_path: Path) -> None:
    """torchrun ends the other; the same command resumes, to the same bits."""
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        "train",
        *gym.words(tmp_path, *OPTIONS, corpus="prompts"),
    ]
    root = Path(__file__).resolve().parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-6"]
    first, second = ranks(gym.lab, "", gym.words(tmp_path, *OPTIONS, corpus="prompts"))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.json["resumed_from"] == 6
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        found, expected = (load_file(each / "out" / "checkpoint-12" / file) for each in (tmp_path, two))
        assert same_bits(found, expected) == []
    runs = [Store.open(each / "store").run("run") for each in (tmp_path, two)]
    assert same_bits(*map(arrays_of, runs)) == []


DRIFT = """
import torch
from indexer.training.loop import Trainer
real = Trainer.step
def step(self, number):
    result = real(self, number)
    if number == 4 and os.environ["RANK"] == "1":
        with torch.no_grad():
            self.inner.transformer.ln_f.bias[3] += 1e-7
    return result
Trainer.step = step
"""


def test_drifting_replicas_are_refused(gym: Gym, tmp_path: Path) -> None:
    """One number of one replica, in its last digits: the next checkpoint is not written, and says so."""
    outcomes = ranks(gym.lab, DRIFT, gym.words(tmp_path, *OPTIONS, corpus="prompts"))
    for outcome in outcomes:
        assert outcome.code == 1
        assert outcome.err.strip().splitlines()[-1] == (
            "Error: the ranks' weights have drifted apart, first in 'transformer.ln_f.bias': nothing was saved"
        )
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]


def test_an_error_of_the_first_rank_reaches_the_others(gym: Gym, two: Path, tmp_path: Path) -> None:
    """They end too, and point to it: here the run is of other settings."""
    words = gym.words(tmp_path, *OPTIONS, "--store", str(two / "store"), "--seed", "5", corpus="prompts")
    first, second = ranks(gym.lab, "", words)
    assert (first.code, second.code) == (3, 1)
    assert "training.seed: stored 0, asked for 5" in first.err
    assert second.err.strip() == "Error: the first rank could not go on; see its message"
    assert first.out == second.out == ""


def test_one_process_cannot_go_on_for_two(gym: Gym, two: Path) -> None:
    outcome = gym.run(two, *OPTIONS, corpus="prompts")
    assert outcome.code == 3
    assert "storage.ranks: stored 2, asked for 1" in outcome.err


@pytest.mark.slow
def test_standard_input_of_several_ranks(gym: Gym, tmp_path: Path) -> None:
    for option in ("--data", "--val-set"):
        outcomes = ranks(gym.lab, "", gym.words(tmp_path, option, "-"))
        assert [outcome.code for outcome in outcomes] == [2, 2]
        assert f"{option} - cannot be read by several ranks" in outcomes[0].err
    assert not (tmp_path / "out").exists()
