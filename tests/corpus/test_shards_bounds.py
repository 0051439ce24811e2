"""Token shards from anywhere: special files and nested JSON are refused, in words and in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghoststore.errors import CorruptError
from ghoststore.store.base.records import json_digest
from ghoststore.tokens.shards import TokenShards
from tests.support.bounded import refused, run_bounded

if TYPE_CHECKING:
    from tests.conftest import Lab

FROZEN = Path(__file__).parent.parent / "data" / "format1"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FROZEN / "shards", tmp_path / "shards"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "name", ["tokens-00000000.npy", "samples-00000001.npy", "commits/00000001.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("harm", [pipe, endless, nested])
def test_files_that_are_something_else(lab: Lab, shards: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(shards / name)
    words = ["build", "--checkpoint", FROZEN / "model", "--data", shards, "--store", shards.parent / "store", "--quiet"]
    outcome = run_bounded(lab, *words)
    if name.startswith("tokenizer") and outcome.code == 0:
        return  # the tokenizer of the checkpoint is used, and texts alone are shown by that of the shards
    refused(outcome, name.rpartition("/")[2], codes=(2, 4))


@pytest.mark.parametrize("section", ["tokenizer", "corpus", "storage", "source"])
def test_empty_sections(shards: Path, section: str) -> None:
    path = shards / "shards.json"
    value: dict[str, Any] = json.loads(path.read_text())
    del value["sha256"]
    value["manifest"][section] = {}
    path.write_text(json.dumps({**value, "sha256": json_digest(value)}))
    with pytest.raises(CorruptError, match=section):
        TokenShards.open(shards)


def test_nested_metadata(shards: Path) -> None:
    nested(shards / "shards.json")
    with pytest.raises(CorruptError, match="nests deeper"):
        TokenShards.open(shards)
