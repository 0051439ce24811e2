"""What README and tutorial show is run as it is written, in smaller sizes: commands, scripts, what comes of them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Lab

ROOT = Path(__file__).resolve().parent.parent
SMALLER = {
    '{"manual": 48}': '{"manual": 16}',
    '{"manual": 96}': '{"manual": 48}',
    '{"manual": 600, "docstring": 600, "code": 1200}': '{"manual": 60, "docstring": 60, "code": 180}',
    "(rows, 600)": "(rows, 75)",
    "--count 600": "--count 75",
    "--max-length 128": "--max-length 64",
    "--max-steps 300": "--max-steps 60",
    "--max-steps 75": "--max-steps 20",
    "checkpoint-300": "checkpoint-60",
}


def code(page: str, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of every block of these languages, in the order of the page."""
    pattern = rf"^```({'|'.join(languages)})\n(.*?)^```"
    return re.findall(pattern, (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def run(lab: Lab, block: str, folder: Path) -> str:
    """stdout of the ghoststore commands of a block, each of which must succeed."""
    out = ""
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("ghoststore "):
            outcome = lab.run(*shlex.split(line)[1:], cwd=folder)
            assert outcome.code == 0, f"{line}\n{outcome.err}"
            out += outcome.out
    return out


@pytest.mark.slow
def test_the_tutorial_makes_a_better_model(lab: Lab, tmp_path: Path) -> None:
    out = []
    for language, block in code("docs/tutorial.md", "bash", "python"):
        for whole, smaller in SMALLER.items():
            block = block.replace(whole, smaller)
        if language == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
        else:
            out.append(run(lab, block, tmp_path))
    train, scores, build, query, select, both = out
    assert "checkpoint  model/checkpoint-60" in train
    assert re.search(r"^  (\w+) ", scores.split("standard error")[1], flags=re.MULTILINE)[1] == "manual"  # type: ignore[index]
    assert "in store" in build
    assert "nearest to the val set's mean gradient" in query
    assert (tmp_path / "report.html").is_file()
    chosen = [json.loads(line)["domain"] for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert len(chosen) == 75
    assert "75 of 300 samples" in select
    assert chosen.count("manual") > 2 * 75 * 60 / 300
    best, random = (float(loss) for loss in re.findall(r"^val loss +([\d.]+) nats", both, flags=re.MULTILINE))
    assert best < random


@pytest.mark.slow
def test_the_example_of_the_readme(lab: Lab, tmp_path: Path) -> None:
    assert lab.run("demo", "--out", "ghoststore-demo", "--rows", "240", "--steps", "40", cwd=tmp_path).code == 0
    commands = [block.replace("checkpoint-700", "checkpoint-40") for _, block in code("README.md", "bash")[1:]]
    build, query, select = (run(lab, block, tmp_path) for block in commands)
    assert "built" in build
    shown_query, shown_select = (text for _, text in code("README.md", "text"))
    for line in shown_query.splitlines():
        if line.startswith(("nearest to", "metric:", "rank ")):
            assert line.split() in [told.split() for told in query.splitlines()]
    for line in shown_select.splitlines():
        if line.startswith(("rows  ", "  domain ")):
            assert line.split() in [told.split() for told in select.splitlines()]
    assert len((tmp_path / "best.jsonl").read_text().splitlines()) > 10
