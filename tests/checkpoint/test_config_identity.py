"""The identity of a model's configuration: what is left out of it changes no output, and all else is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from ghoststore.checkpoint.config_identity import (
    DROPOUT,
    INERT,
    agreed_config,
    config_differences,
    config_identity,
)

HEADS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLDER: dict[str, Any] = {
    name: value for name, value in HEADS.items() if name not in ("num_key_value_heads", "head_dim")
}
BART = {
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 40,
    "init_std": 0.3,
    "max_position_embeddings": 64,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (
        tf.GPT2Config,
        tf.GPT2LMHeadModel,
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
    ),
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, HEADS),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {n: v for n, v in HEADS.items() if n != "head_dim"}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, HEADS),
    "gemma": (tf.GemmaConfig, tf.GemmaForCausalLM, HEADS),
    "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, HEADS | {"sliding_window": 4}),
    "gemma3": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, HEADS | {"sliding_window": 4, "num_hidden_layers": 6}),
    "opt": (
        tf.OPTConfig,
        tf.OPTForCausalLM,
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "init_std": 0.3,
        },
    ),
    "t5": (
        tf.T5Config,
        tf.T5ForConditionalGeneration,
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 4,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt_neox": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, OLDER),
    "bert": (tf.BertConfig, tf.BertLMHeadModel, OLDER | {"is_decoder": True}),
    "bart": (tf.BartConfig, tf.BartForCausalLM, BART | {"is_decoder": True, "is_encoder_decoder": False}),
}
"""Configuration, model, settings of a tiny one."""

OTHERS: dict[str, Any] = {
    "_name_or_path": "somewhere/else",
    "architectures": ["Another"],
    "transformers_version": "4.1.0",
    "dtype": "bfloat16",
    "torch_dtype": "float16",
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "init_std": 3.0,
    "initializer_factor": 3.0,
    "initializer_range": 0.7,
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "problem_type": "regression",
    "summary_activation": "tanh",
    "summary_proj_to_labels": False,
    "summary_type": "mean",
    "summary_use_proj": False,
    "task_specific_params": {"text-generation": {"max_length": 9}},
    "classifier_dropout": 0.4,
    "summary_first_dropout": 0.4,
}
"""Another value for each field that is left out; for dropout 0.4."""


def save(kind: str, folder: Path) -> Any:
    """A tiny model with random weights, saved; its configuration."""
    config_class, model_class, settings = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**settings))
    model.save_pretrained(folder)
    return load(kind, folder).config


def load(kind: str, folder: Path, **changes: Any) -> Any:
    """The saved weights under config.json with other values, as ghoststore loads models: in float32, in eval mode."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    try:
        return MODELS[kind][1].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    finally:
        path.write_text(before)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 39).view(2, 18)
    with torch.no_grad():
        more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)[0]


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_left_out_changes_no_output(kind: str, tmp_path: Path) -> None:
    """Every field of the class is in the identity or on the list; and every field on the list is harmless."""
    config = save(kind, tmp_path)
    fields = set(config.to_dict())
    listed = (INERT | DROPOUT) & fields
    assert set(config_identity(config)) == fields - INERT - DROPOUT
    assert set(config_identity(config, training=True)) == fields - INERT
    expected = logits(load(kind, tmp_path))
    assert float(expected.std()) > 1e-3
    for name in sorted(listed | {"torch_dtype", "task_specific_params"}):
        other = OTHERS.get(name, 0.4)
        assert config.to_dict().get(name) != other, name
        model = load(kind, tmp_path, **{name: other})
        assert torch.equal(logits(model), expected), name
        assert config_differences(config_identity(config), model.config) == [], name


def test_the_list_has_no_field_that_is_not_tested() -> None:
    fields = {name for config_class, _, _ in MODELS.values() for name in config_class().to_dict()}
    assert (INERT | DROPOUT) - fields == {"torch_dtype", "task_specific_params"}, "those of older configurations"
    assert INERT - set(OTHERS) == set()


@pytest.mark.thin(8)
@pytest.mark.parametrize(
    ("kind", "field", "other"),
    [
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "layer_norm_epsilon", 0.1),
        ("gpt2", "n_head", 2),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("llama", "rms_norm_eps", 0.1),
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ("qwen2", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("qwen3", "layer_types", ["sliding_attention", "full_attention"]),
        ("gemma", "hidden_act", "relu"),
        ("gemma2", "attn_logit_softcapping", 1.0),
        ("gemma2", "final_logit_softcapping", 1.0),
        ("gemma2", "query_pre_attn_scalar", 2),
        ("gemma2", "sliding_window", 2),
        ("gemma3", "sliding_window", 2),
        ("opt", "do_layer_norm_before", False),
        ("opt", "activation_function", "gelu"),
        ("t5", "relative_attention_max_distance", 4),
        ("t5", "dense_act_fn", "gelu"),
        ("gpt_neox", "use_parallel_residual", False),
        ("bert", "layer_norm_eps", 0.1),
        ("bart", "scale_embedding", True),
    ],
)
def test_what_changes_outputs_is_named(kind: str, field: str, other: Any, tmp_path: Path) -> None:
    stored = config_identity(save(kind, tmp_path))
    if field == "layer_types":
        stored = config_identity(load(kind, tmp_path, sliding_window=4, use_sliding_window=True).config)
        model = load(kind, tmp_path, sliding_window=4, use_sliding_window=True, layer_types=other)
    else:
        model = load(kind, tmp_path, **{field: other})
    expected = logits(load(kind, tmp_path))
    assert not torch.equal(logits(model), expected), "it matters"
    found = config_differences(stored, model.config)
    assert found
    for path, old, new in found:
        name, *rest = path.removeprefix("checkpoint.config.").split(".")
        values = [stored.get(name), config_identity(model.config).get(name)]
        for key in rest:
            values = [value and value.get(key) for value in values]
        assert (old, new) == tuple(values)
    assert any(path.startswith(f"checkpoint.config.{field}") for path, _, _ in found)


