"""Every example runs as its own first lines say, and shows what it is there to show."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.accelerators import fresh_accelerator

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

RUNS: list[tuple[str, str]] = [
    ("ghost_mlp.py", r"mean cumulative score: -[\d.]+ of the wrongly labelled, \+[\d.]+ of the others"),
    ("ghost_gradproj_mlp.py --mode project --proj-rank-total 64", r"32 samples, \d+ numbers each"),
    ("ghost_gradproj_mlp.py --mode non_interf", r"bit-identical with the engine: True\n.*trainable again: True"),
    ("ghost_gradproj_mlp.py --mode naive_check", r"difference from batch-of-one autograd: \d\.\de-0[6-9]"),
    ("ghost_gradproj_lm.py --proj-layers attn.c_attn,mlp.c_fc", r"1\. cosine 0\.\d+  the river runs to the sea"),
    (
        "manager_loop.py --method GradDotProd",
        r"steps in the store: 12\nsamples of step 0: \[\d+.*\ntheir scores: \[-?0\.",
    ),
    ("manager_loop.py --method GradProjLora", r"method GradProjLora, 12 steps.*\nsteps in the store: 12"),
    ("manager_loop.py --method Regular", r"method Regular, 12 steps, last loss \d"),
    ("plain_loop.py", r"mean value of rows that count: \+[\d.]+, of noise: "),
    ("nanogpt_loop.py", r"mean score of blocks that count: \+[\d.]+, of noise: "),
    (
        "session.py",
        r"20 rows.*\n  \+0\.\d+ nats  the river runs to the sea .*\n[\s\S]* sums-\d\n.* rain-\d\n.*\(5, 16384\)",
    ),
    ("trainer_callback.py", r"steps in the store: 12; scores of the last: \["),
    ("accelerate_loop.py", r"mean score of rows that count: \+[\d.]+, of noise: "),
    ("trl_sft.py", r"steps in the store: 6; samples scored: 24; .*\n[+-]\d\.\d+  \w+"),
    ("trl_sft.py --packing", r"steps in the store: 6; samples scored: (?!24;)\d+; .*\n[+-]\d\.\d+  \w+"),
]


@pytest.mark.thin(3)
@pytest.mark.parametrize(("line", "telling"), RUNS, ids=[line for line, _ in RUNS])
def test_an_example(
    line: str, telling: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *arguments = line.split()
    if script.startswith("trl_"):
        pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with fresh_accelerator():
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(telling, out), out


@pytest.mark.slow
def test_an_example_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, EXAMPLES / "ghost_gradproj_mlp.py", "--mode", "naive_check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "largest relative difference" in done.stdout
    assert not list(tmp_path.iterdir())


def test_every_example_is_run_as_it_says() -> None:
    run = {line for line, _ in RUNS}
    for script in EXAMPLES.glob("*.py"):
        assert any(line.split()[0] == script.name for line in run), script.name
        shown = re.findall(r"^python examples/(.+?)(?: +#.*)?$", script.read_text(), flags=re.MULTILINE)
        assert shown, script.name
        assert set(shown) <= run, script.name
        assert f"`{script.name}`" in (EXAMPLES / "README.md").read_text()
