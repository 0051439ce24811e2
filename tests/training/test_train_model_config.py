"""`ghoststore train --config FILE`: a new model of any configuration of a causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ghoststore
from ghoststore.errors import CheckpointError, MismatchError, UsageError
from indexer.training.architectures import config_name, model_name, new_model_of
from tests.support.trainings import same_bits

if TYPE_CHECKING:
    from tests.support.trainings import Gym

SIZES = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {
    "model_type": "llama",
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_key_value_heads": 1,
}
CONFIGS = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "gpt_neox": SIZES | {"model_type": "gpt_neox", "intermediate_size": 24, "max_position_embeddings": 64},
    "gpt2": {"model_type": "gpt2", "vocab_size": 400, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def write(path: Path, fields: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))
    return path


def scratch(gym: Gym, folder: Path, file: Path, **options: Any) -> Any:
    options = {"max_steps": 4, "eval_interval": 2, **options}
    return gym.fresh(folder, model=None, model_config=file, tokenizer=gym.models["tiny"], **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_new_model_is_trained_and_scored(gym: Gym, kind: str, tmp_path: Path) -> None:
    """From weights that the seed draws: the same again, others for another seed. transformers opens what is saved."""
    file = write(tmp_path / "config.json", CONFIGS[kind])
    trained = scratch(gym, tmp_path / "one", file)
    arrays, weights = trained.arrays(), trained.weights()
    assert torch.isfinite(torch.from_numpy(arrays["score"])).all()
    model = AutoModelForCausalLM.from_pretrained(trained.checkpoint())
    assert (model.config.model_type, model.config.vocab_size) == (kind, 400)
    manifest = trained.run.manifest["model"]
    assert (manifest["name"], manifest["checkpoint"]) == (config_name(file), None)
    again = scratch(gym, tmp_path / "again", file)
    assert same_bits(arrays, again.arrays()) == []
    assert same_bits(weights, again.weights()) == []
    assert same_bits(weights, scratch(gym, tmp_path / "other", file, seed=1).weights()) != []


def test_weights_follow_from_file_and_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "small" / "config.json", LLAMA | {"dtype": "bfloat16"})
    state = torch.random.get_rng_state()
    given = ((file, 1), (file.parent, 1), (file, 2))
    one, same, other = (new_model_of(path, seed=seed).state_dict() for path, seed in given)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert {value.dtype for value in one.values()} == {torch.float32}
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert (model_name(file), model_name(tmp_path / "mine.json")) == ("small", "mine")
    unread = ({}, {"dtype": "bfloat16"}, {"architectures": ["X"]})
    names = {config_name(write(tmp_path / "c.json", LLAMA | more)) for more in unread}
    assert len(names) == 1
    assert config_name(write(tmp_path / "c.json", LLAMA | {"initializer_range": 0.5})) not in names


@pytest.mark.slow
def test_another_configuration_is_another_training(gym: Gym, tmp_path: Path) -> None:
    """One that only draws other weights, too."""
    file = write(tmp_path / "own.json", LLAMA)
    scratch(gym, tmp_path, file, max_steps=2)
    for more in ({"initializer_range": 0.5}, {"rms_norm_eps": 1e-3}):
        write(file, LLAMA | more)
        with pytest.raises(MismatchError, match=r"model\.name"):
            scratch(gym, tmp_path, file, max_steps=2)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "encoder-decoder": ({"model_type": "t5"}, UsageError, "cannot be made"),
    "not causal": (SIZES | {"model_type": "bert", "intermediate_size": 24}, CheckpointError, "is not causal"),
    "unknown": ({"model_type": "no-such-model"}, UsageError, "cannot be made"),
    "code": (LLAMA | {"auto_map": {"AutoConfig": "x--y.Z"}}, UsageError, "code of its own"),
    "kernel": (LLAMA | {"attn_implementation": "a/b"}, CheckpointError, "fetched from the hub"),
    "quantized": (LLAMA | {"quantization_config": {"bits": 4}}, UsageError, "quantized"),
    "layers": (LLAMA | {"num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers"),
    "vocabulary": (LLAMA | {"vocab_size": 9}, UsageError, "embedding"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_such_model(gym: Gym, tmp_path: Path, case: str) -> None:
    fields, error, message = REFUSED[case]
    file = write(tmp_path / "given" / "config.json", fields)
    with pytest.raises(error, match=message):
        scratch(gym, tmp_path / "out", file)
    assert not (tmp_path / "out" / "store").exists()


def test_what_does_not_go_together(gym: Gym, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", LLAMA)
    for options in ({"architecture": "GPT2-Tiny"}, {"checkpoint": gym.models["tiny"]}):
        with pytest.raises(UsageError, match="give `architecture` or `model_config`"):
            scratch(gym, tmp_path / "out", file, **options)
    with pytest.raises(UsageError, match="`dropout` belongs to `architecture`"):
        scratch(gym, tmp_path / "out", file, dropout=0.1)
    with pytest.raises(UsageError, match="there is no such file"):
        scratch(gym, tmp_path / "out", tmp_path / "none.json")
    assert ghoststore.TrainConfig(model_config=str(file)).model_config == str(file)


@pytest.mark.slow
def test_the_command(gym: Gym, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", LLAMA)
    words = gym.words(tmp_path / "t", "--config", str(file), "--tokenizer", gym.models["tiny"], "--dry-run")
    place = words.index("--checkpoint")
    outcome = gym.lab.run("train", *words[:place], *words[place + 2 :])
    assert outcome.code == 0, outcome.err
    assert "model.layers.0.mlp" in outcome.out
    refused = gym.lab.run("train", *words)
    assert (refused.code, "give --architecture or --config to train from scratch" in refused.err) == (2, True)