@pytest.mark.thin(6)
@pytest.mark.parametrize("kind", MODELS)
def test_saved_again_it_is_the_same(kind: str, tmp_path: Path) -> None:
    config = save(kind, tmp_path / "one")
    load(kind, tmp_path / "one").save_pretrained(tmp_path / "two")
    again = load(kind, tmp_path / "two").config
    for training in (False, True):
        assert config_identity(again, training=training) == config_identity(config, training=training)
        assert json.loads(json.dumps(config_identity(config), allow_nan=False)) == config_identity(config)


def test_dropout_belongs_to_training() -> None:
    stored = config_identity(tf.GPT2Config(), training=True)
    other = tf.GPT2Config(resid_pdrop=0.3)
    assert config_differences(stored, other, training=True) == [("checkpoint.config.resid_pdrop", 0.1, 0.3)]
    assert config_differences(config_identity(tf.GPT2Config()), other) == []


def test_attention_kernels_and_the_padding_token() -> None:
    """Which kernel computes is in the manifest's `compute`. The embedding of the padding token has no gradient."""
    stored = config_identity(tf.GPT2Config())
    assert config_differences(stored, tf.GPT2Config(attn_implementation="eager")) == []
    assert config_differences(stored, tf.GPT2Config(pad_token_id=3)) == [("checkpoint.config.pad_token_id", None, 3)]


def test_nested_configurations() -> None:
    def config(**text: Any) -> Any:
        return tf.Gemma3Config(text_config={"num_hidden_layers": 2, **text})

    stored = config_identity(config())
    assert stored["text_config"]["rms_norm_eps"] == 1e-6
    assert "use_cache" not in stored["text_config"]
    assert config_differences(stored, config(use_cache=False, attention_dropout=0.5)) == []
    (found,) = config_differences(stored, config(rms_norm_eps=1e-3))
    assert found == ("checkpoint.config.text_config.rms_norm_eps", 1e-6, 1e-3)


ROPE = {"rope_type": "default", "rope_theta": 500.0}


def without(*names: str, **others: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda stored: {name: value for name, value in stored.items() if name not in names} | others


@pytest.mark.parametrize(
    ("older", "settings", "differs"),
    [
        (without("attention_bias", "mlp_bias"), {}, None),
        (without("attention_bias"), {"attention_bias": True}, "attention_bias"),
        (without("rope_parameters", rope_theta=500.0), {"rope_parameters": ROPE}, None),
        (without("rope_parameters", rope_theta=500.0), {}, "rope_parameters.rope_theta"),
        (without("head_dim"), {}, None),
        (without("head_dim"), {"head_dim": 2}, "head_dim"),
        (without(a_field_of_another_release=1), {}, "a_field_of_another_release"),
        (without("sliding_window"), {"sliding_window": 7}, "sliding_window"),
        (without(model_type="qwen2"), {}, "model_type"),
        (without(num_attention_heads="many"), {}, "num_attention_heads"),
    ],
)
def test_another_release_of_transformers(older: Any, settings: dict[str, Any], differs: str | None) -> None:
    """A field that the release before did not have is equal where it is what the class makes of the others."""
    shape = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    stored = older(
        config_identity(
            tf.LlamaConfig(**shape, **{name: value for name, value in settings.items() if name == "rope_parameters"})
        )
    )
    found = tf.LlamaConfig(**shape, **settings)
    names = [path.removeprefix("checkpoint.config.") for path, _, _ in config_differences(stored, found)]
    assert names == ([] if differs is None else [differs])
    assert agreed_config(stored, found) == (stored if differs is None else config_identity(found))


@pytest.mark.parametrize(
    "hostile",
    [
        {"num_hidden_layers": 10**12},
        {"n_layer": 10**12},
        {"text_config": {"num_hidden_layers": 10**12}},
        {"num_hidden_layers": "x" * 10**6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**12, "factor": -(10**12)}},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_stored_configuration_may_come_from_anywhere(hostile: dict[str, Any]) -> None:
    """A list of 10¹² layer types is not made of it."""
    found = tf.Qwen3Config(hidden_size=16, num_attention_heads=4, num_hidden_layers=2)
    stored = {name: value for name, value in config_identity(found).items() if name != "attention_bias"} | hostile
    assert any(next(iter(hostile)) in path for path, _, _ in config_differences(stored, found))


def test_numbers_that_json_does_not_know() -> None:
    config = tf.Mamba2Config()
    stored = json.loads(json.dumps(config_identity(config), allow_nan=False))
    assert stored["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert config_differences(stored, config) == []
    del stored["hidden_act"]  # as of a release without it: it is read into the class again
    assert config_differences(stored, config) == []
    assert config_differences(stored, tf.Mamba2Config(time_step_limit=(0.0, 9.0))) == [
        ("checkpoint.config.time_step_limit", [0.0, {"__float__": "Infinity"}], [0.0, 9.0])
    ]
    assert math.isinf(config.time_step_limit[1])
