"""Docs cannot drift: the reference is the commands' own help, and what the README shows exists and runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
import torch

import ghoststore
from ghoststore.cli import COMMANDS, cli
from ghoststore.cli.reference import reference
from ghoststore.corpus.shards import SAMPLE, SHARDS_VERSION
from ghoststore.store import RunLayout, Status
from ghoststore.store.layout import FORMAT_VERSION, PartLayout

if TYPE_CHECKING:
    from tests.conftest import Lab

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_reference_is_what_the_commands_say() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    found = command(name)
    assert found.help
    lacking = [p.name for p in found.params if isinstance(p, click.Option) and not p.help]
    assert not lacking


def shown_commands() -> list[tuple[str, str]]:
    return [
        (page.name, line.split("  #")[0].replace("…", ""))
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if line.startswith("ghoststore ")
    ]


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_every_command_line_in_the_docs_exists(page: str, line: str) -> None:
    _, name, *arguments = shlex.split(line)
    options = {flag for p in command(name).params for flag in (*p.opts, *p.secondary_opts)}
    assert {word for word in arguments if word.startswith("--")} <= options, f"{page}: {line}"


def test_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        for block in blocks(page, "bash"):
            assert set(re.findall(r"^make ([a-z]+)", block, flags=re.MULTILINE)) <= targets, page


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_loop_in_the_readme_runs() -> None:
    (loop,) = [block for block in blocks(ROOT / "README.md", "python") if "GradProjLoraEngine" in block]
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    names: dict[str, Any] = {
        "model": model,
        "batches": [(x, y)],
        "loss_of_each_sample": lambda logits, y: torch.nn.functional.cross_entropy(logits, y, reduction="none"),
    }
    exec(loop, names)
    assert names["vectors"].shape == (4, names["engine"].dimension)


def test_python_in_the_readme_uses_public_names() -> None:
    for block in blocks(ROOT / "README.md", "python"):
        used = set(re.findall(r"ghoststore\.(\w+)\(", block)) | {
            name.strip() for names in re.findall(r"from ghoststore import (.+)", block) for name in names.split(",")
        }
        for name in used:
            assert getattr(ghoststore, name), name


def test_the_format_page_lists_every_array_and_status() -> None:
    page = (ROOT / "docs/format.md").read_text()
    layout = PartLayout(rows=1, dimension=1, groups=1, dtype="float32", span_rows=1, chunk_rows=1, store_text=True)
    assert f"format version {FORMAT_VERSION}" in page
    for spec in layout.arrays():
        assert f"| `{spec.name}` |" in page
    run = RunLayout(steps=1, ranks=1, batch=1, span_steps=1, rows=1, groups=("g",), blocks=("b",), dimension=1)
    for spec in run.arrays():
        assert re.search(rf"^\| `{spec.name}` \| .* \| {spec.dtype.name} \|", page, flags=re.MULTILINE)
    for spec in run.row_arrays():
        assert f"`{spec.name}`" in page
    for status in Status:
        assert re.search(rf"^\| {status.value} \| {status.name.lower().replace('_', ' ')}", page, flags=re.MULTILINE)


def test_the_page_of_shards_lists_every_field() -> None:
    page = (ROOT / "docs/shards.md").read_text()
    assert f"format version {SHARDS_VERSION}" in page
    assert f"packed, {SAMPLE.itemsize} bytes" in page
    listed = re.findall(r"^\| `(\w+)` \| (u?int\d+) \|", page, flags=re.MULTILINE)
    assert listed == [(name, SAMPLE[name].name) for name in SAMPLE.names or ()]


def test_the_python_of_the_page_of_shards_runs(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(ROOT / "docs/shards.md", "python")
    monkeypatch.chdir(tmp_path)
    ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out="shards")
    exec(block, names := dict[str, Any]())
    assert names["shards"].decode(names["ids"]) == lab.rows[7]["text"]


def test_the_format_pages_bytes_a_row_are_those_of_the_arrays() -> None:
    layout = PartLayout(rows=1, dimension=1, groups=1, dtype="float32", span_rows=1, chunk_rows=1, store_text=False)
    numbers = [spec for spec in layout.arrays() if spec.dtype is not str and spec.name != "vectors"]
    size = sum(spec.dtype.itemsize * spec.width for spec in numbers)
    assert f"{size} with the default projection" in (ROOT / "docs/format.md").read_text()
    assert size <= 50
