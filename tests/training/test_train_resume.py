"""A training that is killed at any moment goes on with the same command, and ends as one that was never interrupted:
the same weights, optimizer state and run, bit for bit; what was committed is never touched again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

import ghoststore
from ghoststore.store import Store
from ghoststore.store.run.journal import journal_damage
from indexer.training.state import checkpoints, read_state
from tests.support.trainings import arrays_of, same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym

Fault = dict[str, Any]
OPTIONS = ("--val-groups", "--per-layer", "--train-dtype", "bfloat16")
CHOOSING = ("--candidates", "8", "--keep", "4", "--batch-size", "3", "--choosing-begins-at", "0")
ONE_PASS = (*CHOOSING, "--choosing-passes", "one")


def at(call: str, path: str, when: str, number: int = 1) -> Fault:
    return {"call": call, "path": path, "when": when, "number": number}


MOMENTS: dict[str, tuple[Fault, int, int | None]] = {
    # The fault, the newest checkpoint then, and the committed steps, saved every 4; None: there is no run yet.
    "tokens-written": (at("fsync", r"commits/\.00000000\.tokens-00000000\.npy", "before"), 0, None),
    "tokens-committed": (at("name", r"tokens/commits/00000000\.json$", "after"), 0, None),
    "run-named": (at("name", r"runs/run$", "after"), 0, 0),
    "weights-unflushed": (at("fsync", r"\.checkpoint-3\.[^/]*tmp/model\.safetensors$", "before"), 0, 0),
    "optimizer-flushed": (at("fsync", r"\.checkpoint-3\.[^/]*tmp/training_state/optimizer", "after"), 0, 0),
    "checkpoint-unnamed": (at("name", r"out/checkpoint-3$", "before"), 0, 0),
    "checkpoint-named": (at("name", r"out/checkpoint-3$", "after"), 3, 0),
    "interval-unflushed": (at("fsync", r"journal/00000000\.log$", "before"), 3, 0),
    "interval-committed": (at("fsync", r"journal/00000000\.log$", "after", 2), 3, 4),
    "second-checkpoint-unnamed": (at("name", r"out/checkpoint-6$", "before"), 3, 4),
    "pending-checkpoint": (at("name", r"out/checkpoint-6$", "after"), 6, 4),
    "between-interval-and-checkpoint": (at("fsync", r"journal/00000000\.log$", "after", 4), 6, 8),
    "old-checkpoint-unnamed": (at("name", r"checkpoint-3 -> .*\.old\.[^/]*tmp$", "after"), 9, 8),
    "last-interval-committed": (at("fsync", r"journal/00000000\.log$", "after", 6), 9, 12),
    "a-chunk": (at("name", r"run/score/c/0/0/0$", "before"), 9, 12),
    "record-unnamed": (at("name", r"run/commits/00000000\.json$", "before"), 9, 12),
    "last-checkpoint-unnamed": (at("name", r"out/checkpoint-12$", "before"), 9, 12),
    "last-checkpoint-named": (at("name", r"out/checkpoint-12$", "after"), 12, 12),
}
IN_A_ROW = (
    "tokens-written",
    "run-named",
    "optimizer-flushed",
    "interval-committed",
    "second-checkpoint-unnamed",
    "between-interval-and-checkpoint",
    "last-checkpoint-unnamed",
)
"""Moments of one training that is killed at each of them."""
FLUSHES = (100, 125, 150, 175)
"""Of all calls of fsync, from the first token to the last checkpoint."""


@pytest.fixture(scope="module")
def whole(gym: Gym) -> Path:
    """The folder of an uninterrupted training."""
    folder = gym.folder / "whole"
    outcome = gym.run(folder, *OPTIONS)
    assert outcome.code == 0, outcome.err
    return folder


def committed(folder: Path) -> dict[str, Any]:
    """Bytes of every file that a record names, and of the records; and the numbers of every committed step."""
    path = folder / "store" / "runs" / "run"
    records = sorted(path.glob("commits/0*.json"))
    names = [name for record in records for name in json.loads(record.read_bytes())["files"]]
    known: dict[str, Any] = {str(p.relative_to(path)): p.read_bytes() for p in (*records, *(path / n for n in names))}
    if path.exists():
        run = Store.open(folder / "store").run("run")
        for spec in run.layout.arrays():
            numbers = zip(run.committed_steps().tolist(), run.read_committed(spec.name), strict=True)
            known |= {f"{spec.name}, step {step}": values.tobytes() for step, values in numbers}
    return known


def sound(folder: Path, newest: int, steps: int | None) -> None:
    """What is there after a kill is whole: checkpoints that load, steps that verify."""
    found = checkpoints(folder / "out")
    assert [int(path.name.partition("-")[2]) for path in found][-1:] == ([newest] if newest else [])
    for path in found:
        assert read_state(path).step == int(path.name.partition("-")[2])
    if steps is None:
        assert not (folder / "store" / "runs" / "run").exists()
        return
    run = Store.open(folder / "store").run("run")
    assert run.committed_steps().tolist() == list(range(steps))
    assert journal_damage(run) == []
    report = ghoststore.verify(folder / "store")
    assert report.sound, report.damage


def ends_like(folder: Path, whole: Path) -> None:
    for file in ("model.safetensors", "training_state/optimizer.safetensors"):
        path = Path("out") / "checkpoint-12" / file
        assert same_bits(load_file(folder / path), load_file(whole / path)) == []
    runs = [Store.open(each / "store").run("run") for each in (folder, whole)]
    assert runs[0].complete
    assert same_bits(*map(arrays_of, runs)) == []
    for column in ("sample_id", "window_start", "source_row"):
        assert runs[0].rows.read(column, 0, 27).tolist() == runs[1].rows.read(column, 0, 27).tolist()
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["checkpoint-12", "checkpoint-9", "tokens"]
    assert ghoststore.verify(folder / "store").sound


def resumes(gym: Gym, folder: Path, whole: Path, newest: int) -> None:
    before = committed(folder)
    outcome = gym.run(folder, *OPTIONS, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["resumed_from"] == newest
    assert outcome.err == ""
    after = committed(folder)
    assert {name: after[name] for name in before} == before
    ends_like(folder, whole)


@pytest.mark.thin(2)
@pytest.mark.kill
@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment not in IN_A_ROW])
def test_killed(gym: Gym, whole: Path, moment: str, tmp_path: Path) -> None:
    fault, newest, steps = MOMENTS[moment]
    outcome = gym.run(tmp_path, *OPTIONS, fault=fault | {"act": "kill"})
    assert outcome.code == -9, outcome.err
    sound(tmp_path, newest, steps)
    resumes(gym, tmp_path, whole, newest)


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("number", FLUSHES)
def test_killed_at_any_flush(gym: Gym, whole: Path, number: int, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, *OPTIONS, fault=at("fsync", "", "before", number) | {"act": "kill"})
    assert outcome.code == -9, outcome.err
    again = gym.run(tmp_path, *OPTIONS)
    assert again.code == 0, again.err
    ends_like(tmp_path, whole)


@pytest.mark.kill
@pytest.mark.slow
def test_killed_again_and_again(gym: Gym, whole: Path, tmp_path: Path) -> None:
    for moment in IN_A_ROW:
        fault, newest, steps = MOMENTS[moment]
        if moment == "between-interval-and-checkpoint":
            fault = fault | {"number": 2}  # the second interval is the first that this process flushes
        outcome = gym.run(tmp_path, *OPTIONS, fault=fault | {"act": "kill"})
        assert outcome.code == -9, outcome.err
        sound(tmp_path, newest, steps)
    resumes(gym, tmp_path, whole, 9)


STOPS: dict[str, tuple[Fault, str]] = {
    # The fault that brings the signal, and how the sentence ends; a training in its steps finishes one and saves it.
    "tokens": (MOMENTS["tokens-written"][0], "before the first checkpoint: the same command starts at step 0."),
    "first-interval": (MOMENTS["interval-unflushed"][0], "of 12; the same command resumes from "),
    "checkpoint": (MOMENTS["weights-unflushed"][0], "of 12; the same command resumes from "),
    "last-checkpoint": (MOMENTS["last-checkpoint-unnamed"][0], "after step 12 of 12; the same command resumes from "),
}


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("act", ["interrupt", "terminate"])
@pytest.mark.parametrize("moment", STOPS)
def test_a_signal_saves_before_it_ends(gym: Gym, whole: Path, moment: str, act: str, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM finish the step, save a checkpoint and say so; what follows is as if none had come."""
    fault, words = STOPS[moment]
    outcome = gym.run(tmp_path, *OPTIONS, fault=fault | {"act": act})
    assert outcome.code == {"interrupt": 130, "terminate": 143}[act]
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith({"interrupt": "Interrupted", "terminate": "Terminated"}[act])
    assert words in line
    newest = max([int(path.name.partition("-")[2]) for path in checkpoints(tmp_path / "out")], default=0)
    if moment == "tokens":
        assert newest == 0
    else:
        assert line.endswith(str(tmp_path / f"out/checkpoint-{newest}"))
        run = Store.open(tmp_path / "store").run("run")
        assert run.steps == newest // 4 * 4  # the rest is in the checkpoint
    resumes(gym, tmp_path, whole, newest)


