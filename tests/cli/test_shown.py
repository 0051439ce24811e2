"""What is safe to show: on a terminal, in JSON, in a spreadsheet, in a picture; and by `watch` and plots."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from ghoststore.cli import terminal
from ghoststore.cli.watch import render
from ghoststore.shown import clipped, json_text, picture_label, spreadsheet_cell, visible
from query.training_scores.plots import plot_scores
from query.training_scores.watch import watch
from tests.support.score_runs import append, make, row_table

STRANGE = "\x1b]0;x\x07 $\\frac{ _ \u202e\x9b31m"
TEXTS = st.text(st.characters(codec=None, categories=None), max_size=40)


@given(TEXTS)
def test_nothing_that_commands_a_terminal_is_left(text: str) -> None:
    for shown, kept in ((visible(text), ""), (visible(text, lines=True), "\n\t")):
        assert [
            char for char in shown if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and char not in kept
        ] == []
        assert not {*shown} & {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u200b\ufeff"}
        assert visible(shown, lines=True) == shown


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_number_is_folded(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line of a number that is folded reads as a number itself. Where a row has no room, its cells are a list."""
    monkeypatch.setattr(terminal, "stdout_console", lambda: Console(width=width, force_terminal=False))
    headings = [
        "domain",
        "rows",
        "times",
        "Σ unit·score a row",
        "a time",
        "sum",
        "negative",
        "mean",
        "± standard error",
    ]
    cells = ["arithmetic", "600 of 600", "603,064", "0.97841", "8.819e-05", "587.1", "46.8%", "-0.05727", "0.008295"]
    terminal.print_table("by domain", [(name, name != "domain") for name in headings], [cells, cells])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(cell_len, lines)) <= width
    for heading, number in zip(headings[2:], cells[2:], strict=True):
        assert len([line for line in lines if number in line]) == 2, number
        if width < 80:
            assert [line.split() for line in lines].count([*heading.split(), number]) == 2
    assert len([line for line in lines if all(number in line for number in cells[2:])]) == (2 if width >= 80 else 0)


def test_padding_gives_way_before_cells_are_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "stdout_console", lambda: Console(width=80, force_terminal=False))
    row = ["preconditioned-cosine+bm25", "-0.594 (-0.750 to +0.000)", "-1.000 (-1.000 to +0.000)"]
    terminal.print_table("LDS", [("score", False), ("each of 16 val samples", True), ("1 val group", True)], [row])
    lines = capsys.readouterr().out.splitlines()
    assert all(cell in lines[-1] for cell in row)
    assert max(map(cell_len, lines)) <= 80


@given(TEXTS)
def test_json_is_exact(text: str) -> None:
    value = {text: [text, 1, None]}
    for encoding in ("utf-8", "ascii", "latin-1"):
        written = json_text(value, indent=1, encoding=encoding)
        assert json.loads(written) == value
        assert written.encode(encoding).isascii() or encoding != "ascii"
        assert visible(written, lines=True) == written


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – ☃ 😀 é\u200d\u200c", "plain – ☃ 😀 é\u200d\u200c"),
        ("a\x1b[2J\x07\x00", r"a\x1b[2J\x07\x00"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202eabc\u2069", r"\u202eabc\u2069"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\U000e0041\udcff", r"\U000e0041\udcff"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_cells_and_labels() -> None:
    assert [spreadsheet_cell(value) for value in ("=1", "+1", "-1", "@a", "\ta", "\ra", "a=1", "", -1, 1.5, None)] == [
        "'=1",
        "'+1",
        "'-1",
        "'@a",
        "'\ta",
        r"'\ra",
        "a=1",
        "",
        -1,
        1.5,
        None,
    ]
    assert spreadsheet_cell("a\x1b[2J\x00\x9b\u202e\r\n\tb") == "a\\x1b[2J\\x00\\x9b\\u202e\\r\n\tb"
    assert spreadsheet_cell("\r\x07=1") == r"'\r\x07=1"
    assert picture_label("_a$b\x1b") == r" _a\$b\x1b"


@given(TEXTS, st.integers(0, 60))
def test_no_escape_is_cut(text: str, length: int) -> None:
    """What is left of a cut text is the escaped form of its beginning."""
    text = text.replace("\\", "/")
    cut = clipped(visible(text), length)
    assert len(cut) <= length
    assert cut in {visible(text[:end]) for end in range(len(text) + 1)}
    assert len(cut) > length - 10 or cut == visible(text)


@pytest.mark.parametrize("width", [20, 40, 80, 100, 132, 200])
def test_how_much_is_done_is_never_cut(width: int) -> None:
    """In a line of progress the rest gives way: bar and rates first, then words, what is left of the time, the name."""
    bars = terminal.Bars()
    bars.console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    task = bars.task("training", 200_000, 123_456, "steps")
    task.advance(1, 100_000)
    task.say("loss 3.123, val 3.456, scoring 12% of the time")
    task.close()
    assert isinstance(bars.console.file, io.StringIO)
    lines = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", bars.console.file.getvalue()).splitlines()
    last = [line for line in lines if line.strip()][-1]
    assert "123457/200000" in last
    assert cell_len(last.rstrip()) <= width
    assert ("scoring 12% of the time" in last) == (width >= 80)
    assert ("━" in last) == (width >= 132)


@pytest.mark.parametrize("width", [20, 80])
def test_sentences_are_folded_on_terminals_alone(width: int) -> None:
    text = f"nats: {'by how much ' * 12}{'這是' * 5} /a/path/{'x' * 90} end\n  kept  as it is\n\n"
    shown = terminal.folded(text, Console(width=width, force_terminal=True))
    lines = shown.split("\n")
    assert [line for line in lines if cell_len(line) > width] == [f"/a/path/{'x' * 90}"]
    assert "  kept  as it is" in lines
    assert shown.split() == text.split()
    assert terminal.folded(text, Console(width=width, force_terminal=False)) == text


def test_watch_and_a_plot_of_strange_domains(tmp_path: Path) -> None:
    """matplotlib would read mathematics, leave a name out of its legend; a terminal would obey."""
    ids = row_table().sample_id
    ids[:] = [f"{STRANGE}{number}" for number in range(len(ids))]
    corpus = {"fingerprint": "sha256:c", "domains": [STRANGE, "_"], "repeated_ids": None}
    run = make(tmp_path, table=row_table(sample_id=ids), corpus=corpus)
    append(run, 0, 10)
    run.reload()
    plot_scores(run, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert b"\x1b" not in drawn
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(render(next(watch(store=tmp_path, once=True, text=False)), 120))
    text = console.export_text(styles=False)
    assert r"\x1b]0;x\x07" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
