"""GhostStoreCallback in TRL's SFTTrainer: weights as without it, scores as batch-of-one autograd says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

from ghoststore import GhostStoreCallback, GradDotProdEngine, ProjectionConfig
from tests.indexer.layers.test_families import made
from tests.support.loops import VAL, VAL_BATCH, close_to, identical, in_ranks, roughly, run_of, steps_of, weights_of
from tests.support.models import VOCABULARY, gpt2, llama, next_token_loss_of, pad, settle
from tests.support.oracle import gradients_of
from tests.support.scoring import exact_causal
from tests.support.trainers import Watcher, hooks_of

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")

from tests.support.sft import chats, completions, samples_of, texts, trainer_of


def still_gpt2() -> Any:
    """A tied head, and no dropout, under which no sample has one gradient."""
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def granite() -> Any:
    """Logits that are divided after the head."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return settle(GraniteForCausalLM(GraniteConfig(vocab_size=VOCABULARY, logits_scaling=4.0, **sizes)))


class Capped(LlamaForCausalLM):
    """Logits that are scaled and capped, as those of Cohere and of Gemma 2."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 3.0 * torch.tanh(output.logits * 0.5 / 3.0)
        return output


def capped() -> Any:
    config = llama().config
    config.final_logit_softcapping, config.logit_scale = 3.0, 0.5
    return settle(Capped(config))


FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Dataset], dict[str, Any]]] = {
    "as it is": (llama, texts, {}),
    "tied": (still_gpt2, texts, {"gradient_checkpointing": False}),
    "accumulation": (llama, texts, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}),
    "bf16": (llama, texts, {"bf16": True}),
    "padding-free": (llama, texts, {"padding_free": True, "max_length": None}),
    "padded padding-free": (still_gpt2, texts, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8}),
    "packing": (llama, texts, {"packing": True, "gradient_accumulation_steps": 2}),
    "packing, tied, bf16": (still_gpt2, texts, {"packing": True, "bf16": True}),
    "packing, mixture": (partial(made, "Mixtral"), texts, {"packing": True, "router_aux_loss_coef": 0.0}),
    "packing, split": (llama, texts, {"packing": True, "packing_strategy": "bfd_split", "max_length": 8}),
    "packing, wrapped": (llama, texts, {"packing": True, "packing_strategy": "wrapped"}),
    "completions": (llama, completions, {}),
    "completions, packing": (llama, completions, {"packing": True}),
    "answers": (llama, chats, {"assistant_only_loss": True}),
    "answers, padding-free": (llama, chats, {"assistant_only_loss": True, "padding_free": True, "max_length": None}),
    "scaled logits": (granite, texts, {}),
    "scaled and capped logits": (capped, texts, {}),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("form", FORMS)
def test_weights_stay_and_scores_are_exact(form: str, tmp_path: Path) -> None:
    fresh, rows, settings = FORMS[form]
    plain = trainer_of(tmp_path, fresh(), rows(), [], **settings)
    plain.train()
    watcher, callback = Watcher(), GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH)
    trainer = trainer_of(tmp_path, fresh(), rows(), [watcher, callback], **settings)
    trainer.train()
    assert identical(weights_of(trainer.model), weights_of(plain.model))
    assert not hooks_of(trainer.model)
    samples, seen = samples_of(trainer.train_dataset), set()
    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin = fresh()
        twin.load_state_dict(watcher.weights[step])
        lacking = np.array([not (samples[place][1][1:] != -100).any() for place in places])
        assert np.isnan(scores[lacking]).all()
        places, scores = places[~lacking], scores[~lacking]
        expected = exact_causal(twin, [samples[place] for place in places], VAL).total().mean(1)
        if "bf16" in form:
            roughly(scores, expected, 0.05)
        else:
            close_to(scores, expected, 2e-5)
        seen.update(places.tolist())
    assert len(seen) >= 4


@pytest.mark.thin
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("fresh", [llama, still_gpt2])
def test_vectors_that_are_kept(fresh: Callable[[], Any], packing: bool, tmp_path: Path) -> None:
    """Sketched scores, and the vectors that are kept, are those of a plain loop over padded rows."""
    projection = ProjectionConfig(layers=("mlp", "attn", "lm_head"), rank_total=16, compress=None)
    watcher = Watcher()
    callback = GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH, projection=projection)
    trainer = trainer_of(tmp_path, fresh(), texts(), [watcher, callback], packing=packing)
    trainer.train()
    run, samples = run_of(tmp_path / "store", "trainer"), samples_of(trainer.train_dataset)
    vectors = run.read_committed("vector")[:, 0]
    for step, places, scores in steps_of(run):
        twin = fresh()
        twin.load_state_dict(watcher.weights[step])
        ids, labels, mask = pad([samples[place] for place in places])
        with GradDotProdEngine(twin, VAL_BATCH, projection=projection) as engine:
            engine.prepare(len(ids))
            loss = twin(input_ids=ids, labels=labels, attention_mask=mask).loss
            engine.watch(loss, labels=labels)
            loss.backward()
            expected = engine.collect()
        close_to(scores, expected.total, 2e-5)
        found = torch.from_numpy(vectors[step, : len(places)])
        torch.testing.assert_close(found, expected.vectors, rtol=1e-4, atol=1e-4 * float(expected.vectors.abs().max()))


@pytest.mark.thin(1)
@pytest.mark.parametrize("packing", [False, True])
def test_an_adapter(packing: bool, tmp_path: Path) -> None:
    """TRL makes it of `peft_config`; the base, its head among it, is frozen."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

    def trained(callbacks: list[Any]) -> Any:
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        trainer = trainer_of(tmp_path, llama(), texts(), callbacks, peft_config=adapter, packing=packing)
        trainer.train()
        return trainer

    watcher, callback = Watcher(), GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH)
    trainer = trained([watcher, callback])
    assert identical(weights_of(trainer.model), weights_of(trained([]).model))
    samples, twin = samples_of(trainer.train_dataset), trainer.model.eval().requires_grad_(True)

    def gradients(examples: list[Any]) -> torch.Tensor:
        """(samples, numbers) of the adapter. Not of a copy: its forward pass would be that of the fused model."""
        losses = (next_token_loss_of(examples)(twin, place) for place in range(len(examples)))
        found = (gradients_of(twin, loss) for loss in losses)
        return torch.stack([torch.cat([x.flatten() for name, x in each.items() if "lora" in name]) for each in found])

    for step, places, scores in steps_of(run_of(tmp_path / "store", "trainer")):
        twin.load_state_dict(watcher.weights[step])
        expected = gradients([samples[place] for place in places]) @ gradients(VAL).mean(0)
        close_to(scores, expected, 2e-5)


@pytest.mark.thin(1)
@pytest.mark.ddp
@pytest.mark.parametrize("packing", [False, True])
def test_ranks(packing: bool, tmp_path: Path) -> None:
    """TRL multiplies the loss by the number of ranks, whose gradients are averaged."""

    def work(rank: int) -> None:
        callback = GhostStoreCallback(store=tmp_path / "store", val_data=VAL_BATCH)
        trainer_of(tmp_path, llama(), texts(), [callback], packing=packing, per_device_train_batch_size=2).train()

    in_ranks(2, work, tmp_path)
    samples = samples_of(trainer_of(tmp_path, llama(), texts(), [], packing=packing).train_dataset)
    run = run_of(tmp_path / "store", "trainer")
    sample, score = run.read_committed("sample")[0], run.read_committed("score")[0]
    assert sample.shape[0] == 2
    for rank in range(2):
        places, scores = sample[rank][sample[rank] >= 0], score[rank][sample[rank] >= 0]
        assert len(places) >= 2
        close_to(scores, exact_causal(llama(), [samples[place] for place in places], VAL).total().mean(1), 2e-5)