SECOND = """
import os, signal, sys, threading, time
import indexer.training.loop
import ghoststore.interrupts
ghoststore.interrupts.SAME = 0.0
real = indexer.training.loop.Trainer.step

def step(self, number):
    if number == 5:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        sys.exit("the second signal was not heard")
    return real(self, number)

indexer.training.loop.Trainer.step = step
import ghoststore.cli
ghoststore.cli.main({words!r})
"""


@pytest.mark.kill
@pytest.mark.slow
def test_a_second_signal_ends_at_once(gym: Gym, whole: Path, tmp_path: Path) -> None:
    outcome = gym.lab.run(code=SECOND.format(words=["train", *gym.words(tmp_path, *OPTIONS)]))
    assert outcome.code == 143
    assert outcome.err.strip() == (
        f"Terminated. The same command resumes from {tmp_path}/out/checkpoint-3; committed scores of later steps stay"
    )
    sound(tmp_path, 3, 4)
    resumes(gym, tmp_path, whole, 3)


@pytest.mark.kill
@pytest.mark.slow
def test_a_signal_where_val_gradients_last(gym: Gym, tmp_path: Path) -> None:
    """Training goes on to the step where the next one is due: those that follow are scored as if no signal had come."""
    options = (*OPTIONS, "--val-refresh-interval", 5, "--checkpoint-interval", 12)
    options = tuple(map(str, options))
    assert gym.run(tmp_path / "whole", *options).code == 0
    folder = tmp_path / "stopped"
    # After step 8, by the thread that writes: the one that trains may be some steps further when it hears of it.
    fault = at("fsync", r"journal/00000000\.log$", "before", 3) | {"act": "interrupt"}
    assert gym.run(folder, *options, fault=fault).code == 130
    assert checkpoints(folder / "out")[-1].name in ("checkpoint-10", "checkpoint-15")
    assert gym.run(folder, *options).code == 0
    runs = [Store.open(each / "store").run("run") for each in (folder, tmp_path / "whole")]
    assert same_bits(*map(arrays_of, runs)) == []


