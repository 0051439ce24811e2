"""Trainings that the callback cannot score, and errors in the middle of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from ghoststore import ProjectionConfig
from ghoststore.errors import BusyError, StorageError, UsageError
from indexer.encode.losses import next_token_losses
from indexer.integrations.refused import refuse_arguments
from tests.support.loops import (
    identical,
    run_of,
    weights_of,
)
from tests.support.models import bert_masked, gpt2
from tests.support.trainers import (
    callback_of,
    dataset,
    hooks_of,
    trainer_of,
)


@pytest.mark.slow
def test_an_error_in_training_and_close(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("mine")

    callback = callback_of(tmp_path / "store")
    trainer = trainer_of(tmp_path, [callback, Fail()])
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    with pytest.raises(BusyError):
        trainer_of(tmp_path, [callback_of(tmp_path / "store")]).train()
    callback.close()
    callback.close()
    assert not hooks_of(trainer.model)
    trainer_of(tmp_path, [callback_of(tmp_path / "store")]).train()
    assert run_of(tmp_path / "store", "trainer").complete


class OtherLoss(Trainer):
    """A loss of its own, from the model's logits."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return outputs.logits.square().mean()


class Half(torch.nn.Module):
    """A model that makes something else of its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt2()

    def forward(self, **batch: Any) -> Any:
        output = self.inner(**batch)
        return {"loss": output.loss / 2, "logits": output.logits}


class Lossless(Half):
    def forward(self, **batch: Any) -> Any:
        return {"logits": self.inner(**batch).logits}


def losses_of(model: Any, batch: Any) -> Tensor:
    return next_token_losses(model(**batch)["logits"], batch["labels"])[0]


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return next_token_losses(outputs.logits, labels)[0].mean()


def classified() -> Any:
    return Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [0, 1, 0, 1], "sample": [0, 1, 2, 3]})


def classifier() -> Any:
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return BertForSequenceClassification(config)


def stack(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in features]) for key in features[0]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sample": ({"rows": dataset(sample=False).to_iterable_dataset()}, "no 'sample': add that column"),
    "other rows": ({"rows": dataset(sample=False).select(range(9))}, "9 rows, and `samples` names 14"),
    "out of range": ({"rows": dataset(start=5)}, "there are 14 samples"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be used"),
    "batch size": ({"auto_find_batch_size": True}, "auto_find_batch_size cannot be used"),
    "a loss function": ({"compute_loss_func": mean_loss}, "compute_loss_func"),
    "another loss": ({"trainer": OtherLoss}, "trains on another one"),
    "half the loss": ({"model": Half}, "not the mean next-token loss"),
    "masked": ({"model": bert_masked}, "not the mean next-token loss"),
    "classes": ({"model": classifier, "rows": classified(), "data_collator": stack}, "no 'labels' of tokens"),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_scored_is_refused(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    settings = dict(settings)
    if "model" in settings:
        settings["model"] = settings["model"]()
    callback = callback_of(tmp_path / "store", val_losses=losses_of if case == "half the loss" else None)
    trainer = trainer_of(tmp_path, [callback], max_steps=2, **settings)
    before = weights_of(trainer.model)
    with pytest.raises(UsageError, match=message):
        trainer.train()
    callback.close()
    assert identical(weights_of(trainer.model), before)
    assert not hooks_of(trainer.model)


def test_regions_that_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable it is scored: test_callback_compiled.py."""
    for variable, value in {"BACKEND": "no", "MODE": "default", "USE_REGIONAL_COMPILATION": "true"}.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{variable}", value)
    trainer = trainer_of(tmp_path, [], torch_compile=True, max_steps=2)
    with pytest.raises(UsageError, match="leave ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION out"):
        refuse_arguments(trainer.args, trainer.state)


def test_a_model_without_a_loss(tmp_path: Path) -> None:
    callback = callback_of(tmp_path / "store", val_losses=losses_of)
    trainer = trainer_of(tmp_path, [callback], model=Lossless(), max_steps=2)
    with pytest.raises(UsageError, match="returned no loss"):
        trainer.train()
    callback.close()


def test_settings_of_the_callback(tmp_path: Path) -> None:
    for settings, message in (
        ({"val_data": None}, "val set"),
        ({"dot_prod_save_interval": 0}, "dot_prod_save_interval"),
        ({"samples": "train"}, "not the string"),
        ({"samples": 0}, "no training samples"),
        ({"domains": ["a"]}, "1 domains for 14 samples"),
        ({"domains": "abcdefghijklmn"}, "not the string"),
    ):
        with pytest.raises(UsageError, match=message):
            callback_of(tmp_path / "store", **settings)
    callback = callback_of(tmp_path / "store", projection=ProjectionConfig(), per_layer=True)
    with pytest.raises(UsageError, match="per_layer"):
        trainer_of(tmp_path, [callback]).train()


@pytest.mark.thin(1)
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_store_that_cannot_be_written(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ghoststore.store.run.run import RunWriter

    def refuse(self: Any, *args: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(RunWriter, "append", refuse)
    notes: list[str] = []
    callback = callback_of(tmp_path / "store", on_store_error=policy, note=notes.append)
    trainer = trainer_of(tmp_path, [callback], max_steps=6)
    if policy == "stop":
        with pytest.raises(StorageError, match="no space"):
            trainer.train()
        callback.close()
    else:
        trainer.train()
        assert len(notes) == 1
        assert "no space" in notes[0]
    assert bool(notes) == (policy == "continue")
