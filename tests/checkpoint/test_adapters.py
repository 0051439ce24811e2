"""LoRA adapters as checkpoints: the gradients of their parameters are those of autograd, and what is not is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ghoststore.checkpoint.adapter import has_adapter, is_adapter_path
from ghoststore.checkpoint.find import find_folder
from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.errors import CheckpointError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.selection import select_blocks
from tests.support.adapters import OF_GPT2, OF_LLAMA, adapted
from tests.support.models import causal_vectors, examples, gpt2, llama, next_token_loss_of
from tests.support.oracle import naive, relative_error
from tests.support.scoring import BATCH, VAL, causal_engine, causal_step, check, exact_causal

pytest.importorskip("peft", reason="peft is not installed: pip install 'ghoststore[peft]'")

KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    **{f"llama {name}": (llama, settings) for name, settings in OF_LLAMA.items()},
    **{f"gpt2 {name}": (gpt2, settings) for name, settings in OF_GPT2.items()},
}


def saved(folder: Path, make: Callable[[], Any], **settings: Any) -> tuple[Any, Path]:
    """(the PeftModel, the folder of its adapter), its base beside it."""
    model = make()
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base").eval()
    peft = adapted(model, **settings)
    peft.save_pretrained(folder / "adapter")
    return peft, folder / "adapter"


def logits(model: Any) -> Tensor:
    return model(torch.arange(1, 12).unsqueeze(0)).logits.detach()


@pytest.mark.thin(4)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_its_vectors_are_exact(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    peft, folder = saved(tmp_path, make, **settings)
    model = load_model(find_checkpoint(folder))
    assert torch.equal(logits(model), logits(peft))
    batch = examples()
    with GradProjLoraEngine(model, ProjectionConfig(rank_total=9)) as engine:
        vectors = causal_vectors(engine, model, batch)
        projection = engine.projection
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    covered = {name for layer in projection.plan.layers for name in layer.block.parameters}
    assert {f"base_model.model.{name}" for name in covered} == trained
    expected = naive(model, projection, len(batch), next_token_loss_of(batch))
    assert relative_error(vectors, expected.vectors) <= 1e-5


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", ["llama lora", "llama dora", "llama saved", "llama embeddings", "gpt2 saved"])
def test_all_layers_are_exact_too(kind: str) -> None:
    """Those of the base as well, but not the modules in whose place the adapter has its own."""
    make, settings = KINDS[kind]
    model, batch = adapted(make(), **settings).get_base_model(), examples()
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=9)) as engine:
        vectors = causal_vectors(engine, model, batch)
        expected = naive(model, engine.projection, len(batch), next_token_loss_of(batch))
    assert relative_error(vectors, expected.vectors) <= 1e-5


@pytest.mark.parametrize("kind", ["llama lora", "llama dora", "llama saved", "gpt2 lora"])
def test_the_merged_model_is_an_ordinary_one(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    peft, folder = saved(tmp_path, make, **settings)
    merged = load_model(find_checkpoint(folder, adapter="merge"))
    assert not has_adapter(merged)
    assert not any(is_adapter_path(name.split(".")) for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(peft), rtol=1e-4, atol=1e-5)
    selection = select_blocks(merged)
    assert [block.name for block in selection.blocks] == [block.name for block in select_blocks(make()).blocks]


TRAINED = KINDS | {"gpt2 biases": (gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"})}


@pytest.mark.thin(4)
@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind != "llama dropout"])
def test_training_scores_are_exact(kind: str) -> None:
    make, settings = TRAINED[kind]
    peft = adapted(make(), **settings)
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    exact = exact_causal(peft, BATCH, VAL[:3]).only(trained.__contains__)
    with causal_engine(peft, VAL[:3]) as engine:
        check(causal_step(engine, peft), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_memory_has_the_identity_of_its_folders(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    peft, folder = saved(tmp_path, make, **settings)
    assert find_checkpoint(peft).identity() == find_checkpoint(folder).identity()
    assert find_checkpoint(peft).identity()["adapter"]["base"] == find_checkpoint(tmp_path / "base").fingerprint()


@pytest.mark.parametrize("kind", ["llama dora", "llama saved", "llama embeddings", "gpt2 lora"])
def test_every_parameter_has_the_dtype_that_was_asked_for(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    peft, folder = saved(tmp_path, make, **settings)
    models = [load_model(find_checkpoint(source), dtype="bfloat16") for source in (folder, peft)]
    for model in models:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert all(p.dtype == torch.float32 for p in peft.parameters())


@pytest.mark.thin(4)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_an_adapter_counts(tmp_path: Path, kind: str) -> None:
    make, settings = KINDS[kind]
    _, folder = saved(tmp_path, make, **settings)
    own = find_checkpoint(folder).identity()
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name in weights:
        save_file(weights | {name: weights[name] + 1e-3}, file)
        if "base_layer" in name:  # embeddings of the base, saved beside
            with pytest.raises(CheckpointError, match="it brings more than the adapter"):
                load_model(find_checkpoint(folder))
        else:
            assert find_checkpoint(folder).identity()["fingerprint"] != own["fingerprint"], name


def test_the_identity_is_that_of_base_and_adapter(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    own = find_checkpoint(folder).identity()
    config = folder / "adapter_config.json"
    others = [find_checkpoint(folder, adapter="merge").identity()]
    for name, value in (("lora_alpha", 6), ("use_rslora", True)):
        text = config.read_text()
        config.write_text(json.dumps(json.loads(text) | {name: value}))
        others.append(find_checkpoint(folder).identity())
        config.write_text(text)
    weights = load_file(folder / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1e-3}, folder / "adapter_model.safetensors")
    others.append(find_checkpoint(folder).identity())
    save_file(weights, folder / "adapter_model.safetensors")
    llama(layers=2).half().save_pretrained(tmp_path / "base")
    others.append(find_checkpoint(folder).identity())
    fingerprints = [own["fingerprint"], *(other["fingerprint"] for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(other["adapter"] != own["adapter"] for other in others)


def test_what_does_not_change_the_outputs_is_not_compared(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    own = find_checkpoint(folder).identity()
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    fields |= {"target_modules": fields["target_modules"][::-1], "lora_dropout": 0.5, "peft_version": "9", "new": None}
    config.write_text(json.dumps(fields))
    assert find_checkpoint(folder).identity() == own


@pytest.mark.parametrize("where", ["absolute", "beside", "given", "in the same folder"])
def test_the_base_is_found(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    peft, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    config = folder / "adapter_config.json"
    given: dict[str, Any] = {}
    named = str(tmp_path / "base")
    if where == "beside":
        named = "../base"
        monkeypatch.chdir("/")
    if where == "given":
        named, given = "meta-llama/Llama-7", {"base": "base"}
    if where == "in the same folder":
        named, given = "meta-llama/Llama-7", {"adapter": "only"}
        shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    assert torch.equal(logits(load_model(find_checkpoint(folder, **given))), logits(peft))


def test_a_folder_with_a_model_and_an_adapter_asks_which(tmp_path: Path) -> None:
    peft, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)
    with pytest.raises(UsageError, match=r"holds a model and an adapter: choose with `adapter`: only .*merge .*ignore"):
        find_checkpoint(folder)
    alone = load_model(find_checkpoint(folder, adapter="ignore"))
    assert torch.equal(logits(alone), logits(load_model(find_checkpoint(tmp_path / "base"))))
    assert find_checkpoint(folder, adapter="ignore").fingerprint() == find_checkpoint(tmp_path / "base").fingerprint()
    assert torch.equal(logits(load_model(find_checkpoint(folder, adapter="only"))), logits(peft))
    with pytest.raises(CheckpointError, match=r"holds a model and an adapter, and a whole model is expected here"):
        find_folder(folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"bias": "lora_only"}, r"bias='lora_only': it trains biases of the base, .*Give `adapter=merge`"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"has trainable_token_indices=.*Give `adapter=merge`"),
    "megatron": (
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        r"has megatron_config=.*not understood here: where it was trained",
    ),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, r"has layer_replication=.*not understood here"),
    "of another release": ({"new_kind": True}, r"has new_kind=True, which is not understood here"),
    "task": ({"task_type": "SEQ_CLS"}, r"is for the task 'SEQ_CLS'; expected one for causal language models"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', which changes the weights of the base"),
    "type": ({"peft_type": "IA3"}, r"is of the type 'IA3', and LoRA is read; where it was trained, model\.merge"),
    "rank": ({"r": 1 << 40}, r"a rank is 1099511627776, and the longest axis"),
    "no base": ({"base_model_name_or_path": None}, r"names no base: give `base`"),
    "hub": ({"base_model_name_or_path": "org/name"}, r"no folder here, and nothing is fetched .*give `base`"),
    "other rank": ({"r": 4}, r"does not fit .*base: "),
    "other modules": ({"target_modules": ["q_proj", "k_proj"]}, r"its tensors are not those of its configuration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, case: str) -> None:
    settings, message = REFUSED[case]
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    with pytest.raises((CheckpointError, UsageError), match=message):
        load_model(find_checkpoint(folder))
    if "adapter=merge" not in message:
        with pytest.raises((CheckpointError, UsageError), match=message):
            load_model(find_checkpoint(folder, adapter="merge"))


def test_what_was_trained_with_biases_is_merged(tmp_path: Path) -> None:
    peft, folder = saved(tmp_path, gpt2, target_modules=["c_attn"], bias="lora_only")
    with pytest.raises(CheckpointError, match="Give `adapter=merge`"):
        find_checkpoint(folder)
    if not any(name.endswith(".bias") for name in load_file(folder / "adapter_model.safetensors")):
        pytest.skip("this peft loses the biases when it saves: those before 0.21")
    merged = load_model(find_checkpoint(folder, adapter="merge"))
    assert torch.allclose(logits(merged), logits(peft), rtol=1e-4, atol=1e-5)


def test_options_of_adapters_without_one_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    with pytest.raises(UsageError, match="`base` belongs to an adapter"):
        find_checkpoint(tmp_path / "base", base=tmp_path / "base")
    with pytest.raises(UsageError, match="`adapter` belongs to an adapter"):
        find_checkpoint(tmp_path / "base", adapter="merge")
    with pytest.raises(UsageError, match="is an adapter alone; nothing is left without it"):
        find_checkpoint(folder, adapter="ignore")
    with pytest.raises(UsageError, match="`adapter` 'both' is unknown; known: only, merge, ignore"):
        find_checkpoint(folder, adapter="both")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        find_checkpoint(folder, base=folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors but adapter_model\.bin, a pickle"):
        find_checkpoint(folder)


def quantise(folder: Path, out: Path, **settings: Any) -> Any:
    """The model in ``folder``, quantised and saved to ``out``; as bitsandbytes runs it."""
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(out)
    return model


def test_a_quantised_base_without_its_library_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    config = tmp_path / "base" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantised}))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(CheckpointError, match=r"is quantised to 4 bits by bitsandbytes, which reads it: pip install"):
        find_checkpoint(folder)


def test_an_adapter_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, llama, **OF_LLAMA["lora"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(UsageError, match=r"is an adapter, which is read with peft: pip install 'ghoststore\[peft\]'"):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 1e-5),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, 1e-5),
        ({"load_in_8bit": True}, 0.05),  # which rounds activations
    ],
)
def test_an_adapter_of_a_quantised_base_is_exact(tmp_path: Path, settings: dict[str, Any], most: float) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "wide")
    quantised = quantise(tmp_path / "wide", tmp_path / "base", **settings)
    # In eval mode bitsandbytes goes over to a kernel in bfloat16 on some processors, which has no gradient.
    peft = adapted(quantised, **OF_LLAMA["lora"]).train()
    peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    peft.save_pretrained(tmp_path / "adapter")
    model = load_model(find_checkpoint(tmp_path / "adapter"))
    assert relative_error(logits(model), logits(peft)) <= most
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    batch = examples()
    with GradProjLoraEngine(model, ProjectionConfig(rank_total=9)) as engine:
        vectors = causal_vectors(engine, model, batch)
        expected = naive(model, engine.projection, len(batch), next_token_loss_of(batch))
    assert relative_error(vectors, expected.vectors) <= 1e-5
    if "load_in_4bit" in settings:  # autograd through bitsandbytes itself
        trained = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        own = torch.autograd.grad(next_token_loss_of(batch)(peft, 2), list(trained.values()))
        for name, gradient in zip(trained, own, strict=True):
            same = expected.gradients[2][name.removeprefix("base_model.model.")]
            assert relative_error(gradient.unsqueeze(0), same.unsqueeze(0)) <= 1e-4, name


def test_models_in_memory_that_a_folder_would_hold_otherwise_are_refused() -> None:
    peft = adapted(llama(), **OF_LLAMA["lora"])
    with pytest.raises(CheckpointError, match="it has adapters"):
        find_checkpoint(peft.get_base_model())
    with pytest.raises(UsageError, match=r"`adapter=merge` is for the folder.*merge_and_unload"):
        find_checkpoint(peft, adapter="merge")
    with pytest.raises(CheckpointError, match="switched off"), peft.disable_adapter():
        find_checkpoint(peft)
    peft.merge_adapter()
    with pytest.raises(CheckpointError, match="merged or switched off in"):
        find_checkpoint(peft)
    peft.unmerge_adapter()
    peft.add_adapter("other", peft.peft_config["default"])
    with pytest.raises(CheckpointError, match="has the adapters default, other; expected one"):
        find_checkpoint(peft)
