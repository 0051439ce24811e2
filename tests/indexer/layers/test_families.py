"""The families of causal language models that people train, with padding, in all layers: vectors and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ghoststore.settings.projection import ProjectionConfig
from indexer.encode.engine import GradProjLoraEngine
from tests.indexer.dotprod.test_one_pass import WEIGHTS, held, near, plain, take_gradients
from tests.support.models import POSITIONS, VOCABULARY, causal_vectors, next_token_loss_of, settle
from tests.support.oracle import naive, relative_error
from tests.support.scoring import BATCH, VAL, causal_engine, causal_step, check, exact_causal

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
OF_ITS_OWN: dict[str, Any] = {"num_key_value_heads": None, "head_dim": None}
"""The configuration says itself what these are."""
ROUTED: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 3, "num_experts": 3, "n_routed_experts": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mistral": ("MistralConfig", {}, ""),
    "Qwen2": ("Qwen2Config", {}, ""),
    "Qwen3": ("Qwen3Config", {}, ""),
    "Gemma": ("GemmaConfig", {}, ""),
    "Gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 6}, ""),
    "Gemma3": ("Gemma3TextConfig", {}, ""),
    "Phi": ("PhiConfig", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, **OF_ITS_OWN, "num_attention_heads": 2}, ""),
    "Phi3": ("Phi3Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, ""),
    "Olmo2": ("Olmo2Config", {}, ""),
    "Cohere": ("CohereConfig", {}, ""),
    "Nemotron": ("NemotronConfig", {"hidden_dropout": 0.0}, ""),
    "Falcon": ("FalconConfig", {"hidden_dropout": 0.0, **OF_ITS_OWN}, ""),
    "Opt": (
        "OPTConfig",
        {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0, "activation_function": "gelu"},
        "OPTLearnedPositionalEmbedding",
    ),
    "Bloom": ("BloomConfig", {"n_head": 4, "hidden_dropout": 0.0, **OF_ITS_OWN}, ""),
    "Mixtral": ("MixtralConfig", ROUTED, "MixtralTopKRouter, MixtralExperts"),
    "Qwen2Moe": (
        "Qwen2MoeConfig",
        {**ROUTED, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20},
        "Qwen2MoeTopKRouter, Qwen2MoeExperts",
    ),
    "Olmoe": ("OlmoeConfig", ROUTED, "OlmoeTopKRouter, OlmoeExperts"),
    "DeepseekV3": (
        "DeepseekV3Config",
        {
            **ROUTED,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 6,
            "num_key_value_heads": 4,
            "head_dim": 4,
        },
        "DeepseekV3TopkRouter, DeepseekV3Experts",
    ),
    "GptOss": ("GptOssConfig", ROUTED, "GptOssAttention, GptOssTopKRouter, GptOssExperts"),
}
"""(class of the configuration, settings, the modules that run again for each sample) by family."""


def made(family: str) -> Any:
    name, settings, _ = FAMILIES[family]
    given = {key: value for key, value in {**SMALL, **settings}.items() if value is not None}
    config = getattr(transformers, name)(**given)
    config._attn_implementation = "eager"
    model = settle(AutoModelForCausalLM.from_config(config))
    return model


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_of_all_layers(family: str) -> None:
    model = made(family)
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total=16, compress="none")) as engine:
        vectors = causal_vectors(engine, model, BATCH)
        projection = engine.projection
    assert projection.plan.coverage == 1.0
    # DeepSeek's experts had another name until transformers 5.16.
    replayed = [name.replace("NaiveMoe", "Experts") for name in projection.plan.replayed]
    assert sorted(replayed) == sorted(filter(None, FAMILIES[family][2].split(", ")))
    expected = naive(model, projection, len(BATCH), next_token_loss_of(BATCH))
    assert relative_error(vectors, expected.vectors, expected.whole_norm()) < 1e-5


@pytest.mark.thin(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_all_parameters(family: str) -> None:
    model = made(family)
    exact = exact_causal(model, BATCH, VAL[:3])
    model.train()
    with causal_engine(model) as engine:
        check(causal_step(engine, model), exact)


def test_a_cache_that_is_written_in_place() -> None:
    """RWKV's, in the val pass: it is asked for none."""
    config = transformers.RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        attention_hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        context_length=POSITIONS,
    )
    model = settle(transformers.RwkvForCausalLM(config)).train()
    exact = exact_causal(model, BATCH, VAL[:3])
    with causal_engine(model) as engine:
        check(causal_step(engine, model), exact)


def test_default_layers_of_a_mixture_are_its_attention_router_and_experts() -> None:
    model = made("Mixtral")
    with GradProjLoraEngine(model, ProjectionConfig(rank_total=16, compress="none")) as engine:
        names = [layer.block.name for layer in engine.projection.plan.layers]
    layer = "model.layers.1."
    assert [name.removeprefix(layer) for name in names if name.startswith(layer)] == [
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]


def test_autocast_and_gradient_checkpointing() -> None:
    """A module that runs again does so in the dtype in which it ran, also where the forward pass runs twice."""
    model = made("Mixtral")
    with GradProjLoraEngine(model, ProjectionConfig(layers=("mlp",), rank_total=16, compress="none")) as engine:
        plain = causal_vectors(engine, model, BATCH)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = causal_vectors(engine, model, BATCH)
    assert 0 < float((narrow - plain).norm() / plain.norm()) < 0.05
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with causal_engine(model) as engine:
        check(causal_step(engine, model), exact_causal(made("Mixtral"), BATCH, VAL[:3]))


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_one_pass_choosing_forms_the_gradients_of_a_plain_step(family: str) -> None:
    model = made(family)
    expected = plain(model, WEIGHTS["chosen"])
    with causal_engine(model) as engine:
        for _ in range(2):
            held(engine).add_gradients(WEIGHTS["chosen"])
            near(take_gradients(model), expected, 1e-6)
