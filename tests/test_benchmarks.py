"""The benchmark of GPUs runs on a CPU, too, with tiny sizes: its code is tested where no GPU is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_section(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--tiny", "--out", tmp_path]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())["numbers"]
    assert numbers["failed"] == []
    assert set(numbers["sections"]) == {"machine", "build", "step", "kernels", "search", "index"}
