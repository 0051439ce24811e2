"""Small trainings for the tests: real files, the lab's tiny model, a corpus with prompts, long rows and domains."""

from __future__ import annotations

import json
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

import ghoststore
from ghoststore.store import Run, Store

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

TIMES = ("seconds", "score_seconds")
"""Arrays of a run that no two runs have the same."""
BASE: dict[str, Any] = {
    "batch_size": 3,
    "max_steps": 20,
    "learning_rate": 5e-3,
    "val_batch_size": 3,
    "val_refresh_interval": 1,
    "eval_interval": 10,
    "dot_prod_save_interval": 4,
    "name": "run",
    "device": "cpu",
}


def words(rng: random.Random, count: int) -> str:
    from tests.conftest import WORDS

    return " ".join(rng.choices(WORDS, k=count))


def prompt_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a prompt, a completion and one of three domains; some longer than 12 tokens."""
    rng = random.Random(seed)
    return [
        {
            "id": f"pair-{i}",
            "domain": ("law", "code", "news")[i % 3],
            "prompt": words(rng, rng.randint(1, 4)),
            "completion": " " + words(rng, rng.randint(1, 9)),
        }
        for i in range(count)
    ]


@dataclass
class Trained:
    """A finished training."""

    output: Path
    store: Path
    report: Any

    def weights(self, step: int | None = None) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoint(step) / "model.safetensors")

    def optimizer(self, step: int | None = None) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoint(step) / "training_state" / "optimizer.safetensors")

    def checkpoint(self, step: int | None = None) -> Path:
        return self.output / f"checkpoint-{self.report.steps if step is None else step}"

    @property
    def run(self) -> Run:
        return Store.open(self.store).run("run")

    def rows(self, column: str) -> list[Any]:
        """A column of the row table."""
        return self.run.rows.read(column, 0, self.run.layout.rows).tolist()

    def arrays(self) -> dict[str, np.ndarray]:
        return arrays_of(self.run)


def arrays_of(run: Run) -> dict[str, np.ndarray]:
    """Every array of the committed steps, those of times aside."""
    return {s.name: run.read_committed(s.name) for s in run.layout.arrays() if s.name not in TIMES}


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in both, bit for bit (a NaN equals itself)."""
    assert one.keys() == other.keys()
    numbers = {name: (as_bytes(one[name]), as_bytes(other[name])) for name in one}
    return [name for name, (a, b) in numbers.items() if a != b]


def apart(one: Path, other: Path, start: Path) -> float:
    """How far apart training took two checkpoints: of all tensors, the most of ``|one - other| / |other - start|``.

    Norms, since Adam moves the one number whose gradient is nearly zero as far as rounding says. The biases of keys are
    left out: their gradient is exactly zero (softmax does not see a shift of all its inputs).
    """
    first, second, begun = (load_file(folder / "model.safetensors") for folder in (one, other, start))
    shares = []
    for name in first:
        off, moved = first[name] - second[name], second[name] - begun[name]
        if name.endswith("attn.c_attn.bias"):
            of_keys = slice(len(off) // 3, 2 * len(off) // 3)
            off[of_keys] = moved[of_keys] = 0
        shares.append(float(off.norm() / moved.norm()))
    return max(shares)


def as_bytes(values: Any) -> tuple[Any, bytes]:
    if isinstance(values, torch.Tensor):
        return (values.shape, values.dtype), values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (values.shape, values.dtype), values.tobytes()


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that no two trainings have otherwise: neither times, nor records with their checksums."""
    times = tuple(f"runs/run/{name}/c/" for name in TIMES)
    return {name: data for name, data in files.items() if not name.startswith((*times, "runs/run/commits/"))}


def in_two(lab: Lab, code: str, **variables: Any) -> list[Outcome]:
    """Two forked processes that run ``code``, each with the environment of its rank and ``variables``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in (0, 1):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **variables,
        }
        set_up = "\n".join(f"os.environ[{name!r}] = {str(value)!r}" for name, value in environment.items())
        started.append(lab.start(code=f"import os\n{set_up}\n{code}"))
    return [lab.wait(pid) for pid in started]


