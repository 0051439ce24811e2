"""Benchmarks that need what is not there run without it, with tiny sizes: no GPU, no other libraries."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
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


def corpus(path: Path, rows: int, first: int) -> Path:
    texts = (f"The {number} th kettle of row {number % 7} stands near the {number * number % 31} th window."
             for number in range(first, first + rows))  # fmt: skip
    path.write_text(
        "".join(json.dumps({"id": f"{path.stem}-{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    )
    return path


@pytest.mark.slow
def test_beside_libraries_that_are_not_installed(tmp_path: Path) -> None:
    data, val_set = corpus(tmp_path / "data.jsonl", 48, 0), corpus(tmp_path / "val.jsonl", 4, 100)
    venv.create(tmp_path / "bare", with_pip=False)
    others = ("bergson", "dattri", "dattri-llm")
    command = [
        sys.executable, ROOT / "benchmarks" / "rivals" / "compare.py", "--data", data, "--val-set", val_set,
        "--name", "tiny", "--work", tmp_path / "work", "--out", tmp_path, "--halves", 4, "--max-steps", 3,
        "--workers", 1, "--few", 2, *(f"--python={name}={tmp_path / 'bare' / 'bin' / 'python'}" for name in others),
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "rivals-tiny.json").read_text())
    ways = found["numbers"]["ways"]
    ours = {name: way for name, way in ways.items() if name.startswith("ghoststore/")}
    assert not any(way["problem"] for way in ours.values())
    assert {way["problem"] for name, way in ways.items() if name not in ours} == {"not installed"}
    assert ours["ghoststore/default"]["row_bytes"] > 0
    assert ours["ghoststore/tf-idf"]["row_bytes"] is None
    assert ours["ghoststore/default"]["difference"]["value"] == 0.0
    outcomes = tmp_path / "work" / "outcomes"
    default, exact, words = (np.load(outcomes / f"ghoststore-{name}.npy") for name in ("default", "exact", "tf-idf"))
    assert default.shape == exact.shape == words.shape == (4, 48)
    # Of 24 rows the least correlation is 0.78 to 0.85, by what is drawn to learn the projection; of 48 0.85 to 0.89.
    assert all(np.corrcoef(pair)[0, 1] > 0.8 for pair in zip(default, exact, strict=True))
    assert np.all(words <= 1 + 1e-6)
    (table, _) = found["tables"]
    assert [row["LDS"] for row in table["rows"] if row["library"] == "bergson"] == ["not installed"] * 8


def architectures(tmp_path: Path, only: str) -> dict[str, Any]:
    folders = ("--work", tmp_path / "work", "--out", tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "architectures.py", "--only", only, *folders]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads((tmp_path / "architectures.json").read_text())["numbers"]["classes"]
    return found


@pytest.mark.slow
def test_architectures_go_on_where_a_run_ended(tmp_path: Path) -> None:
    found = architectures(tmp_path, "^(GPT2LMHead|BertForMaskedLM)")
    assert list(found) == ["BertForMaskedLM", "GPT2LMHeadModel"]
    for name in ("default layers", "all layers", "engine"):
        for one in found.values():
            assert one[name]["first"]["word"] == "exact"
            assert 0 < one[name]["first"]["error"] < 1e-5
            assert one[name]["first"]["covered"] == (pytest.approx(0.8, abs=0.1) if name == "default layers" else 1.0)
    kept = tmp_path / "work" / "GPT2LMHeadModel.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"parameters": 7}))
    found = architectures(tmp_path, "^(GPT2LMHead|T5ForC)")
    assert found["GPT2LMHeadModel"]["parameters"] == 7
    assert found["T5ForConditionalGeneration"]["engine"]["first"]["word"] != "wrong"
    assert "| T5ForConditionalGeneration | seq2seq |" in (tmp_path / "architectures.md").read_text()


GIVEN = {
    "Bart, mBart, Marian": ("BartForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "PegasusForCausalLM"),
    "pictures": ("Gemma3ForConditionalGeneration", "GotOcr2ForConditionalGeneration"),
    "sound": ("Qwen2AudioForConditionalGeneration", "MusicFlamingoForConditionalGeneration"),
    "XLM, Flaubert": ("XLMWithLMHeadModel", "FlaubertWithLMHeadModel"),
    "LUKE": ("LukeForMaskedLM",),
}
"""Classes of each row of the page, by words in it."""


@pytest.mark.slow
@pytest.mark.parametrize("which", GIVEN)
def test_what_the_page_of_models_says_to_give_is_exact(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    respects, small_models = (importlib.import_module(name) for name in ("respects", "small_models"))
    (row,) = [line for line in (ROOT / "docs/models.md").read_text().splitlines() if which in line and "| `--" in line]
    option = {name: given.split(",") for name, given in re.findall(r"--([a-z-]+) ([\w,]+)", row)}
    by_name = {architecture.name: architecture for architecture in small_models.architectures()}
    for name in GIVEN[which]:
        subject = respects.Subject(small_models.small_model(by_name[name]), by_name[name].task)
        for samples in (subject.samples, subject.square):
            found = subject.vectors(
                option.get("proj-layers", ("mlp", "attn")), option.get("exclude-layers", ()), samples
            )
            assert found.error < 1e-4, name
