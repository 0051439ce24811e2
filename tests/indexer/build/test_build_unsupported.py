"""Builds of models with modules that no formula knows, and of those with layers that mix samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import ghoststore
from ghoststore.errors import CaptureError, MismatchError
from ghoststore.store import Store
from tests.indexer.build.test_model_check import assert_exact, build
from tests.support.models import settle
from tests.support.notes import Notes
from tests.support.oracle import gradients_alone
from tests.support.parts import vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def mixture(lab: Lab) -> Path:
    """A mixture of experts with the lab's tokenizer, saved."""
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = lab.folder / "mixture"
    settle(MixtralForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_mixture(lab: Lab, mixture: Path, store: Path, **options: Any) -> Any:
    return ghoststore.build(checkpoint=mixture, data=lab.corpus, store=store, name="part", device="cpu", **options)


def test_rows_of_experts_are_autograds(lab: Lab, mixture: Path, tmp_path: Path) -> None:
    notes = Notes()
    config = ghoststore.ProjectionConfig(layers=("experts",), rank_total="full", precondition="none")
    build_mixture(lab, mixture, tmp_path / "store", projection=config, proj_dtype="float32", progress=notes)
    assert any("no formula knows 1 MixtralExperts: they run again" in note for note in notes.said)
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    rows = [torch.tensor(tokenizer(row["text"])["input_ids"]) for row in lab.rows]

    def loss_of(model: Any, i: int) -> torch.Tensor:
        logits = model(rows[i].unsqueeze(0)).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], rows[i][1:])

    gradients = gradients_alone(MixtralForCausalLM.from_pretrained(mixture).eval(), len(rows), loss_of)
    names = [f"model.layers.0.mlp.experts.{name}" for name in EXPERTS]
    expected = np.stack([torch.cat([g[name].flatten() for name in names]).numpy() for g in gradients])
    found = np.asarray(vectors_of(Store.open(tmp_path / "store").part("part")))
    error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-4


@pytest.mark.slow
def test_the_default_build_of_a_mixture_can_be_asked_in_every_way(lab: Lab, mixture: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build_mixture(lab, mixture, store)
    val = lab.write(tmp_path / "val.jsonl", lab.rows[:2])
    ask: dict[str, Any] = {"store": store, "val_set": val, "top_k": 3}
    first = ghoststore.query(**ask)
    assert {hit.id for hit in first[0]} & {row["id"] for row in lab.rows[:2]}
    ghoststore.query(**ask, rerank=5)
    ghoststore.query(**ask, layers=("experts",))
    with pytest.raises(CaptureError, match="MixtralTopKRouter, MixtralExperts apart") as error:
        ghoststore.query(**ask, tokens=True)
    named = str(error.value).rpartition("`exclude_layers` '")[2].rstrip("'").split(",")
    assert ghoststore.query(**ask, tokens=True, exclude_layers=named)[0][0].tokens is not None


def test_unsupported_layers_are_left_out_by_name(lab: Lab, tmp_path: Path) -> None:
    notes = Notes()
    with pytest.raises(CaptureError, match=r"mlp\.c_fc,mlp\.c_proj") as error:
        build(lab, tmp_path, "sequence first", layers="mlp")
    assert error.value.unsupported == ("mlp.c_fc", "mlp.c_proj")
    config = {"exclude_layers": ("wte", "wpe", "lm_head")}
    report = build(lab, tmp_path, "sequence first", layers="all", projection=config, skip_unsupported=True, notes=notes)
    assert any("2 layer(s) left out as unsupported: mlp.c_fc, mlp.c_proj" in note for note in notes.said)
    assert report.manifest["projection"]["exclude_layers"] == ["wte", "wpe", "lm_head", "mlp.c_fc", "mlp.c_proj"]
    assert_exact(lab, tmp_path, "sequence first", ("attn",))
    again = build(lab, tmp_path, "sequence first", layers="all", projection=config, skip_unsupported=True)
    assert again.manifest["projection"] == report.manifest["projection"]
    with pytest.raises(MismatchError):
        build(lab, tmp_path, "sequence first", layers="all", projection=config)