def ranks(lab: Lab, code: str, words: list[str]) -> list[Outcome]:
    """Two forked processes of one process group, each of which runs ``code`` and then the command line."""
    return in_two(lab, f"{code}\nimport ghoststore.cli\nghoststore.cli.main({['train', *words]!r})")


@dataclass
class Gym:
    """Trains each thing once a session."""

    lab: Lab
    folder: Path
    data: dict[str, Path]
    models: dict[str, Path]
    done: dict[str, Trained] = field(default_factory=dict)

    def train(self, corpus: str = "plain", model: str | None = "tiny", **options: Any) -> Trained:
        """A training in this process; the same options are trained once."""
        key = json.dumps([corpus, model, options], sort_keys=True, default=str)
        if key not in self.done:
            folder = self.folder / f"trained-{len(self.done)}"
            self.done[key] = self.fresh(folder, corpus, model, **options)
        return self.done[key]

    def fresh(self, folder: Path, corpus: str = "plain", model: str | None = "tiny", **options: Any) -> Trained:
        """A training in this process, into ``folder``."""
        given = {**BASE, "data": self.data[corpus], "val_set": self.data[f"{corpus}-val"], **options}
        if model is not None:
            given["checkpoint"] = self.models[model]
        given.setdefault("output_dir", folder / "out")
        given.setdefault("store", folder / "store")
        report = ghoststore.train(**given)
        return Trained(Path(given["output_dir"]), Path(given["store"] or folder), report)

    def words(self, folder: Path, *options: str | Path, corpus: str = "plain") -> list[str]:
        """The words of a command line that trains 12 steps into ``folder``; later options win."""
        given = [
            "--data",
            self.data[corpus],
            "--val-set",
            self.data[f"{corpus}-val"],
            "--checkpoint",
            self.models["tiny"],
            "--output-dir",
            folder / "out",
            "--store",
            folder / "store",
            "--name",
            "run",
            "--batch-size",
            3,
            "--max-steps",
            12,
            "--learning-rate",
            5e-3,
            "--val-batch-size",
            3,
            "--val-refresh-interval",
            2,
            "--eval-interval",
            6,
            "--checkpoint-interval",
            3,
            "--dot-prod-save-interval",
            4,
            "--device",
            "cpu",
        ]
        words = [str(word) for word in (*given, "--quiet")]
        if "--data" in options:  # which may be repeated, and would be read as well
            place = words.index("--data")
            del words[place : place + 2]
        return [*words, *map(str, options)]

    def run(self, folder: Path, *options: str | Path, corpus: str = "plain", **order: Any) -> Outcome:
        """That command line in a process of its own, which may be killed."""
        return self.lab.run("train", *self.words(folder, *options, corpus=corpus), **order)

    def start(self, folder: Path, *options: str | Path, **order: Any) -> int:
        return self.lab.start("train", *self.words(folder, *options), **order)


def with_dropout(model: Any, tokenizer: Any) -> None:
    """Saved with the model: what a GPT-2 of the hub has."""
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, 0.2)


def open_gym(lab: Lab, folder: Path) -> Gym:
    """A gym with corpora and models in ``folder``."""
    rng = random.Random(5)
    long_rows = [
        {"id": f"long-{i}", "text": words(rng, rng.randint(1, 40)), "domain": ("sky", "earth")[i % 2]}
        for i in range(24)
    ]
    rows = {
        "plain": lab.rows,
        "plain-val": lab.sample_rows(7, seed=3),
        "prompts": prompt_rows(30),
        "prompts-val": prompt_rows(8, seed=1),
        "long": long_rows,
        "long-val": lab.sample_rows(7, seed=3),
    }
    data = {name: lab.write(folder / f"{name}.jsonl", some) for name, some in rows.items()}
    models = {
        "tiny": lab.checkpoint,
        "two": lab.model(folder / "two", layers=2, seed=1),
        "dropout": lab.model(folder / "dropout", layers=2, seed=1, change=with_dropout),
    }
    return Gym(lab=lab, folder=folder, data=data, models=models)
