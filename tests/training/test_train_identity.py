"""A training goes on with the model and the tokenizer that it began with, and with no other: exit code 3, the field and
both values named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import CorruptError, MismatchError
from ghoststore.store.base.records import json_digest

if TYPE_CHECKING:
    from tests.support.trainings import Gym, Trained

Edit = Callable[[dict[str, Any]], Any]


def edit(path: Path, change: Edit) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_state(folder: Path, change: Edit) -> None:
    """What the newest checkpoint says of its run, under its checksum."""

    def sealed(value: dict[str, Any]) -> None:
        del value["sha256"]
        change(value["identity"])
        value["sha256"] = json_digest(value)

    edit(folder / "out" / "checkpoint-6" / "training_state" / "state.json", sealed)


def edit_run(folder: Path, change: Edit) -> None:
    """The manifest of the run, under its checksum."""

    def sealed(value: dict[str, Any]) -> None:
        attributes = value["attributes"]
        change(attributes["manifest"])
        attributes["manifest_sha256"] = json_digest(attributes["manifest"])

    edit(folder / "store" / "runs" / "run" / "zarr.json", sealed)


@pytest.fixture(scope="module")
def begun(gym: Gym) -> Path:
    """A folder with a model and a training of six steps from it."""
    folder = gym.folder / "identity"
    shutil.copytree(gym.models["tiny"], folder / "model")
    train(gym, folder)
    return folder


@pytest.fixture
def own(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "own")
    return tmp_path / "own"


def train(gym: Gym, folder: Path, **options: Any) -> Trained:
    return gym.fresh(folder, model=None, checkpoint=folder / "model", max_steps=6, checkpoint_interval=3, **options)


def refused(gym: Gym, folder: Path, expected: str, **options: Any) -> None:
    before = gym.lab.tree(folder)
    with pytest.raises(MismatchError) as caught:
        train(gym, folder, **options)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 3
    assert gym.lab.tree(folder) == before


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("field", "stored", "asked"),
    [
        ("activation_function", "gelu_new", "relu"),
        ("layer_norm_epsilon", 1e-05, 0.5),
        ("n_head", 2, 4),
        ("scale_attn_weights", True, False),
        ("resid_pdrop", 0.0, 0.3),
        ("attn_pdrop", 0.0, 0.3),
    ],
)
def test_another_configuration_of_the_start(gym: Gym, own: Path, field: str, stored: Any, asked: Any) -> None:
    edit(own / "model" / "config.json", lambda value: value.update({field: asked}))
    refused(gym, own, f"model.checkpoint.config.{field}: stored {stored!r}, asked for {asked!r}")


def test_the_command_line(gym: Gym, own: Path) -> None:
    edit(own / "model" / "config.json", lambda value: value.update(activation_function="relu"))
    words = (
        "--checkpoint",
        own / "model",
        "--max-steps",
        "6",
        "--checkpoint-interval",
        "3",
        "--learning-rate",
        "5e-3",
        "--val-refresh-interval",
        "1",
        "--eval-interval",
        "10",
    )
    outcome = gym.run(own, *words)
    assert outcome.code == 3, outcome.err
    assert "model.checkpoint.config.activation_function: stored 'gelu_new', asked for 'relu'" in outcome.err


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda value: value.update(normalizer={"type": "Lowercase"}),
            "tokenizer.normalizer: stored None, asked for {'type'",
        ),
        (
            lambda value: value["pre_tokenizer"].update(add_prefix_space=True),
            "tokenizer.pre_tokenizer.add_prefix_space: stored False, asked for True",
        ),
    ],
    ids=["normalizer", "pre-tokenizer"],
)
def test_another_tokenizer(gym: Gym, own: Path, change: Edit, expected: str) -> None:
    edit(own / "model" / "tokenizer.json", change)
    refused(gym, own, expected)


def test_another_tokenizer_than_that_of_token_shards(gym: Gym, own: Path) -> None:
    ghoststore.tokenize(data=gym.data["plain"], tokenizer=own / "model", out=own / "shards")
    edit(own / "model" / "tokenizer.json", lambda value: value.update(normalizer={"type": "Lowercase"}))
    refused(gym, own, "tokenizer.normalizer: stored None, found {'type': 'Lowercase'}", data=own / "shards")


def test_an_edited_configuration_of_a_checkpoint(gym: Gym, own: Path) -> None:
    """What a checkpoint holds is under checksums: a file that is not what was written is damage, and named."""
    edit(own / "out" / "checkpoint-6" / "config.json", lambda value: value.update(activation_function="relu"))
    with pytest.raises(CorruptError, match=r"checkpoint-6/config\.json is not what was written"):
        train(gym, own)


def test_a_checkpoint_of_another_configuration(gym: Gym, own: Path) -> None:
    """Its checksums are right, and it is still not the model that the run says."""
    path = own / "out" / "checkpoint-6"
    edit(path / "config.json", lambda value: value.update(activation_function="relu"))

    def resealed(value: dict[str, Any]) -> None:
        from dataclasses import asdict

        from ghoststore.store.base.records import FileRecord

        del value["sha256"]
        value["files"]["config.json"] = asdict(FileRecord.of(path / "config.json"))
        value["sha256"] = json_digest(value)

    edit(path / "training_state" / "state.json", resealed)
    refused(gym, own, "model.config.activation_function: stored 'gelu_new', asked for 'relu'")


def test_what_changes_nothing_goes_on(gym: Gym, own: Path) -> None:
    edit(own / "model" / "config.json", lambda value: value.update(use_cache=False, initializer_range=0.5))
    assert train(gym, own).report.resumed_from == 6


def test_a_field_that_another_release_did_not_have(gym: Gym, own: Path) -> None:
    def older(sections: dict[str, Any]) -> None:
        del sections["model"]["config"]["add_cross_attention"]
        del sections["model"]["checkpoint"]["config"]["reorder_and_upcast_attn"]

    edit_state(own, older)
    edit_run(own, older)
    assert train(gym, own).report.resumed_from == 6
