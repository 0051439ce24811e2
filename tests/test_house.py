"""The rules of the house that hold by themselves: one list of public names, short files, few parameters.

Import order is held by import-linter (``make lint``).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from ghoststore.lazy import FACE, PACKAGES
from tests.conftest import diagonal

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("ghoststore", *PACKAGES) for path in (ROOT / package).rglob("*.py"))

LONGEST_FILE = 450
LONG_FILES = {}
"""Files that are to be split; none may grow."""
MOST_PARAMETERS = 12
MANY_PARAMETERS: dict[tuple[str, str], int] = {}
"""Functions below the public face that are to take a dataclass; none may grow."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, not to be changed."""
    return ast.parse(path.read_text())


def type_checked_names() -> Iterator[tuple[str, str]]:
    """(public name, module) of the block that type checkers read."""
    tree = parsed(ROOT / "ghoststore" / "__init__.py")
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        assert statement.module is not None
        for alias in statement.names:
            assert alias.asname == alias.name, "only `X as X` is a public name to a type checker"
            yield alias.name, statement.module


def test_public_names_are_one_list() -> None:
    assert dict(type_checked_names()) == FACE


def test_every_package_says_what_it_is() -> None:
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), f"{name_of(path.parent)} has no __init__.py"
        assert ast.get_docstring(parsed(path)) or path.name == "__main__.py", f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("package", ["ghoststore", *PACKAGES])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    too_long = {name: lines for name, lines in lengths.items() if lines > LONG_FILES.get(name, LONGEST_FILE)}
    assert not too_long
    assert set(LONG_FILES) <= {name for name, lines in lengths.items() if lines > LONGEST_FILE}, "take it off the list"


COMMAND_LINES = {"ghoststore/store/part/build_command.py"}
"""Files that write command lines, piece by piece."""


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string of a file that is not a docstring; ``{…}`` for what an f-string fills in."""
    nodes = list(ast.walk(parsed(path)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    pieces = {id(piece) for node in nodes if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in nodes:
        if id(node) in docstrings or id(node) in pieces:
            continue
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{…}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_flags_are_of_the_command_line_alone() -> None:
    """The library names parameters (`` `top_k=5` ``); a command line that it shows whole may have flags."""
    for path in SOURCES:
        if {"cli", "settings"} & set(path.parts) or name_of(path) in COMMAND_LINES:
            continue
        for line, text in words_of(path):
            own = re.sub(r"(`|^)(ghoststore|pip) [^`]*(`|$)", "", text)
            assert not re.search(r"(?<![\w-])--[a-z{]", own), f"{name_of(path)}:{line}: name the parameter: {own!r}"


def test_every_folder_of_tests_is_collected(request: pytest.FixtureRequest) -> None:
    patterns = request.config.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    names = {name for folder in folders for name in folder.relative_to(ROOT).parts}
    assert not [name for name in names for pattern in patterns if fnmatch(name, pattern)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    own = function.args
    names = [arg.arg for arg in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_functions_below_the_public_face_take_few_parameters() -> None:
    too_many: dict[tuple[str, str], int] = {}
    for path in SOURCES:
        if "cli" in path.parts:  # click gives a command one parameter an option
            continue
        nodes = list(ast.walk(parsed(path)))
        # Their options are those of the public name.
        public = {
            id(method) for node in nodes if isinstance(node, ast.ClassDef) and node.name in FACE for method in node.body
        }
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name in FACE:
                continue
            if node.name == "__init__" and id(node) in public:
                continue
            if parameters(node) > MOST_PARAMETERS:
                too_many[name_of(path), node.name] = parameters(node)
    assert too_many == MANY_PARAMETERS


def test_the_diagonal_of_a_grid_has_each_value() -> None:
    grid = list(product("ab", "wxyz", "ijk"))
    fast = diagonal(grid)
    assert len(fast) == 4
    assert fast <= set(grid)
    assert [set(values) for values in zip(*fast, strict=True)] == [set("ab"), set("wxyz"), set("ijk")]
    moments = [(f"moment {number}",) for number in range(14)]
    assert diagonal(moments, 3) == {("moment 0",), ("moment 6",), ("moment 13",)}
    assert diagonal(moments, 1) == {("moment 0",)}
