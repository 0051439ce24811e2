"""New models: GPT-2 in its published sizes (Radford et al. 2019, table 2), a small one, and of configuration files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ghoststore.checkpoint.bounds import CONFIG, check_config, read_object
from ghoststore.checkpoint.load import quiet_transformers, refuse_lookahead
from ghoststore.errors import CheckpointError, UsageError
from indexer.encode.modes import reseed


class Shape(NamedTuple):
    """Layers, width, heads."""

    layers: int
    width: int
    heads: int


ARCHITECTURES = {
    "GPT2-Tiny": Shape(4, 128, 4),
    "GPT2-Small": Shape(12, 768, 12),
    "GPT2-Medium": Shape(24, 1024, 16),
    "GPT2-Large": Shape(36, 1280, 20),
}
POSITIONS = 1024


def architecture(name: str, tokenizer: Any, *, dropout: float = 0.0) -> GPT2Config:
    """The configuration called ``name`` for the vocabulary of ``tokenizer``; UsageError with the known names."""
    known = {key.lower(): shape for key, shape in ARCHITECTURES.items()}
    shape = known.get(name.lower())
    if shape is None:
        raise UsageError(f"`architecture` {name!r} is unknown; known: {', '.join(ARCHITECTURES)}")
    vocabulary = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: GPT2Config, *, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with weights drawn from ``seed``; torch's own generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        reseed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what transformers takes anyway, after a warning
    return model


UNREAD = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype")
"""Fields of a configuration file that say nothing of a new model."""


def new_model_of(path: str | Path, *, seed: int) -> Any:
    """A causal language model of the configuration file ``path`` (or of the config.json of a folder), in float32, with
    weights drawn from ``seed``; torch's own generators are left as they were.

    UsageError or CheckpointError for a file that is no configuration of such a model, that asks for code of the hub or
    for quantized weights, and for a model that is not causal.
    """
    file = _file(path)
    asked = _read(file)
    if "auto_map" in asked:
        raise UsageError(
            f"`model_config={path}` asks for code of its own (auto_map), which is not run; remove the entry"
        )
    if asked.get("quantization_config") is not None:
        raise UsageError(f"`model_config={path}` is of quantized weights; remove its quantization_config")
    check_config(file, [])
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
            config.dtype = torch.float32  # weights are drawn in it, whatever they are kept in
            reseed(seed)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
            refuse_lookahead(model, file)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises what it likes for a wrong field
        reason = str(error) or type(error).__name__
        raise UsageError(f"a new model of `model_config={path}` cannot be made: {reason:.500}") from error
    return model


def config_name(path: str | Path) -> str:
    """What tells the new models of one configuration file from those of another: a digest of all its fields, those
    that say how weights are drawn among them.
    """
    fields = {name: value for name, value in _read(_file(path)).items() if name not in UNREAD}
    return f"config sha256:{hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}"


def model_name(path: str | Path) -> str:
    """The name of a checkpoint or configuration file: that of the folder, where the file is called config.json."""
    resolved = Path(path).resolve()
    return resolved.parent.name if resolved.name == CONFIG else resolved.name.removesuffix(".json")


def _file(path: str | Path) -> Path:
    return Path(path) / CONFIG if Path(path).is_dir() else Path(path)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"`model_config={file}`: there is no such file; give a config.json of transformers")
    return dict(read_object(file))
