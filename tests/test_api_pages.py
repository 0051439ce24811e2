"""The pages of the Python API are what the objects say of themselves, and leave no public name out."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ghoststore
from ghoststore import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "api"


@pytest.fixture(scope="module")
def reference() -> Any:
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        return importlib.import_module("reference")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    made: dict[str, str] = reference.Reference().pages()
    return made


def test_the_pages_are_what_the_objects_say(pages: dict[str, str]) -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()} == pages, "run `make docs`"


def test_every_public_name_is_on_one_page(reference: ModuleType, pages: dict[str, str]) -> None:
    public = sorted(set(ghoststore.__all__) - {"__version__"})
    assert sorted(name for page in reference.PAGES for name in page.names) == public
    headings = Counter(name for text in pages.values() for name in re.findall(r"^## (\w+)$", text, flags=re.MULTILINE))
    assert not [name for name in public if headings[name] != 1]
    assert f"`{ghoststore.__version__}`" in pages["README.md"]


def test_every_error_is_there(pages: dict[str, str]) -> None:
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.GhostStoreError):
            assert f"\n## {name}\n" in pages["errors.md"]
            row = rf"^\| \[`{name}`\]\(#{name.lower()}\) \| .* \| {kind.exit_code} \|$"
            assert re.search(row, pages["errors.md"], flags=re.MULTILINE)


def test_every_parameter_of_a_function_has_its_type_and_help(reference: ModuleType, pages: dict[str, str]) -> None:
    """Of functions of options, whose signature is made from them; only ``progress`` and the like may lack a default."""
    text = "".join(pages.values())
    for name in ghoststore.__all__:
        of = getattr(ghoststore, name)
        if not hasattr(of, "options"):
            continue
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in inspect.signature(of).parameters:
            row = re.search(rf"^\| `{parameter}` \| (.+?) \| (.+?) \| (.*) \|$", section, flags=re.MULTILINE)
            assert row, f"{name}: {parameter}"
            assert row[1].strip(), f"{name}: {parameter} has no type"
            assert row[3].strip(), f"{name}: {parameter} has no help"


def test_no_mark_of_docstrings_is_left(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for mark in (":class:", ":meth:", ":func:", ":attr:", "``", "<class", "::\n", "object at 0x"):
            assert mark not in prose, f"{name}: {mark}"
        assert not re.findall(r"`(?:indexer|query)\.[\w.]+`", prose), f"{name}: users import from ghoststore alone"


def test_docstrings_become_markdown(reference: ModuleType) -> None:
    words = sys.modules["words"]
    links = words.Links({"query": "questions.md#query", "Run": "training.md#run", "Run.read": "training.md#runread"},
                        {"UsageError": "errors.md#usageerror"})  # fmt: skip

    def some() -> None:
        """Reads :meth:`read` of ``query`` and ``ghoststore.query``, see ``docs/query.md``::

            with some() as x:

                x * 2

        A :class:`Run` × 2 * 3 < 7. UsageError, UnknownError.
        """

    assert words.docstring(some, links, "Run") == (
        "Reads [`read`](training.md#runread) of `query` and [`ghoststore.query`](questions.md#query), see "
        "[query](../query.md):\n\n```python\nwith some() as x:\n\n    x * 2\n```\n\n"
        "A [`Run`](training.md#run) × 2 \\* 3 \\< 7. [UsageError](errors.md#usageerror), UnknownError."
    )
