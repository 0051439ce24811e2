"""Small models of transformers' language model classes, with random weights.

A configuration is that of the class, with every size that it has replaced by a small one: by the name of the attribute,
in sub-configurations too, and by :data:`OWN` for what names do not say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Task = Literal["causal", "seq2seq", "masked"]

VOCABULARY = 128
"""Rows of the embeddings. Samples hold ids from 8 to 99: those above are special ones of pictures and sound."""
WIDTH, HEADS, KEY_HEADS, LAYERS, EXPERTS = 64, 4, 2, 2, 4
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "emb_dim"), WIDTH),
    **dict.fromkeys(("model_dim", "word_embed_proj_dim", "attention_hidden_size", "dim_model", "width"), WIDTH),
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "lru_width", "hidden_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "num_decoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), KEY_HEADS),
    **dict.fromkeys(("head_dim", "dim_head", "d_kv", "kv_channels", "attention_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "global_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "ffn_hidden_size", "dff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_proj_dim", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("shared_intermediate_size", "feedforward_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "context_length"), 64),
    **dict.fromkeys(("vocab_size", "n_vocab", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("src_vocab_size", "tgt_vocab_size", "bert_vocab_size"), VOCABULARY),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention_window_size"), 32),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    "hidden_size_per_layer_input": 16,
    "type_vocab_size": 2,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_num_heads": 4,
    "n_mamba_heads": 2,
    "mamba_head_dim": 32,
    "mamba_n_groups": 1,
    "mamba_headdim": 32,
    "n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "expert_capacity": 64,
    "zero_expert_num": 2,
    "hidden_size_global": WIDTH,
    "laurel_rank": 8,
}
ZERO = ("dropout", "drop_prob", "pdrop", "layerdrop", "jitter", "drop_rate", "drop_path", "noise_epsilon")
"""Parts of the names of numbers that make a forward pass random."""
LATENT = {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": HEADS}
LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
"""Names of lists with an entry for each layer: a model has one layer at least of every kind."""
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "mask_token_id": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ZAMBA = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS}
COMPRESSED, HEAVILY = "compressed_sparse_attention", "heavily_compressed_attention"
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE | {"mrope_section": [4, 2, 2]}),
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": KEY_HEADS, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16, "compress_rates": {COMPRESSED: 2, HEAVILY: 4}},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16, "shared_experts_intermediate_size": 48},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 128},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 16, "d_inner": 96},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "mamba2": {"head_dim": 32},
    "ministral": {"head_dim": 16},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "nemotron": {"num_key_value_heads": KEY_HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": VOCABULARY},
    "xlstm": {"embedding_dim": WIDTH},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3, **ZAMBA},
    "zamba2": {"mamba_headdim": 64, **ZAMBA},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}
"""By model type: what the names of the sizes do not say."""
LEFT_OUT = {
    "Gemma3nForConditionalGeneration": "needs timm for its pictures; its language model is Gemma3nForCausalLM",
    "Gemma4AssistantForCausalLM": "drafts tokens from the states of another model: it takes no input_ids",
    "Gemma4UnifiedAssistantForCausalLM": "drafts tokens from the states of another model: it takes no input_ids",
    "MusicgenForCausalLM": "its rows are the codebooks of sound, (B · codebooks, T), and its logits are those of each",
    "MusicgenMelodyForCausalLM": "its rows are the codebooks of sound, (B · codebooks, T)",
    "Nemotron3_5TranscribeForConditionalGeneration": "takes sound",
    "PerceiverForMaskedLM": "takes bytes padded to one length, and has no input_ids",
    "ReformerForMaskedLM": "its reversible layers go backward in train mode alone",
    "ReformerModelWithLMHead": "its reversible layers go backward in train mode alone",
    "VibeVoiceAsrForConditionalGeneration": "takes sound",
    "VoxtralRealtimeForConditionalGeneration": "takes sound",
}
"""Classes that are no language model of token ids by themselves, or that a small configuration cannot make."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of transformers, under a model type that has it: the one it is named after, if there is one."""

    name: str
    model_type: str
    task: Task


def architectures() -> list[Architecture]:
    """All language model classes, by name; a class that has several model types appears once."""
    found: dict[str, Architecture] = {}
    mappings: tuple[tuple[Task, Mapping[str, Any]], ...] = (
        ("causal", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("masked", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    )
    for task, mapping in mappings:
        for model_type, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                own = name.lower().startswith(re.sub(r"\W|_", "", model_type))
                if name not in found or (own and task == found[name].task):
                    found[name] = Architecture(name, model_type, task)
    return sorted((a for a in found.values() if a.name not in LEFT_OUT), key=lambda architecture: architecture.name)


def small_config(model_type: str, task: Task) -> PreTrainedConfig:
    """A configuration of ``model_type`` with small sizes."""
    kind = CONFIG_MAPPING[model_type]
    if model_type == "encoder-decoder":
        return kind.from_encoder_decoder_configs(small_config("bert", "masked"), small_config("bert", "causal"))
    given = _small(kind(), model_type)
    if task == "causal" and hasattr(kind(), "is_decoder"):
        given["is_decoder"] = True
    return kind(**given)


def _small(config: PreTrainedConfig, model_type: str) -> dict[str, Any]:
    """The arguments that make a configuration like ``config`` small."""
    given: dict[str, Any] = {}
    named = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    extra = 100
    for name, value in named.items():
        if isinstance(value, PreTrainedConfig):
            given[name] = type(value)(**_small(value, value.model_type))
        elif name in SPECIAL:
            given[name] = SPECIAL[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            extra += 1
            given[name] = extra
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            given[name] = SIZES[name]
        elif any(part in name for part in ZERO) and isinstance(value, float):
            given[name] = 0.0
    if "qk_rope_head_dim" in named:  # multi-head latent attention: the rotated part alone has a head_dim
        given |= {name: size for name, size in LATENT.items() if name in named}
    kinds = {name: list(dict.fromkeys(named[name])) for name in LISTS if isinstance(named.get(name), list | tuple)}
    layers = max([LAYERS, *map(len, kinds.values())])
    for name in ("num_hidden_layers", "num_layers"):
        if name in given and kinds:
            given[name] = layers
    given.update({name: (different * layers)[:layers] for name, different in kinds.items() if different})
    return given | OWN.get(model_type, {})


def small_model(architecture: Architecture, seed: int = 0) -> nn.Module:
    """A float32 model with eager attention in eval mode.

    Its weights are those of a fresh model plus noise: a weight of zeros or ones would hide an error.
    """
    config = small_config(architecture.model_type, architecture.task)
    config._attn_implementation = "eager"
    kind = getattr(transformers, architecture.name)
    if not isinstance(config, kind.config_class):  # the language model of one that also takes pictures or sound
        config = next(value for value in vars(config).values() if isinstance(value, kind.config_class))
    torch.manual_seed(seed)
    model = kind(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model
