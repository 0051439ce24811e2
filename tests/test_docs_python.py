"""Python in the docs: every block compiles, imports what there is, names what is public, and gives keywords that exist.

The blocks that a reader would copy whole are run: here, in ``test_docs.py``, and beside the code that they are of.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import ghoststore
from tests.test_docs import PAGES, ROOT

if TYPE_CHECKING:
    from tests.conftest import Lab

GIVEN = {
    "batches", "config", "dataset", "get_batch", "loss_of", "loss_of_each_sample", "losses_of", "max_steps", "model",
    "optimizer", "rows", "tokenizer", "torch", "train_step", "val_batches", "val_data", "X_val", "Y_val",
}  # fmt: skip
"""Names that the text around a block speaks of: what a reader has already."""


class Block(NamedTuple):
    """One block of a page, with the names of the blocks before it."""

    where: str
    code: str
    before: frozenset[str]


def python_of(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```python\n(.*?)^\1```", text, flags=re.DOTALL | re.MULTILINE):
        yield textwrap.dedent(found[2])


def defined(tree: ast.AST) -> set[str]:
    """Names that a block gives a value: by assignment, import, def, class, or as a parameter."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def all_blocks() -> Iterator[Block]:
    for page in PAGES:
        if "design" in page.parts:
            continue
        before: set[str] = set()
        for number, code in enumerate(python_of(page)):
            yield Block(f"{page.relative_to(ROOT)}:{number}", code, frozenset(before))
            before |= defined(ast.parse(code))


BLOCKS = list(all_blocks())
of_a_block = pytest.mark.parametrize("block", BLOCKS, ids=[block.where for block in BLOCKS])


def test_there_are_blocks() -> None:
    pages = {block.where.partition(":")[0] for block in BLOCKS}
    assert {"docs/index.md", "docs/loops.md", "docs/nanogpt.md", "docs/api/engines.md"} <= pages


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name or None) of every import; absolute ones, for a page has no package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.level == 0
            yield from ((node.module, alias.name) for alias in node.names)


@of_a_block
def test_what_a_block_imports_is_there(block: Block) -> None:
    for module, name in imported(ast.parse(block.code)):
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            pytest.skip(f"{module} is not installed")
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), f"{module} has no {name}"
        if module == "ghoststore" and name is not None:
            assert name in ghoststore.__all__


@of_a_block
def test_every_name_of_a_block_has_a_meaning(block: Block) -> None:
    tree = ast.parse(block.code)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    known = defined(tree) | block.before | GIVEN | set(dir(builtins))
    if block.where.startswith("docs/api/"):  # where the classes themselves are described
        known |= set(ghoststore.__all__)
    assert used <= known


def public_calls(tree: ast.AST) -> Iterator[tuple[str, Any, ast.Call]]:
    """(name, object, call) of every call of a public name, as ``ghoststore.name(…)`` or imported."""
    names = {name for module, name in imported(tree) if module == "ghoststore"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        of = node.func
        if isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == "ghoststore":
            yield of.attr, getattr(ghoststore, of.attr, None), node
        elif isinstance(of, ast.Name) and of.id in names:
            yield of.id, getattr(ghoststore, of.id, None), node


@of_a_block
def test_public_names_are_called_with_keywords_that_exist(block: Block) -> None:
    for name, called, call in public_calls(ast.parse(block.code)):
        assert name in ghoststore.__all__, f"ghoststore has no {name}"
        known = inspect.signature(called).parameters
        assert {keyword.arg for keyword in call.keywords if keyword.arg} <= set(known), f"{name}: {ast.unparse(call)}"
        needed = {
            parameter.name
            for parameter in known.values()
            if parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY
        }
        assert needed <= {keyword.arg for keyword in call.keywords}, f"{name} needs more: {ast.unparse(call)}"


@pytest.mark.slow
def test_the_python_of_the_landing_page_runs(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = python_of(ROOT / "docs/index.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(lab.checkpoint)
    (tmp_path / "train.jsonl").symlink_to(lab.corpus)
    lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 5))
    exec(block, {})
    assert len([line for line in capsys.readouterr().out.splitlines() if " row-" in line]) == min(20, len(lab.rows))
