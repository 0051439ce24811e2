"""LoRA adapters of every kind that is read, with weights that are not those of their beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LINEARS = ["q_proj", "v_proj", "down_proj"]
OF_LLAMA: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEARS},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "ranks": {"target_modules": LINEARS, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "o_proj"]},
    "dora embeddings": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
}
OF_GPT2: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    "saved": {"target_modules": ["c_fc"], "modules_to_save": ["wte"]},
}


def adapted(model: Any, seed: int = 0, **settings: Any) -> Any:
    """A PeftModel around ``model``, in eval mode, with weights drawn at random."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 5, **settings})
    peft = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft


def save_adapter(folder: Path, base: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter of the model saved in ``base``, as `save_pretrained` of peft writes it."""
    from transformers import AutoModelForCausalLM

    peft = adapted(AutoModelForCausalLM.from_pretrained(base), seed, **settings)
    peft.save_pretrained(folder)
    return folder
