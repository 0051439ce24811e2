"""Models and tokenizers in memory: the identity of their saved folders, and the caller's objects left as they were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghoststore.checkpoint.config_identity import config_identity
from ghoststore.checkpoint.find import find_folder
from ghoststore.checkpoint.in_memory import LoadedCheckpoint, LoadedTokenizer, as_folders
from ghoststore.checkpoint.load import find_checkpoint, load_model, load_tokenizer, resolve_device
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.errors import CheckpointError, UsageError
from query.demo.tokenizer import train_tokenizer
from tests.support.models import gpt2, llama, neox

if TYPE_CHECKING:
    from tests.conftest import Lab

MODELS = {"gpt2": gpt2, "untied": lambda: gpt2(tied=False), "llama": llama, "neox": neox}


def state(model: Any) -> Any:
    """All that a caller could notice."""
    modules = {
        name: (module.training, *(len(getattr(module, hooks)) for hooks in ("_forward_hooks", "_backward_hooks")))
        for name, module in model.named_modules()
    }
    parameters = {
        name: (p.data_ptr(), p._version, p.requires_grad, p.dtype, p.device, p.grad, p.clone())
        for name, p in model.named_parameters()
    }
    return modules, parameters, model.config.to_dict(), model.config._attn_implementation


def same(first: Any, second: Any) -> bool:
    return (
        first[0] == second[0]
        and first[2:] == second[2:]
        and all(
            a[:-2] == b[:-2] and a[-2] is b[-2] and torch.equal(a[-1], b[-1])
            for a, b in zip(first[1].values(), second[1].values(), strict=True)
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_fingerprint_is_that_of_the_saved_folder(tmp_path: Path, kind: str, dtype: str) -> None:
    model = MODELS[kind]().to(getattr(torch, dtype))
    before = state(model)
    own = find_checkpoint(model)
    assert own.numbers() == sum(p.numel() for p in model.parameters())
    fingerprint = own.fingerprint()
    assert same(state(model), before)
    model.save_pretrained(tmp_path)
    saved = find_folder(tmp_path)
    assert fingerprint == saved.fingerprint()
    reread = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert find_checkpoint(reread).fingerprint() == fingerprint
    loaded = load_model(saved, dtype=dtype)
    assert config_identity(load_model(own, dtype=dtype).config) == config_identity(loaded.config)


@pytest.mark.parametrize(("own", "wanted"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_model_is_that_of_the_folder(tmp_path: Path, own: str, wanted: str) -> None:
    model = gpt2().to(getattr(torch, own))
    model.save_pretrained(tmp_path)
    (first, second) = (load_model(find_checkpoint(source), dtype=wanted) for source in (model, tmp_path))
    assert {name: p.dtype for name, p in first.named_parameters()} == {n: p.dtype for n, p in second.named_parameters()}
    ids = torch.arange(8)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    shared = first.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert shared == (own == wanted)


def test_a_model_is_left_as_it_was() -> None:
    model = gpt2(resid_pdrop=0.5).train()
    model.transformer.wpe.weight.requires_grad_(False)
    seen: list[str] = []
    model.transformer.h[0].register_forward_hook(lambda *_: seen.append("called"))
    model(torch.arange(8)[None]).logits.sum().backward()
    seen.clear()
    before = state(model)
    copied = load_model(find_checkpoint(model), attn_implementation="eager")
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    copied(torch.arange(8)[None]).logits.sum().backward()
    copied.register_forward_hook(lambda *_: None)
    assert copied.config._attn_implementation == "eager"
    assert not seen
    assert same(state(model), before)


def test_changes_in_place_are_counted() -> None:
    model = gpt2()
    checkpoint = LoadedCheckpoint.of(model)
    before = checkpoint.versions()
    with torch.no_grad():
        model.lm_head.weight.add_(0)
    assert checkpoint.versions() != before


def test_refused_are_models_that_a_folder_would_hold_otherwise() -> None:
    model = gpt2()
    with pytest.raises(CheckpointError, match="is a Linear; expected a folder"):
        find_checkpoint(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="of a wrapped model give the model inside"):
        find_checkpoint(nn.Sequential(model))
    with pytest.raises(CheckpointError, match="is a int; expected a folder"):
        find_checkpoint(3)  # type: ignore[arg-type]
    with torch.device("meta"):
        hollow = transformers.GPT2LMHeadModel(model.config)
    with pytest.raises(CheckpointError, match=r"its parameters are on meta; save it"):
        find_checkpoint(hollow)
    model.forward = model.forward
    with pytest.raises(CheckpointError, match="forward of a module was replaced"):
        load_model(find_checkpoint(model))
    with pytest.raises(UsageError, match="comes without a tokenizer: give `tokenizer`"):
        _ = find_checkpoint(gpt2()).tokenizer_folder


def test_bad_weights_are_refused_as_those_of_a_folder() -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"GPT2LMHeadModel in memory \(float32\): parameter 'transformer.wte.weight'"
    ):
        load_model(find_checkpoint(model))


def test_auto_is_the_device_of_the_model() -> None:
    assert resolve_device("auto", gpt2()) == "cpu"
    assert resolve_device("cpu", gpt2()) == "cpu"


def test_a_tokenizer_is_that_of_its_saved_folder(lab: Lab, tmp_path: Path) -> None:
    made = train_tokenizer(["some words to learn from"], 270)
    made.save_pretrained(tmp_path)
    for tokenizer, folder in ((made, tmp_path), (AutoTokenizer.from_pretrained(lab.checkpoint), lab.checkpoint)):
        before = tokenizer_identity(tokenizer)
        loaded = load_tokenizer(LoadedTokenizer(tokenizer))
        assert tokenizer_identity(loaded) == tokenizer_identity(load_tokenizer(folder))
        assert tokenizer_identity(tokenizer) == before
    with pytest.raises(UsageError, match="`tokenizer` is a dict; expected a folder"):
        load_tokenizer(LoadedTokenizer({}))


def test_folders_of_what_is_in_memory(lab: Lab) -> None:
    model = AutoModelForCausalLM.from_pretrained(lab.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(lab.checkpoint)
    before = state(model)
    with as_folders(model, tokenizer) as (folder, beside):
        assert find_folder(folder).fingerprint() == find_folder(lab.checkpoint).fingerprint()
        assert tokenizer_identity(load_tokenizer(beside)) == tokenizer_identity(load_tokenizer(lab.checkpoint))
    assert not folder.exists()
    assert same(state(model), before)
    with as_folders(lab.checkpoint, None) as given:
        assert given == (lab.checkpoint, None)
