"""Trainings of LoRA adapters that keep gradients: asked at a checkpoint, which is the adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

import ghoststore
from ghoststore.corpus import Sample
from ghoststore.progress import Silent
from ghoststore.store.part.status import Status
from ghoststore.store.run.visits import stream_visits
from indexer.encode.tokens import Row
from query.ask.run_encoder import RunEncoder
from tests.support.adapters import adapted
from tests.support.loops import run_of
from tests.support.models import examples
from tests.support.trainers import callback_of, trainer_of

if TYPE_CHECKING:
    from tests.conftest import Lab

EXAMPLES = [ids for ids, _ in examples((24, 3, 11, 17, 5, 9, 20, 2, 13, 7, 16, 12), masked=False, seed=1)]

pytest.importorskip("peft", reason="peft is not installed: pip install 'ghoststore[peft]'")


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["c_attn", "c_fc"]}, {"target_modules": ["c_attn"], "use_dora": True}]
)
def test_gradients_at_a_checkpoint_are_those_that_were_kept(lab: Lab, tmp_path: Path, settings: dict[str, Any]) -> None:
    peft = adapted(AutoModelForCausalLM.from_pretrained(lab.checkpoint), **settings)
    callback = callback_of(tmp_path / "store", samples=len(EXAMPLES), keep_gradients=2)
    ids = [ids.tolist() for ids in EXAMPLES]
    rows_read = Dataset.from_dict({"input_ids": ids, "labels": ids, "sample": list(range(len(ids)))})
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, [callback], model=peft, rows=rows_read, max_steps=6, **saving).train()
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
