"""``ghoststore doctor`` through real processes: findings on stdout, one line on stderr, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.conftest import Lab


def beyond_bfloat16(model: Any, tokenizer: Any) -> None:
    """A position that short samples never use, of a size that float32 has and bfloat16 rounds to infinity."""
    model.transformer.wpe.weight[-1] = 3.4e38


def diverged(model: Any, tokenizer: Any) -> None:
    model.transformer.h[0].mlp.c_fc.weight.fill_(1e30)


@pytest.fixture(scope="module")
def too_large(lab: Lab) -> Path:
    return lab.model(lab.folder / "too-large", change=beyond_bfloat16)


def test_a_sound_model_ends_with_0_and_a_table(lab: Lab, tmp_path: Path) -> None:
    outcome = lab.run("doctor", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--store", tmp_path, "--quiet")
    assert outcome.code == 0, outcome.err
    for words in ("exactness", "autograd's", "invariance", "sdpa, eager", "bfloat16 ranks", "MB/s read", "FAISS"):
        assert words in outcome.out
    assert "wrong" not in outcome.out
    assert outcome.err == ""
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_document_without_nan(lab: Lab, tmp_path: Path) -> None:
    outcome = lab.run("doctor", "--checkpoint", lab.checkpoint, "--store", tmp_path, "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out, parse_constant=pytest.fail)
    assert found["wrong"] == []
    assert found["model"] == str(lab.checkpoint)
    assert found["settings"]["samples"] == 16
    assert found["findings"]["coverage"]["details"]["squared_norm"] > 0
    assert "examining" in outcome.err


@pytest.mark.slow
def test_an_overflow_ends_with_7_where_the_dtype_was_asked_for(lab: Lab, too_large: Path, tmp_path: Path) -> None:
    options = ("doctor", "--checkpoint", too_large, "--max-length", 16, "--store", tmp_path, "--quiet")
    asked = lab.run(*map(str, options), "--model-dtype", "bfloat16", "--json")
    assert asked.code == 7
    assert asked.json["wrong"] == ["precision"]
    assert "transformer.wpe.weight" in asked.json["findings"]["precision"]["summary"]
    assert asked.err == f"Error: a store of {too_large} would be wrong: precision\n"
    advised = lab.run(*map(str, options))
    assert advised.code == 0
    assert "precision: Do not build with --model-dtype bfloat16" in advised.out
    assert torch.finfo(torch.float32).max > 3.4e38 > torch.finfo(torch.bfloat16).max


def test_a_diverged_checkpoint_ends_with_7(lab: Lab, tmp_path: Path) -> None:
    model = lab.model(tmp_path / "model", change=diverged)
    outcome = lab.run("doctor", "--checkpoint", model, "--store", tmp_path, "--quiet")
    assert outcome.code == 7
    assert "infinite in float32 itself" in outcome.out
    assert "cannot be told: see gradients" in outcome.out


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--proj-layers", "nonesuch"), "matches no layer"),
        (("--samples", "2"), "at least 3"),
        (("--max-length", "33"), "32 positions"),
        (("--attn-implementation", "nonesuch"), "nonesuch"),
        (("--attn-implementation", "flash_attention_2"), "no float32"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--device", "cuda:99"), "cuda"),
    ],
)
def test_what_no_build_would_take_is_a_usage_error(lab: Lab, options: tuple[str, ...], words: str) -> None:
    outcome = lab.run("doctor", "--checkpoint", lab.checkpoint, *options, "--quiet")
    assert outcome.code == 2
    assert outcome.out == ""
    assert words in outcome.err
    assert "Traceback" not in outcome.err
