"""What happens around the store and the output folder: a full disk, a second training, other settings, damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

import ghoststore
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import Store
from indexer.training.state import checkpoints
from tests.support.trainings import Trained, arrays_of, same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym

FULL = {"call": "fsync", "path": r"journal/00000000\.log", "when": "before", "number": 3, "act": "ENOSPC"}
"""The second save interval of four steps cannot be written."""


@pytest.fixture(scope="module")
def whole(gym: Gym) -> Path:
    """The folder of an uninterrupted training."""
    folder = gym.folder / "whole-plain"
    outcome = gym.run(folder, "--keep-checkpoints", "all")
    assert outcome.code == 0, outcome.err
    return folder


def weights(folder: Path, step: int = 12) -> dict[str, Any]:
    return load_file(folder / "out" / f"checkpoint-{step}" / "model.safetensors")


def run_of(folder: Path) -> Any:
    return Store.open(folder / "store").run("run")


def test_the_store_is_full_and_training_stops(gym: Gym, whole: Path, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, fault=FULL)
    assert outcome.code == 6
    assert outcome.out == ""
    assert "cannot write steps 4 to 8 of" in outcome.err
    assert "no space is left on the device; free some" in outcome.err
    assert "Traceback" not in outcome.err
    assert run_of(tmp_path).ranges == [(0, 4)]
    assert ghoststore.verify(tmp_path / "store").sound
    again = gym.run(tmp_path, "--keep-checkpoints", "all", "--json")
    assert again.code == 0, again.err
    assert again.json["resumed_from"] == 6
    assert same_bits(weights(tmp_path), weights(whole)) == []
    assert same_bits(arrays_of(run_of(tmp_path)), arrays_of(run_of(whole))) == []


@pytest.mark.kill
@pytest.mark.slow
def test_the_store_is_full_and_training_continues(gym: Gym, whole: Path, tmp_path: Path) -> None:
    """The weights are those of a run that could be written; what the run lacks can be seen."""
    options = ("--on-store-error", "continue", "--keep-checkpoints", "all")
    outcome = gym.run(tmp_path, *options, "--json", fault=FULL)
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == 12
    (note,) = outcome.err.strip().splitlines()
    assert note.startswith("note: cannot write steps 4 to 8 of ")
    assert note.endswith("Training goes on without scores in the store (--on-store-error continue)")
    assert same_bits(weights(tmp_path), weights(whole)) == []
    assert run_of(tmp_path).ranges == [(0, 4)]
    # It is finished: nothing more comes, and that is said.
    again = gym.run(tmp_path, *options)
    assert again.code == 0, again.err
    assert "note: run 'run' lacks steps 5 to 12, and training goes on after them" in again.err
    # From a checkpoint after the error there is a gap; the scores after it are right.
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    resumed = gym.run(tmp_path, *options)
    assert resumed.code == 0, resumed.err
    assert "note: run 'run' lacks steps 5 to 9, and training goes on after them" in resumed.err
    run, complete = run_of(tmp_path), run_of(whole)
    assert run.committed_steps().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert (run.read_committed("sample")[4] == -1).all()
    steps = [0, 1, 2, 3, 9, 10, 11]
    found, expected = run.read_committed("score"), complete.read_committed("score")
    np.testing.assert_array_equal(found[[0, 1, 2, 3, 5, 6, 7]], expected[steps])
    assert same_bits(weights(tmp_path), weights(whole)) == []


@pytest.mark.slow
@pytest.mark.kill
def test_the_disk_of_the_checkpoints_is_full(gym: Gym, whole: Path, tmp_path: Path) -> None:
    fault = {"call": "fsync", "path": r"\.checkpoint-6\.[^/]*tmp/model", "when": "before", "act": "ENOSPC"}
    for options in ((), ("--on-store-error", "continue")):
        outcome = gym.run(tmp_path, *options, fault=fault)
        assert outcome.code == 6
        assert f"cannot write {tmp_path}/out/checkpoint-6: no space is left" in outcome.err
        assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    assert gym.run(tmp_path).code == 0
    assert same_bits(weights(tmp_path), weights(whole)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for a few checkpoints, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1100k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.kill
@pytest.mark.slow
def test_a_full_disk(gym: Gym, small_disk: Path, tmp_path: Path) -> None:
    """A real one, that fills with checkpoints: those before are whole."""
    out = small_disk / "out"
    outcome = gym.run(tmp_path, "--output-dir", out, "--keep-checkpoints", "all", "--checkpoint-interval", "1")
    assert outcome.code == 6, outcome.err
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("Error: cannot write")
    assert "no space is left" in line.lower() or "no space left" in line.lower()
    there = checkpoints(out)
    assert there
    assert not list(out.glob(".*.tmp"))
    for path in there[:-1]:
        shutil.rmtree(path)
    again = gym.run(tmp_path, "--output-dir", out, "--keep-checkpoints", "1", "--checkpoint-interval", "1")
    assert again.code == 0, again.err


# Two at once.


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("other", ["output", "run"])
def test_two_trainings_at_once(gym: Gym, whole: Path, other: str, tmp_path: Path) -> None:
    """The second is refused, whether it shares the output folder or the run, and harms nothing."""
    fault = {"call": "fsync", "path": r"\.checkpoint-6\.[^/]*tmp/model", "when": "before", "act": "stop"}
    first = gym.start(tmp_path, "--keep-checkpoints", "all", fault=fault)
    gym.lab.stopped(first)
    before = gym.lab.tree(tmp_path)
    options = ("--store", tmp_path / "other") if other == "output" else ("--output-dir", tmp_path / "other")
    second = gym.run(tmp_path, *options)
    assert second.code == 5
    what = f"--output-dir {tmp_path}/out" if other == "output" else "run 'run'"
    option = "--output-dir" if other == "output" else "--name"
    assert second.err.startswith(
        f"Error: {what} is being written by another process; wait for it, or choose another {option}. It is process "
        f"{first} on "
    )
    assert {name: data for name, data in gym.lab.tree(tmp_path).items() if not name.startswith("other")} == before
    os.kill(first, signal.SIGCONT)
    outcome = gym.lab.wait(first)
    assert outcome.code == 0, outcome.err
    assert same_bits(weights(tmp_path), weights(whole)) == []
    assert same_bits(arrays_of(run_of(tmp_path)), arrays_of(run_of(whole))) == []


def test_two_trainings_started_together(gym: Gym, whole: Path, tmp_path: Path) -> None:
    started = [gym.start(tmp_path, "--keep-checkpoints", "all") for _ in range(2)]
    codes = [gym.lab.wait(pid).code for pid in started]
    assert codes in ([0, 5], [5, 0], [0, 0])
    assert same_bits(weights(tmp_path), weights(whole)) == []


# Other settings.

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 7}, r"training\.seed: stored 0, asked for 7"),
    "batch": ({"batch_size": 2}, r"training\.batch_size: stored 3, asked for 2"),
    "steps": ({"max_steps": 7}, r"training\.max_steps: stored 6, asked for 7"),
    "learning-rate": ({"learning_rate": 1e-3}, r"training\.learning_rate: stored 0\.005, asked for 0\.001"),
    "method": ({"method": "Regular"}, r"scoring\.method: stored 'GradDotProd', asked for 'Regular'"),
    "dtype": ({"train_dtype": "bfloat16"}, r"training\.train_dtype: stored 'float32', asked for 'bfloat16'"),
    "val": ({"val_set": "prompts-val"}, r"val\.fingerprint: stored '\w+:?\w+', asked for '\w+:?\w+'"),
    "checkpoint": ({"model": "two"}, r"model\.(checkpoint|config|parameters)\S*: stored .*, asked for "),
    "domains": ({"domains": ("sky",)}, r"corpus\.only_domains: stored None, asked for \['sky'\]"),
    "interval": ({"dot_prod_save_interval": 3}, r"storage\.save_steps: stored 4, asked for 3"),
    "layers": ({"per_layer": True}, r"scoring\.per_layer: stored False, asked for True"),
    "max-length": ({"max_length": 16}, r"training\.max_length: stored 32, asked for 16"),
}


@pytest.fixture(scope="module")
def short(gym: Gym) -> Trained:
    """Six steps, not to be changed."""
    return gym.fresh(gym.folder / "short", max_steps=6, checkpoint_interval=3)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("where", "name"), [*(("output", name) for name in OTHERS), *(("run", name) for name in ("seed", "val", "layers"))]
)
def test_other_settings(gym: Gym, short: Trained, name: str, where: str, tmp_path: Path) -> None:
    """Refused with both values, by the checkpoints as by the run; nothing is touched."""
    options, message = OTHERS[name]
    given = {"max_steps": 6, "checkpoint_interval": 3, **options}
    if "val_set" in given:
        given["val_set"] = gym.data[given["val_set"]]
    given |= {"output_dir": short.output} if where == "output" else {"store": short.store}
    before = gym.lab.tree(gym.folder / "short")
    with pytest.raises(MismatchError, match=message) as caught:
        gym.fresh(tmp_path, **given)
    assert ("another `output_dir`" if where == "output" else "another `name`") in str(caught.value)
    assert gym.lab.tree(gym.folder / "short") == before


@pytest.mark.slow
def test_another_corpus(gym: Gym, short: Trained, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint: stored .*, asked for ") as caught:
        gym.fresh(tmp_path, "long", max_steps=6, checkpoint_interval=3, output_dir=short.output)
    assert "another `output_dir` for a new folder" in str(caught.value)
    with pytest.raises(MismatchError, match=r"corpus\.fingerprint: stored .*, asked for "):
        gym.fresh(tmp_path, "long", max_steps=6, checkpoint_interval=3, store=short.store)


# Damage.


def flip(path: Path, place: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


HARMS: dict[str, tuple[Any, str]] = {
    "weights-flipped": (lambda at: flip(at / "model.safetensors"), r"model\.safetensors is not what was written"),
    "weights-cut": (lambda at: cut(at / "model.safetensors"), r"model\.safetensors is not what was written"),
    "weights-gone": (lambda at: (at / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "config-changed": (lambda at: flip(at / "config.json"), r"config\.json is not what was written"),
    "optimizer-cut": (lambda at: cut(at / "training_state/optimizer.safetensors"), r"optimizer\.safetensors is not"),
    "optimizer-flipped": (lambda at: flip(at / "training_state/optimizer.safetensors"), r"optimizer\.safetensors is"),
    "pending-gone": (
        lambda at: (at / "training_state/pending.safetensors").unlink(),
        r"pending\.safetensors is missing",
    ),
    "state-flipped": (lambda at: flip(at / "training_state/state.json", 200), r"state\.json is damaged"),
    "state-cut": (lambda at: cut(at / "training_state/state.json"), r"state\.json is damaged"),
    "state-gone": (lambda at: (at / "training_state/state.json").unlink(), r"state\.json is missing"),
    "state-nonsense": (lambda at: (at / "training_state/state.json").write_text("[1]"), r"state\.json is damaged"),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", HARMS)
def test_a_damaged_checkpoint(gym: Gym, short: Trained, name: str, tmp_path: Path) -> None:
    """Named, and nothing is overwritten; without it training goes on from the one before."""
    harm, message = HARMS[name]
    shutil.copytree(short.output.parent, tmp_path / "copy")
    output = tmp_path / "copy" / "out"
    harm(output / "checkpoint-6")
    before = gym.lab.tree(tmp_path)
    with pytest.raises(CorruptError, match=message) as caught:
        gym.fresh(tmp_path / "copy", max_steps=6, checkpoint_interval=3)
    assert f"remove {output / 'checkpoint-6'} to go on from an earlier" in str(caught.value)
    assert caught.value.exit_code == 4
    assert gym.lab.tree(tmp_path) == before
    if name in ("weights-flipped", "state-gone"):
        shutil.rmtree(output / "checkpoint-6")
        again = gym.fresh(tmp_path / "copy", max_steps=6, checkpoint_interval=3)
        assert again.report.resumed_from == 3
        assert same_bits(again.weights(), short.weights()) == []


def test_who_may_read_one_file_of_a_checkpoint_may_read_all(short: Trained) -> None:
    """safetensors 0.8 makes files that their owner alone may read."""
    assert len({path.stat().st_mode for path in short.checkpoint().rglob("*") if path.is_file()}) == 1


def test_every_flipped_byte_of_the_state_is_seen(gym: Gym, short: Trained, tmp_path: Path) -> None:
    from indexer.training.state import read_state

    checkpoint = Path(shutil.copytree(short.checkpoint(), tmp_path / "checkpoint-6"))
    path = checkpoint / "training_state" / "state.json"
    data = path.read_bytes()
    accepted = []
    for place in range(0, len(data), 17):
        changed = bytearray(data)
        changed[place] ^= 2
        path.write_bytes(changed)
        try:
            read_state(checkpoint)
            accepted.append(bytes(data[place : place + 1]))
        except GhostStoreError:
            pass
    assert set(accepted) <= {b" ", b"\n"}  # between values: nothing that it says is another


@pytest.mark.slow
def test_a_folder_of_something_else(gym: Gym, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(gym.models["tiny"], output / "checkpoint-500")  # another trainer's
    with pytest.raises(UsageError, match=r"checkpoint-500 was not written by `ghoststore train`.*another `output_dir`"):
        gym.fresh(tmp_path, max_steps=2)
    shutil.rmtree(output)
    (output / "tokens").mkdir(parents=True)
    (output / "tokens" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"`output_dir=.*tokens` is there and holds no token shards"):
        gym.fresh(tmp_path, max_steps=2)
    assert [str(path.relative_to(output)) for path in output.rglob("*")] == ["tokens", "tokens/mine.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"`output_dir=.*/file` is a file"):
        gym.fresh(tmp_path, max_steps=2, output_dir=tmp_path / "file")
    with pytest.raises(UsageError, match="is not a store"):
        gym.fresh(tmp_path, max_steps=2, store=output)


def test_other_software_is_noted(gym: Gym, short: Trained, tmp_path: Path) -> None:
    from ghoststore.store.base.records import json_digest
    from tests.support.notes import Notes

    shutil.copytree(short.output.parent, tmp_path / "copy")
    path = tmp_path / "copy" / "out" / "checkpoint-6" / "training_state" / "state.json"
    state = json.loads(path.read_text())
    state["software"]["torch"] = "2.10.0"
    del state["sha256"]
    state["sha256"] = json_digest(state)
    path.write_text(json.dumps(state))
    notes = Notes()
    gym.fresh(tmp_path / "copy", max_steps=6, checkpoint_interval=3, progress=notes)
    (note,) = notes.said
    assert note.startswith("going on with other software than wrote checkpoint-6")
    assert "2.10.0" in note
