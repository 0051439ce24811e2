"""Trainings of LoRA adapters: what they kept, asked at a checkpoint, and the metric of their optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import ghoststore
from ghoststore.checkpoint.adapter import IN_PEFT
from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.corpus import Sample
from ghoststore.progress import Silent
from ghoststore.store.part.status import Status
from ghoststore.store.run.visits import stream_visits
from indexer.encode.tokens import Row
from indexer.projection.adam import factored, read_scales, scales_digest
from indexer.projection.selection import select_blocks
from query.ask.run_encoder import RunEncoder
from tests.support.adapters import adapted
from tests.support.loops import run_of
from tests.support.models import examples
from tests.support.trainers import callback_of, trainer_of

if TYPE_CHECKING:
    from tests.conftest import Lab

EXAMPLES = [ids for ids, _ in examples((24, 3, 11, 17, 5, 9, 20, 2, 13, 7, 16, 12), masked=False, seed=1)]
IDS = [ids.tolist() for ids in EXAMPLES]
ROWS_READ = Dataset.from_dict({"input_ids": IDS, "labels": IDS, "sample": list(range(len(IDS)))})

pytest.importorskip("peft", reason="peft is not installed: pip install 'ghoststore[peft]'")


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "settings", [{"target_modules": ["c_attn", "c_fc"]}, {"target_modules": ["c_attn"], "use_dora": True}]
)
def test_gradients_at_a_checkpoint_are_those_that_were_kept(lab: Lab, tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = adapted(AutoModelForCausalLM.from_pretrained(lab.checkpoint), **settings)
    callback = callback_of(tmp_path / "store", samples=len(EXAMPLES), keep_gradients=2)
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, [callback], model=peft, rows=ROWS_READ, max_steps=6, **saving).train()
    run = run_of(tmp_path / "store", "trainer")
    checkpoint = tmp_path / "out" / "checkpoint-4"
    encoder = RunEncoder(
        run, checkpoint=checkpoint, base=None, tokenizer=lab.checkpoint, device="cpu", progress=Silent()
    )
    visits = next(iter(stream_visits(run, [(4, 5)])))
    assert len(visits.row) > 1
    rows = []
    for row in visits.row.tolist():
        ids = EXAMPLES[row].int().numpy()
        rows.append(Row(Sample(row, str(row), None, "", -1, 0), 0, 0, ids, 1, Status.OK))
    found = encoder.vectors(rows)
    stored = torch.as_tensor(visits.vectors)
    assert found.shape == stored.shape
    assert float((found - stored).norm() / stored.norm()) < 0.02  # of codes of eight bits
    val = lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 2))
    result = ghoststore.query(
        store=tmp_path / "store",
        run="trainer",
        val_set=val,
        checkpoint=checkpoint,
        tokenizer=lab.checkpoint,
        device="cpu",
    )
    assert len(result[0]) == 10


@pytest.mark.thin(1)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["ln_f"]}])
def test_the_optimizer_state_of_the_training_scales_the_adapter(
    lab: Lab, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The product that LESS takes: gradients of the adapter, in the metric of its training's Adam."""
    base = AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    peft = adapted(base, target_modules=["c_attn", "c_fc"], **settings)
    trainer = trainer_of(tmp_path, [], model=peft, rows=ROWS_READ, max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    model = load_model(find_checkpoint(checkpoint))
    blocks = select_blocks(model, ("adapter",)).blocks
    found = read_scales(checkpoint, model, blocks)
    state = trainer.optimizer.optimizer.state
    v = {name.removeprefix(IN_PEFT): state[p]["exp_avg_sq"] for name, p in peft.named_parameters() if p.requires_grad}
    assert set(v) == {name for block in blocks for name in block.parameters}
    for block in blocks:
        expected = factored(block.lay_out(v))
        assert torch.equal(found[block.name].scale_in, expected.scale_in), block.name
        assert torch.equal(found[block.name].scale_out, expected.scale_out), block.name
    lab.write(tmp_path / "train.jsonl", lab.sample_rows(6, 1))
    given: dict[str, Any] = {"data": tmp_path / "train.jsonl", "store": tmp_path / "store", "device": "cpu"}
    ghoststore.build(checkpoint=checkpoint, tokenizer=lab.checkpoint, optimizer_state=checkpoint, name="less", **given)
    part = ghoststore.Store.open(tmp_path / "store").part("less")
    assert part.manifest["projection"]["optimizer_state"] == scales_digest(found)
