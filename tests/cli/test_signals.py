"""Ctrl-C and SIGTERM in any command: one sentence that is true, no traceback, exit status 130 or 143."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghoststore.cli import AFTER_INTERRUPT, COMMANDS, RESUMES, STARTS_OVER

if TYPE_CHECKING:
    from tests.conftest import Lab

CODES = {"SIGINT": (130, "Interrupted."), "SIGTERM": (143, "Terminated.")}

AT_THE_STORE = """
import signal
import ghoststore.store.store
real = ghoststore.store.store.Store.open

def opened(path):
    signal.raise_signal(signal.{signal})
    return real(path)

ghoststore.store.store.Store.open = staticmethod(opened)
import ghoststore.cli
ghoststore.cli.main({words!r})
"""
AS_IT_STARTS = """
import signal
import indexer.training.train
indexer.training.train.Start.find = lambda *_: signal.raise_signal(signal.{signal})
import ghoststore.cli
ghoststore.cli.main({words!r})
"""
WORKERS = """
import os, signal
import indexer.tokenize.workers
real, waits = indexer.tokenize.workers.wait, []

def wait(pipes):
    waits.append(pipes)
    if len(waits) == 4:
        signal.raise_signal(signal.{signal})
    return real(pipes)

indexer.tokenize.workers.wait = wait
import ghoststore.cli
ghoststore.cli.main({words!r})
"""


@pytest.mark.parametrize("signal", CODES)
@pytest.mark.parametrize("command", ["query", "scores", "verify", "watch", "index"])
def test_a_command_that_starts_over(lab: Lab, built: Path, command: str, signal: str) -> None:
    """It does not promise to resume what it does not write."""
    words = [command, "--store", str(built)]
    if command == "query":
        words += ["--val-set", str(lab.corpus), "--checkpoint", str(lab.checkpoint)]
    outcome = lab.run(code=AT_THE_STORE.format(signal=signal, words=words))
    code, word = CODES[signal]
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.strip().splitlines()[-1] == f"{word} {AFTER_INTERRUPT.get(command, STARTS_OVER)}".strip()
    assert "Traceback" not in outcome.err


@pytest.mark.thin(1)
@pytest.mark.kill
@pytest.mark.parametrize("signal", CODES)
def test_a_build(lab: Lab, built: Path, signal: str, tmp_path: Path) -> None:
    act = {"SIGINT": "interrupt", "SIGTERM": "terminate"}[signal]
    fault = {"call": "name", "path": r"commits/00000002\.json$", "when": "after", "act": act}
    outcome = lab.build(tmp_path / "store", fault=fault)
    code, word = CODES[signal]
    assert (outcome.code, outcome.err.strip()) == (code, f"{word} {RESUMES}")
    assert lab.build(tmp_path / "store").code == 0
    assert lab.tree(tmp_path / "store") == lab.tree(built)


@pytest.mark.parametrize("signal", CODES)
def test_a_training_that_has_not_begun(lab: Lab, signal: str, tmp_path: Path) -> None:
    """It does not say that something is committed: nothing is written."""
    words = ["train", "--architecture", "GPT2-Tiny", "--tokenizer", str(lab.checkpoint), "--data", str(lab.corpus)]
    words += ["--output-dir", str(tmp_path / "run"), "--max-steps", "1"]
    words += ["--store", str(tmp_path / "store"), "--val-set", str(lab.corpus)]
    outcome = lab.run(code=AS_IT_STARTS.format(signal=signal, words=words))
    code, word = CODES[signal]
    sentence = "The same command starts again, or goes on from its newest checkpoint."
    assert (outcome.code, outcome.err.strip()) == (code, f"{word} {sentence}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("signal", CODES)
def test_tokenizing_side_by_side(lab: Lab, signal: str, tmp_path: Path) -> None:
    """The workers end, too, and say nothing."""
    words = ["tokenize", "--data", str(lab.corpus), "--tokenizer", str(lab.checkpoint), "--out", str(tmp_path / "out")]
    words += ["--shard-samples", "4", "--workers", "2", "--quiet"]
    outcome = lab.run(code=WORKERS.format(signal=signal, words=words))
    code, word = CODES[signal]
    assert (outcome.code, outcome.err.strip()) == (code, f"{word} {RESUMES}")
    assert lab.run(*words).code == 0


def test_every_command_that_promises_to_resume_is_one() -> None:
    assert set(AFTER_INTERRUPT) <= set(COMMANDS)
