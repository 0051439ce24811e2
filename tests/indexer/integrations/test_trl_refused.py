"""Trainers of TRL, and settings of its SFTTrainer, that GhostStoreCallback refuses before work, with what works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from ghoststore import Choosing, GhostStoreCallback, GradDotProdEngine
from ghoststore.errors import UsageError
from tests.support.loops import VAL, VAL_BATCH, close_to, identical, run_of, steps_of, weights_of
from tests.support.models import llama
from tests.support.scoring import exact_causal, exact_of
from tests.support.trainers import Watcher, hooks_of

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")

from tests.support.sft import TEXTS, samples_of, texts, tokenizer, trainer_of  # noqa: E402


def refused(trainer: Any, callback: GhostStoreCallback, message: str) -> None:
    """Training ends with the error, and nothing was changed."""
    before = weights_of(trainer.model)
    with pytest.raises(UsageError, match=message):
        trainer.train()
    callback.close()
    assert identical(weights_of(trainer.model), before)
    assert not hooks_of(trainer.model)


def exact(trainer: Any, watcher: Watcher, store: Path, fresh: Callable[[], Any]) -> None:
    samples = samples_of(trainer.train_dataset)
    for step, places, scores in steps_of(run_of(store, "trainer")):
        twin = fresh()
        twin.load_state_dict(watcher.weights[step])
        expected = exact_causal(twin, [samples[place] for place in places], VAL).total().mean(1)
        close_to(scores, expected, 2e-5)


def callback_in(folder: Path, **settings: Any) -> GhostStoreCallback:
    return GhostStoreCallback(**{"store": folder / "store", "val_data": VAL_BATCH, **settings})


# Losses that are none of next tokens.

PAIRS = {
    "prompt": TEXTS[:4],
    "chosen": [f" {text}" for text in TEXTS[4:8]],
    "rejected": [f" {text}" for text in TEXTS[8:12]],
}


def _arguments(name: str, folder: Path) -> Any:
    given = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    return getattr(trl, name)(output_dir=str(folder), **given)


def dpo(folder: Path, callback: Any) -> Any:
    return trl.DPOTrainer(
        model=llama(),
        ref_model=llama(),
        args=_arguments("DPOConfig", folder),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer(),
        callbacks=[callback],
    )


def kto(folder: Path, callback: Any) -> Any:
    columns = {"prompt": TEXTS[:4], "completion": [f" {text}" for text in TEXTS[4:8]], "label": [True, False] * 2}
    return trl.KTOTrainer(
        model=llama(),
        ref_model=llama(),
        args=_arguments("KTOConfig", folder),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        callbacks=[callback],
    )


def grpo(folder: Path, callback: Any) -> Any:
    arguments = _arguments("GRPOConfig", folder)
    return trl.GRPOTrainer(
        model=llama(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": TEXTS[:8]}),
        processing_class=tokenizer(),
        callbacks=[callback],
    )


def reward(folder: Path, callback: Any) -> Any:
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels, config.pad_token_id = 1, 99
    columns = {name: PAIRS[name] for name in ("chosen", "rejected")}
    return trl.RewardTrainer(
        model=LlamaForSequenceClassification(config),
        args=_arguments("RewardConfig", folder),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(),
        callbacks=[callback],
    )


@pytest.mark.thin(2)
@pytest.mark.parametrize("make", [dpo, kto, grpo, reward])
def test_other_trainers_are_refused_by_name(make: Callable[..., Any], tmp_path: Path) -> None:
    callback = callback_in(tmp_path, samples=8)
    trainer = make(tmp_path, callback)
    refused(trainer, callback, f"{type(trainer).__name__} cannot be scored.*watch\\(loss, batch=batch\\)")
    assert not (tmp_path / "store").exists()


def preferences(reference: Any, beta: float = 0.1) -> Callable[[Any, Any], Tensor]:
    """The loss of DPO, one for each pair: a batch holds ``chosen`` and ``rejected`` (B, T)."""

    def log_p(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    def losses(model: Any, batch: Any) -> Tensor:
        ratio = log_p(model, batch["chosen"]) - log_p(model, batch["rejected"])
        with torch.no_grad():
            ratio_before = log_p(reference, batch["chosen"]) - log_p(reference, batch["rejected"])
        return -F.logsigmoid(beta * (ratio - ratio_before))

    return losses


def test_preferences_in_a_loop_of_ones_own() -> None:
    """What the refusal of DPOTrainer advises: exact scores of its loss."""
    generator = torch.Generator().manual_seed(4)
    names, sizes = ("chosen", "rejected"), (5, 3)
    batch, val = ({n: torch.randint(1, 90, (size, 7), generator=generator) for n in names} for size in sizes)
    model, losses = llama(), preferences(llama(layers=1))

    def alone(of: dict[str, Tensor]) -> Callable[[Any, int], Tensor]:
        return lambda model, i: losses(model, {name: x[i : i + 1] for name, x in of.items()}).sum()

    expected = exact_of(model, 5, alone(batch), 3, alone(val)).total().mean(1)
    with GradDotProdEngine(model, val, val_losses=losses) as engine:
        engine.prepare(5)
        loss = losses(model, batch).mean()
        engine.watch(loss, batch=batch)
        loss.backward()
        close_to(engine.collect().total.numpy(), expected, 2e-5)


# Settings of SFTTrainer.


def mixtral() -> Any:
    config = MixtralConfig(
        vocab_size=101,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    torch.manual_seed(1)
    return MixtralForCausalLM(config)


SETTINGS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "dft": ({"loss_type": "dft"}, r"loss_type='dft'.*Train with loss_type='nll'", {"loss_type": "nll"}),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be used", {}),
    "compiled": ({"torch_compile": True}, "torch_compile cannot be used with SFTTrainer.*Leave torch_compile out", {}),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_refused_and_what_is_advised_is_exact(case: str, tmp_path: Path) -> None:
    settings, message, advised = SETTINGS[case]
    callback = callback_in(tmp_path)
    refused(trainer_of(tmp_path, llama(), texts(), [callback], **settings), callback, message)
    watcher = Watcher()
    trainer = trainer_of(tmp_path, llama(), texts(), [watcher, callback_in(tmp_path)], **advised)
    trainer.train()
    exact(trainer, watcher, tmp_path / "store", llama)


@pytest.mark.slow
def test_a_loss_of_the_router(tmp_path: Path) -> None:
    """Without it, as the error says, the attention and the head of a mixture of experts are scored."""
    callback = callback_in(tmp_path)
    trainer = trainer_of(tmp_path, mixtral(), texts(), [callback], router_aux_loss_coef=0.02)
    refused(trainer, callback, r"the router's auxiliary loss.*SFTConfig\(router_aux_loss_coef=0\.0\)")
    callback = callback_in(tmp_path, exclude_layers=["mlp"])
    trainer_of(tmp_path, mixtral(), texts(), [callback], router_aux_loss_coef=0.0).train()
    assert run_of(tmp_path / "store", "trainer").complete


def test_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 2 * F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:])

    torch.manual_seed(0)
    from tests.support.sft import config

    callback = callback_in(tmp_path)
    trainer = trl.SFTTrainer(
        model=llama(),
        args=config(tmp_path),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[callback],
        compute_loss_func=doubled,
    )
    refused(trainer, callback, "compute_loss_func")


class Weighted(trl.SFTTrainer):  # type: ignore[misc, name-defined]
    """Half of the tokens count twice."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        log_probs = model(**inputs, fused_lm_head=True, use_cache=False).log_probs
        weights = 1.0 + torch.arange(log_probs.shape[1]) % 2
        return -(log_probs * weights).mean()


