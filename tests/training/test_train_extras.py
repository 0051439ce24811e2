"""Published shapes, the val loss alone, and logging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import ghoststore
from indexer.training.architectures import ARCHITECTURES, architecture, new_model

if TYPE_CHECKING:
    from tests.support.trainings import Gym


class Published:
    """As much of GPT-2's own tokenizer as a model's shape needs."""

    bos_token_id = eos_token_id = 50256
    pad_token_id = None

    def __len__(self) -> int:
        return 50257

    def get_vocab(self) -> dict[str, int]:
        return {"<|endoftext|>": 50256}


@pytest.mark.parametrize(
    ("name", "count"),
    [("GPT2-Small", 124_439_808), ("GPT2-Medium", 354_823_168), ("GPT2-Large", 774_030_080), ("gpt2-small", None)],
)
def test_published_shapes(name: str, count: int | None) -> None:
    config = architecture(name, Published())
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    assert sum(p.numel() for p in model.parameters()) == (count or 124_439_808)
    assert config.n_positions == 1024
    assert config.n_embd // config.n_head == 64


def test_tiny_is_small() -> None:
    shape = ARCHITECTURES["GPT2-Tiny"]
    assert (shape.layers, shape.width, shape.heads) == (4, 128, 4)


def test_new_weights_follow_from_the_seed() -> None:
    class Few(Published):
        def __len__(self) -> int:
            return 300

        def get_vocab(self) -> dict[str, int]:
            return {"a": 299}

    config = architecture("GPT2-Tiny", Few(), dropout=0.1)
    assert (config.vocab_size, config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (300, 0.1, 0.1, 0.1)
    state = torch.random.get_rng_state()
    one, same, other = (new_model(config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_from_scratch(gym: Gym, tmp_path: Path) -> None:
    """A new model is trained, saved where transformers opens it, and built from; its loss falls."""
    trained = gym.fresh(
        tmp_path,
        model=None,
        architecture="GPT2-Tiny",
        tokenizer=gym.models["tiny"],
        dropout=0.1,
        max_steps=8,
        learning_rate=2e-3,
        eval_interval=4,
    )
    val = trained.arrays()["val_loss"]
    assert val[7] < val[3] < 5.7
    report = ghoststore.build(
        checkpoint=trained.checkpoint(),
        data=gym.data["plain"],
        store=trained.store,
        name="part",
        max_samples=6,
        device="cpu",
    )
    assert report.rows == 6
    assert AutoModelForCausalLM.from_pretrained(trained.checkpoint()).config.n_layer == 4


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_val_loss_alone(gym: Gym, dtype: str, tmp_path: Path) -> None:
    outcome = gym.run(tmp_path, "--eval-only", "--json", "--train-dtype", dtype, corpus="prompts")
    assert outcome.code == 0, outcome.err
    assert list(tmp_path.iterdir()) == []
    model = AutoModelForCausalLM.from_pretrained(gym.models["tiny"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(gym.models["tiny"])
    sums: dict[str, list[float]] = {}
    for row in map(json.loads, gym.data["prompts-val"].read_text().splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        loss = F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
        for domain in (row["domain"], ""):
            of = sums.setdefault(domain, [0.0, 0])
            of[0], of[1] = of[0] + float(loss), of[1] + len(logits)
    expected = {domain: loss / count for domain, (loss, count) in sums.items()}
    tolerance = 1e-6 if dtype == "float32" else 5e-3
    report = outcome.json
    assert report["val_loss"] == pytest.approx(expected.pop(""), rel=tolerance)
    assert report["val_loss_by_domain"] == pytest.approx(expected, rel=tolerance)
    assert (report["checkpoint"], report["run"], report["steps"]) == (None, None, 0)
    plain = ghoststore.train(
        data=gym.data["prompts"],
        val_set=gym.data["prompts-val"],
        output_dir=tmp_path / "out",
        eval_only=True,
        checkpoint=gym.models["tiny"],
        train_dtype=dtype,
        device="cpu",
    )
    assert plain.val_loss == report["val_loss"]


@pytest.mark.kill
@pytest.mark.slow
def test_tensorboard(gym: Gym, tmp_path: Path) -> None:
    """What the event files say is what the store says; what was logged after a resumed step is void."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    fault: dict[str, Any] = {"call": "fsync", "path": r"00000000\.log$", "when": "after", "number": 4, "act": "kill"}
    options = ("--tensorboard", logs, "--per-layer")
    assert gym.run(tmp_path, *options, fault=fault).code == -9
    assert gym.run(tmp_path, *options).code == 0
    events = EventAccumulator(str(logs)).Reload()
    run = ghoststore.Store.open(tmp_path / "store").run("run")
    for tag, array in (
        ("train/loss", "train_loss"),
        ("train/learning_rate", "learning_rate"),
        ("train/grad_norm", "grad_norm"),
    ):
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert sorted(found) == list(range(1, 13))
        stored = run.read_committed(array)
        assert [found[step] for step in range(1, 13)] == pytest.approx(stored.tolist(), rel=1e-6)
        assert len(events.Scalars(tag)) == 12
    val = {event.step: event.value for event in events.Scalars("val/loss")}
    stored = run.read_committed("val_loss")
    assert val == {6: pytest.approx(stored[5]), 12: pytest.approx(stored[11])}
    assert {"val/loss/sky", "val/loss/earth", "scores/negative_share", "scores/mean"} <= set(events.Tags()["scalars"])