def test_nothing_to_do(gym: Gym, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    outcome = gym.run(folder, *OPTIONS, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.json["resumed_from"] == outcome.json["steps"] == 12
    assert outcome.json["train_loss"] is None
    assert outcome.json["val_loss"] > 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_from_an_earlier_checkpoint(gym: Gym, whole: Path, tmp_path: Path) -> None:
    """The newest was removed: its steps are made again, the committed ones dropped."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(folder / "out" / "checkpoint-12")
    resumes(gym, folder, whole, 9)


def test_another_output_dir(gym: Gym, whole: Path, tmp_path: Path) -> None:
    """From the beginning, into the run that is complete: nothing of it changes."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    before = committed(folder)
    shutil.rmtree(folder / "out")
    assert gym.run(folder, *OPTIONS).code == 0
    assert committed(folder) == before
    ends_like(folder, whole)


def test_another_store(gym: Gym, whole: Path, tmp_path: Path) -> None:
    """Checkpoints without the store they wrote to: training goes on, and says what the run lacks."""
    folder = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(folder / "store")
    shutil.rmtree(folder / "out" / "checkpoint-12")
    outcome = gym.run(folder, *OPTIONS)
    assert outcome.code == 0
    assert "note: run 'run' lacks steps 1 to 8, and training goes on after them" in outcome.err
    run, complete = (Store.open(each / "store").run("run") for each in (folder, whole))
    assert run.committed_steps().tolist() == [8, 9, 10, 11]
    np.testing.assert_array_equal(run.read_committed("score"), complete.read_committed("score")[8:])


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "moment"),
    [
        (("--train-dtype", "float16"), "last-checkpoint-unnamed"),
        (("--score", "sketched"), "interval-committed"),
        (("--checkpoint", "dropout"), "between-interval-and-checkpoint"),
        *((CHOOSING, moment) for moment in ("interval-committed", "pending-checkpoint", "record-unnamed")),
        (ONE_PASS, "interval-committed"),
        ((*CHOOSING, "--score-metric", "adam"), "between-interval-and-checkpoint"),
        ((*CHOOSING, "--policy", "random", "--checkpoint", "dropout"), "between-interval-and-checkpoint"),
    ],
)
def test_other_trainings_resume_too(gym: Gym, options: tuple[str, ...], moment: str, tmp_path: Path) -> None:
    """With a loss scaler, a sketch, the dropout of a checkpoint, candidates."""
    if "--checkpoint" in options:
        options = (*options[:-1], str(gym.models[options[-1]]))
    uninterrupted = gym.folder / "whole-others" / "-".join(options).replace("/", "")
    if not uninterrupted.exists():
        assert gym.run(uninterrupted, *options).code == 0
    assert gym.run(tmp_path, *options, fault=MOMENTS[moment][0] | {"act": "kill"}).code == -9
    assert gym.run(tmp_path, *options).code == 0
    ends_like(tmp_path, uninterrupted)