class Bonus(trl.SFTTrainer):  # type: ignore[misc, name-defined]
    """A bonus for entropy beside the loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        output = model(**inputs, fused_lm_head=True, use_cache=False)
        return -output.log_probs.mean() - 0.1 * output.entropy.mean()


@pytest.mark.parametrize(
    ("kind", "message"), [(Weighted, "does not weigh all targets alike"), (Bonus, "took part in the backward pass")]
)
def test_another_loss_of_the_log_probabilities(kind: Any, message: str, tmp_path: Path) -> None:
    from tests.support.sft import config

    callback = callback_in(tmp_path)
    trainer = kind(
        model=llama(), args=config(tmp_path), train_dataset=texts(), processing_class=tokenizer(), callbacks=[callback]
    )
    refused(trainer, callback, message)


@pytest.mark.slow
def test_choosing(tmp_path: Path) -> None:
    """transformers' Trainer, which the error names, chooses from the same rows."""
    callback = callback_in(tmp_path, choosing=Choosing(keep=2))
    refused(trainer_of(tmp_path, llama(), texts(), [callback]), callback, "Choose with transformers' Trainer")
    rows = trainer_of(tmp_path, llama(), texts(), []).train_dataset
    callback = callback_in(tmp_path, choosing=Choosing(keep=2))
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to=[])
    collate = DataCollatorForSeq2Seq(tokenizer())
    Trainer(model=llama(), args=arguments, train_dataset=rows, data_collator=collate, callbacks=[callback]).train()
    assert run_of(tmp_path / "store", "trainer").complete


