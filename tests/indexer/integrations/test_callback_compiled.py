"""transformers' Trainer with torch_compile: the scores and the weights of one that compiles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ghoststore import Choosing
from tests.support.loops import run_of, weights_of
from tests.support.models import gpt2
from tests.support.trainers import callback_of, hooks_of, trainer_of

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Settings of the Trainer, and of the callback.
    "accumulation-evaluation": (
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"per_layer": True, "val_refresh_interval": 2},
    ),
    "bf16": ({"bf16": True}, {}),
    "chosen": ({}, {"choosing": Choosing(keep=2)}),
}


def without_dropout() -> Any:
    return gpt2(layers=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_trainer(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"BACKEND": "no", "MODE": "default"}.items():  # TrainingArguments sets them for good
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{variable}", value)
    settings, of_callback = CASES[name]
    runs, weights = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        folder = tmp_path / str(compiled)
        given = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = trainer_of(
            folder,
            [callback_of(folder / "store", name="run", **of_callback)],
            model=without_dropout(),
            **{"max_steps": 4, "learning_rate": 1e-3, **settings, **given},
        )
        trainer.train()
        runs.append(run_of(folder / "store", "run"))
        weights.append(weights_of(trainer.model))
        assert not hooks_of(trainer.model)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    torch._dynamo.reset()
    near = 0.05 if name == "bf16" else 1e-4
    for array in ("sample", *(("weight",) if name == "chosen" else ())):
        np.testing.assert_array_equal(runs[1].read_committed(array), runs[0].read_committed(array))
    for array in ("score", "train_loss", *(("block_score",) if "per_layer" in of_callback else ())):
        expected = runs[0].read_committed(array)
        scale = float(np.nanmax(np.abs(expected)))
        np.testing.assert_allclose(runs[1].read_committed(array), expected, rtol=near, atol=near * scale)
    for parameter, expected in weights[0].items():
        torch.testing.assert_close(weights[1][parameter], expected, rtol=0, atol=2e-2 if name == "bf16" else 1e-4)
