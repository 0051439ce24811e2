"""Weights that a model has no place for: a head of another task is noted, layers that the configuration lacks are
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.errors import CheckpointError
from tests.support.models import gpt2, llama, settle

if TYPE_CHECKING:
    from tests.conftest import Lab

WEIGHTS = "model.safetensors"


def rewritten(folder: Path, **weights: torch.Tensor) -> Path:
    """``folder`` with further weights, as a head that was trained besides."""
    path = folder / WEIGHTS
    save_file({**load_file(path), **weights}, path, metadata={"format": "pt"})
    return folder


def configured(folder: Path, name: str, value: Any) -> Path:
    """``folder`` with another ``value`` in its configuration."""
    path = folder / "config.json"
    fields: dict[str, Any] = json.loads(path.read_text())
    fields.pop("layer_types", None)
    path.write_text(json.dumps({**fields, name: value}))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "headless"])
def test_layers_that_the_configuration_lacks(family: str, tmp_path: Path) -> None:
    """transformers leaves them out, and warns: the vectors would be those of another model."""
    made, name = (llama(), "num_hidden_layers") if family == "llama" else (gpt2(), "n_layer")
    (made.transformer if family == "headless" else made).save_pretrained(tmp_path / "model")
    folder = configured(tmp_path / "model", name, 1)
    with pytest.raises(CheckpointError, match=r"no place for weights .*\.1\.\S+, .* and \d+ more\. They are of layers"):
        load_model(find_checkpoint(folder))
    # What the message says.
    AutoModelForCausalLM.from_pretrained(str(folder)).save_pretrained(str(tmp_path / "another"))
    assert len(list(load_model(find_checkpoint(tmp_path / "another")).named_parameters())) < len(
        list(made.named_parameters())
    )
    load_model(find_checkpoint(configured(folder, name, 2)))


def test_a_head_of_another_task_is_noted(lab: Lab, tmp_path: Path) -> None:
    """In one line, by every command that reads a model for the first time, and nothing else differs."""
    heads = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    folder = rewritten(lab.model(tmp_path / "model"), **heads)
    words = f"checkpoint {folder}: GPT2LMHeadModel has no place for weights that its files hold: "
    words += "v_head.summary.bias, v_head.summary.weight. They have no part in anything"
    base = ("--checkpoint", folder, "--data", lab.corpus)
    for command in (
        ("build", *base, "--store", tmp_path / "store", "--workers", "2", "--span-rows", "2"),
        ("full-gradients", *base, "--out", tmp_path / "gradients"),
        ("train", *base, "--output-dir", tmp_path / "out", "--max-steps", "1", "--method", "Regular"),
        ("doctor", "--checkpoint", folder),
    ):
        outcome = lab.run(*command)
        assert outcome.code == 0, outcome.err
        assert " ".join(outcome.err.split()).count(words) == 1, outcome.err


def test_layers_that_predict_later_tokens_are_left_out(tmp_path: Path) -> None:
    """Beside the model's, or behind them where its configuration says how many there are."""
    settle(gpt2()).save_pretrained(tmp_path / "model")
    folder = rewritten(tmp_path / "model", **{"mtp.h.2.ln_1.weight": torch.ones(16)})
    load_model(find_checkpoint(folder))
    rewritten(folder, **{"transformer.h.2.ln_1.weight": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"hold: transformer\.h\.2\.ln_1\.weight\. They are of layers"):
        load_model(find_checkpoint(folder))
    load_model(find_checkpoint(configured(folder, "num_nextn_predict_layers", 1)))


def test_names_of_any_kind(lab: Lab, tmp_path: Path) -> None:
    """They are the file's, which may come from anywhere: no terminal obeys one, and none fills it."""
    names = (
        "h.\x1b]0;owned\x07.weight",
        "x" * 10_000,
        "a\nb",
        "[red]c[/red]",
    )
    folder = rewritten(lab.model(tmp_path / "model"), **{name: torch.ones(1) for name in names})
    configured(folder, "num_nextn_predict_layers", [])
    outcome = lab.run("full-gradients", "--checkpoint", folder, "--data", lab.corpus, "--out", tmp_path / "gradients")
    assert outcome.code == 0, outcome.err
    assert "has no place for weights" in outcome.err
    assert "[red]c[/red]" in outcome.err
    assert "\x1b]" not in outcome.err
    assert len(outcome.err) < 3000
