"""What is safe to show: on a terminal, in JSON, in a spreadsheet, in a picture; and by `watch` and plots."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ghoststore.cli.watch import render
from ghoststore.shown import json_text, picture_label, spreadsheet_cell, visible
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
        "'\ra",
        "a=1",
        "",
        -1,
        1.5,
        None,
    ]
    assert picture_label("_a$b\x1b") == r" _a\$b\x1b"


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