# Numbers of samples.


@pytest.mark.slow
def test_rows_in_another_order(tmp_path: Path) -> None:
    """A column says which they are: TRL keeps it, and the callback finds it."""
    callback = callback_in(tmp_path, samples=len(TEXTS))
    trainer = trainer_of(tmp_path, llama(), texts(), [callback], shuffle_dataset=True)
    refused(trainer, callback, "shuffle_dataset=True puts the rows into another order.*Give the dataset a column")
    numbered = texts(sample=list(range(len(TEXTS))))
    watcher = Watcher()
    trainer = trainer_of(
        tmp_path, llama(), numbered, [watcher, callback_in(tmp_path, samples=len(TEXTS))], shuffle_dataset=True
    )
    trainer.train()
    in_order = samples_of(trainer_of(tmp_path, llama(), texts(), []).train_dataset)
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin = llama()
        twin.load_state_dict(watcher.weights[step])
        close_to(scores, exact_causal(twin, [in_order[place] for place in places], VAL).total().mean(1), 2e-5)


@pytest.mark.slow
def test_packing_drops_the_numbers(tmp_path: Path) -> None:
    """Two ways are advised: names of the packed dataset (test_trl_sft.py), or packing before with the numbers in it."""
    callback = callback_in(tmp_path, samples=len(TEXTS))
    trainer = trainer_of(tmp_path, llama(), texts(), [callback], packing=True)
    refused(trainer, callback, "packing dropped the column 'sample'.*trl.pack_dataset")
    words = tokenizer()
    rows = [words(text)["input_ids"] for text in TEXTS]
    tokens = Dataset.from_dict(
        {"input_ids": rows, "labels": rows, "sample": [[place] * len(row) for place, row in enumerate(rows)]}
    )
    packed = trl.pack_dataset(tokens, 32)
    watcher = Watcher()
    callback = callback_in(tmp_path, samples=len(TEXTS))
    trainer = trainer_of(
        tmp_path, llama(), packed, [watcher, callback], packing=False, padding_free=True, max_length=None
    )
    trainer.train()
    seen = set()
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin = llama()
        twin.load_state_dict(watcher.weights[step])
        chosen = [(torch.tensor(rows[place]), torch.tensor(rows[place])) for place in places]
        close_to(scores, exact_causal(twin, chosen, VAL).total().mean(1), 2e-5)
        seen.update(places.tolist())
    assert seen == set(range(len(TEXTS)))
