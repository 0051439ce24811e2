"""What a command says one may do next: it runs as it is pasted."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from ghoststore.cli import terminal
from ghoststore.cli.build import QUESTIONS
from ghoststore.cli.terminal import print_next
from query.search.second_moment import LARGEST_BLOCK

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome


def next_of(outcome: Outcome) -> list[str]:
    assert outcome.code == 0, outcome.err
    _, _, after = outcome.out.partition("\nnext\n")
    return [line.strip() for line in after.splitlines()]


def pasted(lab: Lab, line: str, folder: Path) -> Outcome:
    """A line as a shell runs it: ``ghoststore …``, or ``echo … | ghoststore …``, whose words go to a file here."""
    *before, words = [shlex.split(piece) for piece in line.split(" | ")]
    for echo, text in before:
        assert echo == "echo"
        (folder / "asked.jsonl").write_text(text + "\n")
        words = ["asked.jsonl" if word == "-" else word for word in words]
    assert words[0] == "ghoststore"
    return lab.run(*words[1:], cwd=folder)


ROWS: dict[str, Any] = {
    "text": {"text": "the cat sees a dog"},
    "prompt-completion": {"prompt": "the cat", "completion": " sees a dog"},
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ROWS)
def test_after_a_build(lab: Lab, tmp_path: Path, kind: str) -> None:
    """Of a store whose name a shell would cut, beside another part."""
    lab.write(tmp_path / "train.jsonl", [{"id": str(row), **ROWS[kind]} for row in range(3)])
    words = ["build", "--checkpoint", lab.checkpoint, "--data", "train.jsonl", "--store", "my store"]
    assert lab.run(*words, "--name", "other", cwd=tmp_path).code == 0
    lines = next_of(lab.run(*words, cwd=tmp_path))
    assert [shlex.split(line)[0] for line in lines] == ["echo", "ghoststore", "ghoststore"]
    assert QUESTIONS[kind] in lines[0]
    for line in lines:
        outcome = pasted(lab, line, tmp_path)
        assert outcome.code == 0, (line, outcome.err)
        assert outcome.out
    for more in (["--json"], ["--dry-run"]):
        assert "\nnext\n" not in lab.run(*words, *more, cwd=tmp_path).out


def test_after_a_build_with_a_block_too_large_for_self_influence(lab: Lab, tmp_path: Path) -> None:
    """No matrix of so many numbers is made: self-influence refuses such a part, and is not proposed."""
    lab.write(tmp_path / "train.jsonl", [{"text": "the cat sees a dog"}])
    words = ["build", "--checkpoint", lab.checkpoint, "--data", "train.jsonl", "--store", "store"]
    words += ["--proj-precondition", "none", "--proj-layers", "all", "--proj-compress", str(LARGEST_BLOCK + 1)]
    lines = next_of(lab.run(*words, cwd=tmp_path))
    assert [line.rpartition("ghoststore ")[2].split()[0] for line in lines] == ["query", "info"]
    assert all(pasted(lab, line, tmp_path).code == 0 for line in lines)
    assert "a matrix of at most" in lab.run("self-influence", "--store", "store", cwd=tmp_path).err


def test_after_a_build_without_a_row_to_ask_for(lab: Lab, tmp_path: Path) -> None:
    lab.write(tmp_path / "train.jsonl", [{"text": ""}])
    words = ["build", "--checkpoint", lab.checkpoint, "--data", "train.jsonl", "--store", "store"]
    words += ["--proj-precondition", "none"]
    assert next_of(lab.run(*words, cwd=tmp_path)) == []


def test_after_a_training(lab: Lab, tmp_path: Path) -> None:
    lab.write(tmp_path / "my train.jsonl", lab.rows[:4])
    words = ["train", "--data", "my train.jsonl", "--val-set", "my train.jsonl", "--checkpoint", lab.checkpoint]
    words += ["--store", "my store", "--output-dir", "out", "--batch-size", "2", "--max-steps", "2", "--device", "cpu"]
    lines = next_of(lab.run(*words, cwd=tmp_path))
    assert [line.split()[1] for line in lines] == ["scores", "build"]
    for line in lines:
        outcome = pasted(lab, line, tmp_path)
        assert outcome.code == 0, (line, outcome.err)


def test_no_line_is_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal that is narrower: a line that is pasted must be one."""
    monkeypatch.setattr(terminal, "stdout_console", lambda: Console(width=40, force_terminal=True, color_system=None))
    command = f"ghoststore query --store {'s' * 60} --part {'p' * 60}"
    print_next([command])
    assert capsys.readouterr().out == f"next\n  {command}\n"
