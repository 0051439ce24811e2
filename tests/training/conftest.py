"""The gym: trainings that the tests share."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.trainings import Gym, prompt_rows, words

if TYPE_CHECKING:
    from tests.conftest import Lab


def with_dropout(model: Any, tokenizer: Any) -> None:
    """Saved with the model: what a GPT-2 of the hub has."""
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(model.config, name, 0.2)


@pytest.fixture(scope="session")
def gym(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Gym:
    folder = tmp_path_factory.mktemp("gym")
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
