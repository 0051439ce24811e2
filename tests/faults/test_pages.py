"""The page of promises names tests that exist, and the soak's table fits it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.faults.soak import PROMISES, between_markers, markdown, merged

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "reliability.md"


def test_every_promise_has_tests_that_are_there() -> None:
    rows = re.findall(r"^\| (\d+) \| \*\*.*?\| (.*) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(PROMISES)
    for number, tests in rows:
        files = re.findall(r"`(tests/[^`]+)`", tests)
        assert files, number
        assert [file for file in files if not (ROOT / file).exists()] == []


def constants_of(path: Path) -> dict[str, int]:
    """The whole numbers that a file names, such as ``MOST = 1 << 20``."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = ast.unparse(node.value)
            if re.fullmatch(r"\d+( << \d+)?", text):
                left, _, right = text.partition(" << ")
                found[node.targets[0].id] = int(left) << int(right or 0)
    return found


def test_the_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| .* \| ([0-9,]+) \| `(\w+)` in `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(rows) > 15
    for number, name, file in rows:
        assert constants_of(ROOT / file)[name] == int(number.replace(",", "")), f"{name} in {file}"


def test_the_table_of_the_soak() -> None:
    parts = [
        {"tried": {"1": 3, "4": 2}, "campaigns": {"strikes": {"tried": 5, "done": 1}}, "lost": []},
        {"tried": {"1": 4}, "campaigns": {"strikes": {"tried": 4, "lost": 1}}, "lost": [{"promise": 4, "text": "x"}]},
    ]
    tables = merged(parts, seed=1, minutes=2)
    text = markdown(tables)
    assert "| 1. Killed at any write, it resumes to the same bytes | 7 | 0 |" in text
    assert "| 4. Disk full or broken: exit 6, what was committed is intact, it resumes | 2 | 1 |" in text
    assert "| commands struck at a call that writes | 9 | 1 |" in text
    page = between_markers(PAGE.read_text(), text)
    assert text in page
    assert page.count("## What is not promised") == 1
    assert between_markers(page, text) == page
