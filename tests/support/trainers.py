"""transformers' Trainer on the shared rows, with the callback or without: what its tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ghoststore import GhostStoreCallback
from tests.support.loops import (
    ROWS,
    VAL_BATCH,
    weights_of,
)
from tests.support.models import gpt2

STEPS = 21
"""Of 14 rows in batches of 4: five epochs and a bit; the last batch of each has 2."""


class StopAt(TrainerCallback):
    """Training stops after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def hooks_of(model: Any) -> list[str]:
    """Our own hooks; checkpointing has one of transformers'."""
    kinds = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    found = [hook.__module__ for pair in kinds for hooks in pair for hook in hooks.values()]
    return [module for module in found if module.startswith("indexer")]


def dataset(*, sample: bool = True, start: int = 0) -> Dataset:
    rows: dict[str, Any] = {
        "input_ids": [ids.tolist() for ids, _ in ROWS],
        "labels": [labels.tolist() for _, labels in ROWS],
    }
    if sample:
        rows["sample"] = list(range(start, start + len(ROWS)))
    return Dataset.from_dict(rows)


def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads ids and labels on the right; passes ``sample`` on."""
    length = max(len(row["input_ids"]) for row in features)
    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in features]
    batch = {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in features]),
        "labels": torch.tensor([row["labels"] + [-100] * (length - len(row["labels"])) for row in features]),
        "attention_mask": torch.tensor(mask),
    }
    if "sample" in features[0]:
        batch["sample"] = torch.tensor([row["sample"] for row in features])
    return batch


class Watcher(TrainerCallback):
    """What every step's weights were, before it; and the learning rate that it was made with."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.evaluations: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del self.weights[state.global_step :], self.rates[state.global_step :]
        self.weights.append(weights_of(kwargs["model"]))
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.evaluations.append(metrics["eval_loss"])


def callback_of(store: Path, **settings: Any) -> GhostStoreCallback:
    given = {"val_data": VAL_BATCH, "samples": len(ROWS), "dot_prod_save_interval": 4, **settings}
    return GhostStoreCallback(store=store, **given)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 50,
        "optim": "adamw_torch",
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder / "out"), **{**given, **settings})


def trainer_of(
    folder: Path, callbacks: list[Any], *, model: Any = None, trainer: type = Trainer, **settings: Any
) -> Any:
    own = {key: settings.pop(key) for key in ("compute_loss_func", "data_collator") if key in settings}
    rows = settings.pop("rows", None) or dataset()
    evaluation = settings.pop("eval_rows", dataset() if "eval_strategy" in settings else None)
    torch.manual_seed(0)
    return trainer(
        model=model or gpt2(),
        args=arguments(folder, **settings),
        train_dataset=rows,
        eval_dataset=evaluation,
        callbacks=callbacks,
        **{"data_collator": collate, **own},
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation of a ragged epoch": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "clipping": {"max_grad_norm": 0.05},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
    "by epoch": {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 6},
}
