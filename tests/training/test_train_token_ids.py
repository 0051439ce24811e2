"""Val sets and corpora of token ids: nanoGPT's ``.bin`` files, and shards that ``tokenize`` made of them."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import ghoststore
from ghoststore import Fields
from ghoststore.errors import UsageError
from ghoststore.store import Store
from indexer.projection import draws
from tests.support.nanogpt import write_stream
from tests.support.train_oracle import gradient_of, loss_of, model_at
from tests.support.trainings import arrays_of, same_bits

if TYPE_CHECKING:
    from tests.conftest import Lab

LENGTH, VAL_IDS = 12, 50
"""The last of the five val windows is shorter."""
TRAINING: dict[str, Any] = {
    "batch_size": 3,
    "max_steps": 4,
    "learning_rate": 5e-3,
    "val_batch_size": 2,
    "val_refresh_interval": 1,
    "max_length": LENGTH,
    "checkpoint_interval": 1,
    "keep_checkpoints": None,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ids")
    generator = np.random.default_rng(2)
    write_stream(folder / "train.bin", generator.integers(1, 280, 200))
    write_stream(folder / "val.bin", generator.integers(1, 280, VAL_IDS))
    return folder


def train(lab: Lab, folder: Path, name: str, data: Path, val_set: Path, **options: Any) -> dict[str, np.ndarray]:
    """The arrays of the run of a training."""
    ghoststore.train(
        data=data,
        val_set=val_set,
        checkpoint=lab.checkpoint,
        store=folder / "store",
        name=name,
        output_dir=folder / name,
        **TRAINING,
        **options,
    )
    return arrays_of(Store.open(folder / "store").run(name))


@pytest.fixture(scope="module")
def arrays(lab: Lab, files: Path) -> dict[str, np.ndarray]:
    return train(lab, files, "run", files / "train.bin", files / "val.bin", tokenizer=lab.checkpoint)


def windows(path: Path) -> list[list[int]]:
    ids = np.fromfile(path, "<u2").tolist()
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - 1, LENGTH - 1)]


def test_scores_are_those_of_autograd(lab: Lab, files: Path, arrays: dict[str, np.ndarray]) -> None:
    """Each window of ``val.bin`` is a val row, and each of ``train.bin`` a training row."""
    val, rows = windows(files / "val.bin"), windows(files / "train.bin")
    assert [len(window) for window in val] == [12, 12, 12, 12, 6]
    order = draws.permutation("ghoststore/1|val order|seed=0", len(val))
    run = Store.open(files / "store").run("run")
    assert run.rows.read("sample_id", 0, len(rows)).tolist() == [f"train.bin:{11 * i}" for i in range(len(rows))]
    for step in range(4):
        model = model_at(files / "run" / f"checkpoint-{step}" if step else lab.checkpoint)
        chosen = [int(order[(2 * step + place) % len(val)]) for place in range(2)]
        each = [gradient_of(model, loss_of(model, val[place], 1)) for place in chosen]
        mean = {name: torch.stack([gradient[name] for gradient in each]).mean(0) for name in each[0]}
        size = math.sqrt(sum(float(g.square().sum()) for g in mean.values()))
        for place, row in enumerate(arrays["sample"][step, 0].tolist()):
            gradient = gradient_of(model, loss_of(model, rows[row], 1))
            own = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
            expected = sum(float((gradient[name] * mean[name]).sum()) for name in mean)
            assert abs(float(arrays["score"][step, 0, place]) - expected) < 1e-6 * own * size


def test_shards_of_the_same_ids_give_the_same_bits(lab: Lab, files: Path, arrays: dict[str, np.ndarray]) -> None:
    """Their tokenizer is beside them, so none has to be given."""
    for name in ("train", "val"):
        ghoststore.tokenize(
            data=files / f"{name}.bin",
            tokenizer=lab.checkpoint,
            out=files / f"{name}-shards",
            fields=Fields(ids_window=LENGTH),
        )
    of_shards = train(lab, files, "shards", files / "train-shards", files / "val-shards")
    assert same_bits(arrays, of_shards) == []


def test_ids_of_nobody_are_refused(lab: Lab, files: Path, tmp_path: Path) -> None:
    """The tokenizer of the checkpoint is not taken for theirs, unless it is given. The advice helps."""
    for data, val in ((lab.corpus, files / "val.bin"), (files / "train.bin", lab.corpus)):
        with pytest.raises(UsageError, match="nothing says which tokenizer made them: give `tokenizer`"):
            train(lab, tmp_path, "none", data, val)


def test_commands(lab: Lab, files: Path, tmp_path: Path) -> None:
    """What the command names next runs."""
    words: list[str | Path] = ["train", "--data", files / "train.bin", "--val-set", files / "val.bin"]
    words += ["--checkpoint", lab.checkpoint, "--tokenizer", lab.checkpoint, "--store", tmp_path / "store"]
    words += ["--output-dir", tmp_path / "out", "--max-steps", "2", "--device", "cpu"]
    trained = lab.run(*words)
    assert trained.code == 0, trained.err
    assert trained.err.count("windows of 32 tokens") == trained.err.count("taken for those of the tokenizer") == 2
    build = next(line for line in trained.out.splitlines() if "ghoststore build" in line)
    built = lab.run(*shlex.split(build)[1:])
    assert built.code == 0, built.err
