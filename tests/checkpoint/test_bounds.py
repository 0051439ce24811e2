"""A checkpoint from anywhere: what it says of itself is held against its tensors, in words and in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghoststore.checkpoint.load import find_checkpoint, find_tokenizer, load_model, load_tokenizer
from ghoststore.errors import CheckpointError, UsageError
from tests.support.bounded import refused, run_bounded

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def model(lab: Lab, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab.checkpoint, tmp_path / "model"))


def build(lab: Lab, model: Path, *words: str) -> Outcome:
    store = model.parent / "store"
    return run_bounded(
        lab, "build", "--checkpoint", model, "--data", lab.corpus, "--store", store, "--dry-run", "--quiet", *words
    )


def load(model: Path) -> tuple[Any, Any]:
    return load_model(find_checkpoint(model)), load_tokenizer(find_tokenizer(model))


def cannot_be_loaded(model: Path, words: str | None = None) -> None:
    """In words, whichever of its files is the one."""
    with pytest.raises(CheckpointError, match=words):
        load(model)


def configure(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


ABSURD: list[dict[str, Any]] = [
    {"n_layer": 10**9},
    {"n_layer": 1e300},
    {"n_embd": 10**9},
    {"n_inner": 10**12},
    {"n_head": 10**9},
    {"n_positions": 10**9},
    {"vocab_size": 10**12},
    {"num_labels": 10**9},
    {"model_type": "qwen2", "num_hidden_layers": 10**9},
    {"model_type": "gptj", "n_positions": 10**9, "rotary_dim": 16},
    {"nested": {"num_experts": 10**9}},
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("place", range(len(ABSURD)))
def test_numbers_that_no_tensor_bears_out(lab: Lab, model: Path, place: int) -> None:
    configure(model, **ABSURD[place])
    refused(build(lab, model), str(model), codes=(2,))


@pytest.mark.slow
def test_a_model_is_not_made_to_its_end(lab: Lab, model: Path) -> None:
    """Layers that a larger checkpoint could have: the making stops as soon as there are too many."""
    configure(model, n_layer=60_000)
    refused(build(lab, model), "asks for a model with more than", codes=(2,))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_head": 0},
        {"n_embd": "wide"},
        {"n_layer": None},
        {"n_layer": -3},
        {"activation_function": "none of them"},
        {"model_type": ["gpt2"]},
        {"attn_implementation": "org/kernel"},
        {"_attn_implementation": "org/kernel"},
        {"attn_implementation": {"": "org/kernel"}},
    ],
)
def test_fields_that_cannot_be(lab: Lab, model: Path, fields: dict[str, Any]) -> None:
    configure(model, **fields)
    cannot_be_loaded(model)


def test_a_kernel_of_the_hub_is_code(lab: Lab, model: Path) -> None:
    with pytest.raises(UsageError, match="code of the hub"):
        load_model(find_checkpoint(model), attn_implementation="org/kernel")


@pytest.mark.thin(6)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "5", "null", "", NESTED, '{"a": ' * 5000, '{"x": ' + NESTED + "}"])
def test_files_that_hold_something_else(lab: Lab, model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    cannot_be_loaded(model)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("harm", [pipe, endless])
def test_special_files(lab: Lab, model: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(model / name)
    refused(build(lab, model), name.partition(".")[0], codes=(2,))


def header(path: Path, text: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


@pytest.mark.parametrize(
    "text",
    [
        NESTED.encode(),
        b"[]",
        b"7",
        b'{"t": ' * 500 + b"1" + b"}" * 500,
        b'{"t": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
        b'{"t": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}',
        b'{"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1000000000000]}}',
    ],
)
def test_headers_of_weights(lab: Lab, model: Path, text: bytes) -> None:
    header(model / "model.safetensors", text)
    cannot_be_loaded(model, r"model\.safetensors")


@pytest.mark.parametrize(
    "names", [{"a": "../../etc/passwd"}, {"a": "x\0y"}, {"a": "\ud800"}, {"a": 5}, [], {"a": ["b"]}]
)
def test_an_index_of_weights(lab: Lab, model: Path, names: Any) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    cannot_be_loaded(model)


def test_links_of_the_cache_of_the_hub_are_followed(lab: Lab, model: Path) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for path in list(model.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert all(load(model))


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "/no/such/folder", "\udce9"])
def test_names_that_no_checkpoint_has(name: str) -> None:
    with pytest.raises(CheckpointError):
        find_checkpoint(name)
    with pytest.raises(CheckpointError):
        find_tokenizer(name)
