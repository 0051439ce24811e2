"""Disks that refuse in the middle of a file, whoever writes it: Python, or a library in Rust with errors of its own.

A limit on the size of a process's files stands for the full disk: it needs no rights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from indexer.training.state import checkpoints, read_state

if TYPE_CHECKING:
    from tests.conftest import Lab

LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import ghoststore.cli
ghoststore.cli.main({words!r})
"""
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS")


def words_of(lab: Lab, command: str, folder: Path) -> list[str]:
    """A command line that writes into ``folder``."""
    given: dict[str, list[str | Path | int]] = {
        "tokenize": ["--tokenizer", lab.checkpoint, "--out", folder / "tokens", "--shard-samples", 6],
        "full-gradients": ["--checkpoint", lab.checkpoint, "--out", folder / "gradients", "--max-samples", 3],
        "train": [
            *("--val-set", lab.corpus, "--checkpoint", lab.checkpoint, "--device", "cpu", "--name", "run"),
            *("--output-dir", folder / "out", "--store", folder / "store", "--batch-size", 3, "--max-steps", 6),
            *("--eval-interval", 6, "--checkpoint-interval", 3, "--dot-prod-save-interval", 2, "--val-batch-size", 3),
        ],
    }
    return [command, "--data", str(lab.corpus), *map(str, given[command]), "--quiet"]


def refused(lab: Lab, words: list[str], limit: int) -> str:
    """The one sentence of a command whose files may have ``limit`` bytes."""
    outcome = lab.run(code=LIMITED.format(limit=limit, words=words))
    assert outcome.code == 6, outcome.err
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("Error: cannot write ")
    assert "File too large" in line
    assert line.endswith("What was committed is intact: the same command resumes")
    return line


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("command", "limit", "what"),
    [
        ("tokenize", 2_000, "tokens"),
        ("full-gradients", 60_000, "gradients-00000.safetensors"),
        ("train", 2_000, "tokens"),
        ("train", 60_000, "checkpoint-3"),
        ("train", 120_000, "checkpoint-3"),
    ],
)
def test_a_file_that_does_not_fit(lab: Lab, command: str, limit: int, what: str, tmp_path: Path) -> None:
    """Exit 6 and one sentence; what is committed is whole, nothing lies about, and the same command goes on."""
    words = words_of(lab, command, tmp_path)
    assert what in refused(lab, words, limit)
    assert [path for path in tmp_path.rglob("*.tmp") if path.name.startswith(".")] == []
    for path in checkpoints(tmp_path / "out"):
        read_state(path)
    if (tmp_path / "store/runs/run").exists():
        assert ghoststore.verify(tmp_path / "store").sound
    again = lab.run(*words)
    assert again.code == 0, again.err


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("command", "call", "path"),
    [
        ("tokenize", "fsync", r"tokens-00000001"),
        ("tokenize", "name", r"commits/00000002\.json$"),
        ("full-gradients", "fsync", r"gradients-00000\.safetensors"),
        ("full-gradients", "name", r"manifest\.json$"),
        ("train", "fsync", r"journal/00000000\.log$"),
        ("train", "name", r"commits/00000000\.json$"),
        ("train", "fsync", r"checkpoint-6.*state\.json$"),
        ("train", "name", r"out/checkpoint-3$"),
    ],
)
def test_a_disk_that_refuses(lab: Lab, command: str, call: str, path: str, error: str, tmp_path: Path) -> None:
    words = words_of(lab, command, tmp_path)
    outcome = lab.run(*words, fault={"call": call, "path": path, "act": error})
    assert outcome.code == 6, outcome.err
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("Error: cannot write ")
    again = lab.run(*words)
    assert again.code == 0, again.err
