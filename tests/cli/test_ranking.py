"""Tables of ranked samples: ranks, scores and ids are whole on every terminal, and the text is cut."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len
from rich.console import Console

from ghoststore.cli import ranking
from ghoststore.cli.ranking import Column, print_ranking
from ghoststore.cli.terminal import print_facts, print_table
from ghoststore.cli.watch import render
from query.training_scores.watch import Watcher
from tests.support.score_runs import append, make

if TYPE_CHECKING:
    from tests.conftest import Lab

ABOUT = "metric: dot, preconditioned by the Kronecker factors learned at build"
COLUMNS: list[Column] = [
    ("rank", "number"),
    ("Σ η·score", "number"),
    ("times", "number"),
    ("id", "id"),
    ("row", "number"),
    ("domain", "text"),
    ("text", "text"),
]
HEX = hashlib.sha256(b"sample").hexdigest()
TEXTS = ["plain words " * 7, "這是一個很長的中文句子" * 8, "👩‍👩‍👧 party 🎉 " * 7, "a\x1b[31m\u202e " * 12]


def table_of(ids: list[str], domain: str = "web-crawl-english") -> list[list[str]]:
    scores = ["3.03e+06", "-3.027e+06", "1e-09", "0.6543"]
    return [
        [str(place + 1), score, "1,234", name, "123456", domain, text]
        for place, (score, name, text) in enumerate(zip(scores, ids, TEXTS, strict=True))
    ]


def printed(
    rows: list[list[str]],
    width: int,
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> list[str]:
    """The lines of a table on a terminal of ``width`` columns, without colour."""
    console = Console(width=width, force_terminal=terminal, color_system=None)
    monkeypatch.setattr(ranking, "stdout_console", lambda: console)
    print_ranking("nearest to mean", ABOUT, COLUMNS, rows)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "ids", [[HEX] * 4, ["a", "row-12", "x" * 30, "文書-7"], ["y" * 200] * 4], ids=["hex", "short", "long"]
)
@pytest.mark.parametrize("width", [60, 80, 100, 132, 240])
def test_texts_are_cut_and_nothing_else(
    width: int, ids: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table_of(ids)
    lines = printed(rows, width, True, monkeypatch, capsys)
    assert max(map(cell_len, lines)) <= width
    below = lines[next(place for place, line in enumerate(lines) if line.startswith("──")) + 1 :]
    for row in rows:
        numbers = [row[place] for place in (0, 1, 2, 4)]
        (place,) = [place for place, line in enumerate(below) if line.split()[:2] == numbers[:2]]
        assert all(number in below[place].split() for number in numbers), row
        assert row[3] in "".join(line.strip() for line in below[place:])
        if cell_len(row[3]) + 6 <= width:
            assert any(row[3] in line for line in below)
    shown = "\n".join(below)
    for beginning in ("plain words", "這是一個很", "👩‍👩‍👧 party", r"a\x1b[31m"):
        assert beginning in shown
    assert "\x1b" not in shown
    assert not re.search(r"\\(x|u)?[0-9a-f]{0,3}…", shown)


def test_a_pipe_has_a_line_for_each_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut, however long the ids are."""
    rows = table_of(["y" * 300] * 4)
    lines = printed(rows, 240, False, monkeypatch, capsys)
    assert lines[:2] == ["nearest to mean", ABOUT]
    assert len([line for line in lines if line]) == 4 + len(rows)
    for row, line in zip(rows[:3], lines[4:], strict=False):
        assert line.split() == [word for cell in row for word in cell.split()]


def test_a_pipe_folds_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor the facts of a part: a name has a line of its own, whole."""
    print_table("parts", [("part", False), ("rows", True)], [["p" * 300, "12"]])
    print_facts("part", [("domains", "domain " * 60)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["p" * 300, "12"] in lines
    assert ["domains", *["domain"] * 60] in lines


def test_columns_without_a_text_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[*row[:-1], ""] for row in table_of([HEX] * 4, domain="")]
    head = printed(rows, 132, True, monkeypatch, capsys)[2]
    assert head.split() == ["rank", "Σ", "η·score", "times", "id", "row"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("width", [80, 100, 160])
def test_watch_shows_whole_ids(width: int, tmp_path: Path) -> None:
    """A live view has a line for each sample: its text gives way."""
    append(make(tmp_path / "store"), 0, 10)
    frame = Watcher(tmp_path / "store").look()
    samples = [
        replace(sample, id=hashlib.sha256(sample.id.encode()).hexdigest(), value=sign * 3.03e6, text="many words " * 9)
        for sign, sample in zip((1, -1), (frame.best[0], frame.worst[0]), strict=True)
    ]
    console = Console(width=width, record=True, force_terminal=False, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    console.print(render(replace(frame, best=samples[:1], worst=samples[1:]), width))
    shown = console.export_text()
    words = shown.replace("│", " ").split()
    for sample, value in zip(samples, ("3.03e+06", "-3.03e+06"), strict=True):
        assert words[words.index(value) + 1] == sample.id
    assert max(map(cell_len, shown.splitlines())) <= width


def test_a_query_says_the_metric_of_the_part(lab: Lab, built: Path, tmp_path: Path) -> None:
    """That of a preconditioned part: above each table, in the settings, and on the page."""
    val, page = lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 5)), tmp_path / "page.html"
    words = "preconditioned by the Kronecker factors learned at build"
    options = ("query", "--store", built, "--val-set", val, "--metric", "dot", "--bottom-k", "2", "--quiet")
    shown = lab.run(*options)
    assert shown.code == 0, shown.err
    assert shown.out.splitlines().count(f"metric: dot, {words}") == 2
    settings = lab.run(*options, "--json", "--report", page).json["settings"]
    assert (settings["part_metric"], settings["precondition"]) == (words, "none")
    assert f"Dot, {words};" in page.read_text()


@pytest.mark.slow
def test_a_query_says_the_metric_of_a_part_of_plain_gradients(lab: Lab, tmp_path: Path) -> None:
    """And that of the second moment, which is asked for beside it."""
    store, val = tmp_path / "store", lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 5))
    assert lab.build(store, "--proj-precondition", "none").code == 0
    options = ("--store", store, "--quiet")
    shown = lab.run("query", *options, "--val-set", val, "--precondition", "second-moment", "--damping", "1")
    assert "metric: cosine of plain gradients; with the second moment of the part's rows, damping 1" in shown.out
    assert lab.run("query", *options, "--val-set", val, "--json").json["settings"]["part_metric"] is None
    shown = lab.run("self-influence", *options, "--damping", "1")
    assert "metric: self-influence of plain gradients; with the second moment" in shown.out


def test_fewer_rows_than_were_asked_for(lab: Lab, built: Path, tmp_path: Path) -> None:
    val = lab.write(tmp_path / "val.jsonl", lab.sample_rows(3, 5))
    shown = lab.run("query", "--store", built, "--val-set", val, "--top-k", "40", "--quiet")
    assert "27 of the 40 rows that were asked for: no more rows have a score." in shown.out
    shown = lab.run("query", "--store", built, "--val-set", val, "--top-k", "27", "--quiet")
    assert "asked for" not in shown.out
