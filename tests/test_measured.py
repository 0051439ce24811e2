"""The figures that README, the page of measurements and that of questions give are those of the files beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"


Cell = tuple[str, str, tuple[str, ...], str]
"""(results, how the title of the table begins, what the first cells of the row begin with, column)."""


class Figure(NamedTuple):
    """One figure of a page, and the cell that it is of."""

    page: str
    around: str
    """The text around it, # in its place."""
    results: str
    table: str
    """How the title of the table begins."""
    row: tuple[str, ...]
    """What the first cells of the row begin with."""
    column: str
    place: int = 0
    """Which number of the cell, and of several # of the text."""


BUILD, FACTS = "build-gpt2-small-float32-b4-t256", "facts"
DEMO, REAL = "frontier-demo", "frontier-real"
STEP = "dot-product-default"
D = ("d. ghoststore.build",)
OF_A_BUILD = "÷ plain (CPU time, 1 thread)"
DEFAULT_FACTS = ("default: preconditioned", "dot")
HIDDEN = "no shared word"

README_FACTS = "asked for without its words; by plain gradients of as many bytes; by TF-IDF | #; #; # |"
README_DEMO = "48 trainings on random halves; plain gradients; TF-IDF | #; #; # |"
README_REAL = "40 trainings on real text | #; #; # |"
README_HALVES = "a random half; the lowest half | #; #; # |"
MEASURED_STEP = "the default / at every step | # / #; by the whole val gradients (`--route direct`) # / #;"
MEASURED_FACTS = (
    "4.3 kB a row of this model) # / #; 256 numbers of int8 # / #; 64 of float32 # / #; plain gradients of 256 numbers "
    "of int8 # / #; TF-IDF # / # |"
)
QUERY_DAMPING = (
    "the default part # / # / #, `exact` with the part's damping of 0.1 # / # / #, **with 0.01, the default, "
    "# / # / #**. "
)
MEASURED_LDS = "TF-IDF | #, # / #, # / #, # / #, #; exact gradients in the default's metric #, #, plain #, # "
PARTS, EXACT = "Parts as built", "Exact gradients"


def several(page: str, around: str, *cells: Cell) -> list[Figure]:
    """A figure for each # of ``around``, in order; a cell (results, table, row, column) that is named twice in
    succession gives its numbers one after the other.
    """
    figures: list[Figure] = []
    for cell in cells:
        again = figures[-1].place + 1 if figures and figures[-1][2:6] == cell else 0
        figures.append(Figure(page, around, *cell, again))
    return figures


def twice(cell: Cell) -> tuple[Cell, Cell]:
    return cell, cell


def facts(*row: str) -> Cell:
    return FACTS, "Recall", row, HIDDEN


def part(results: str, name: str) -> Cell:
    return results, PARTS, (name,), "dot"


def exact(results: str, metric: str, column: str = "dot") -> Cell:
    return results, EXACT, (metric,), column


def by_domain(*ways: str, of: tuple[str, ...] = ("demo", "real", "lengths")) -> list[Cell]:
    """Each way on each corpus."""
    return [(f"by-domain-{corpus}", "LDS", (way,), "all") for way in ways for corpus in of]


SECOND_STAGE = "`--rerank` of all rows, damping 0.01"
OF_THE_PART = "`--rerank` of all rows, damping 0.1"
PLAIN_FACTS = facts("plain blocks, 256 a layer, int8", "dot")
WORDS_FACTS = facts("–", "TF-IDF")
KFAC = "K-FAC, damping 0.1, of 256"
PARTS_OF_BOTH = [
    cell
    for name in ("onebit (default)", "float32", "onebit, plain gradients")
    for cell in (part(DEMO, name), part(REAL, name))
]
FIGURES = [
    several("README.md", "the default, after learning from 256 rows (# builds of as many) | # |",
            (BUILD, "Learning", ("learning the projection",), "÷ building as many rows"),
            (BUILD, "Time", D, OF_A_BUILD)),
    several("README.md", README_FACTS, facts(*DEFAULT_FACTS), PLAIN_FACTS, WORDS_FACTS),
    several("README.md", README_DEMO, part(DEMO, "onebit (default)"), part(DEMO, "onebit, plain"),
            exact(DEMO, "TF-IDF", "cosine")),
    several("README.md", README_REAL, part(REAL, "onebit (default)"), part(REAL, "onebit, plain"),
            exact(REAL, "TF-IDF", "cosine")),
    several("README.md", "(ten val samples; without it #) | # |",
            ("rerank-demo", "Second", ("the part alone",), "LDS"),
            ("rerank-demo", "Second", ("conjugate gradients, 8 steps",), "LDS")),
    several("README.md", "time ÷ without, GPT-2 Small | # |", (STEP, "Time", ("", "exact"), "÷ regular, R=10")),
    several("README.md", README_HALVES,
            *(("selection", "Val loss", ("wiki",), column) for column in ("highest", "random", "lowest"))),
    several("README.md", "gradients are exact, of #; wrong; the others are refused by name | #; # |",
            *(("architectures", "Summary", ("causal",), column) for column in ("classes", "exact", "wrong"))),
    several("docs/measured.md", "the default: # of the CPU time, # of the peak memory. Before it begins it learns from "
            "256 rows: # times the building of as many rows (measured with 8), and # seconds of eigenvectors",
            (BUILD, "Time", D, OF_A_BUILD), (BUILD, "Peak", D, "÷ plain"),
            (BUILD, "Learning", ("learning the projection",), "÷ building as many rows"),
            (BUILD, "Learning", ("eigenvectors",), "seconds")),
    several("docs/measured.md", MEASURED_STEP,
            *((STEP, "Time", ("", mode), f"÷ regular, R={every}")
              for mode in ("exact", "exact, direct") for every in (10, 1))),
    several("docs/measured.md", MEASURED_FACTS,
            *twice(facts(*DEFAULT_FACTS)), *twice(facts("the same, 256 numbers of int8", "dot")),
            *twice(facts("the same, 64 numbers of float32", "dot")), *twice(PLAIN_FACTS), *twice(WORDS_FACTS)),
    several("docs/measured.md", MEASURED_LDS, *PARTS_OF_BOTH,
            exact(DEMO, "TF-IDF", "cosine"), exact(REAL, "TF-IDF", "cosine"),
            exact(DEMO, KFAC), exact(REAL, KFAC), exact(DEMO, "plain"), exact(REAL, "plain")),
    several("docs/query.md", QUERY_DAMPING,
            *by_domain("default", OF_THE_PART, SECOND_STAGE)),
    several("docs/measured.md", "400 val rows) | # / # / #; # / # / # ",
            *(cell for corpus in ("demo", "real")
              for cell in by_domain(SECOND_STAGE, OF_THE_PART, "default", of=(corpus,)))),
    several("docs/faq.md", "About # of the CPU time of plain forward and backward", (BUILD, "Time", D, OF_A_BUILD)),
    several("docs/faq.md", "its peak was # of plain forward and backward", (BUILD, "Peak", D, "÷ plain")),
    several("docs/faq.md", "a build of GPT-2 Small wrote # tokens a second, after # seconds of learning",
            ("gpu-cuda", "Build", ("GPT2-Small", "default"), "tokens/s to disk"),
            ("gpu-cuda", "Build", ("GPT2-Small", "default"), "learning, s")),
    several("docs/faq.md", "a training step # times as long, exact, or # times, sketched",
            ("gpu-cuda", "Training step", ("exact scores",), "÷ plain"),
            ("gpu-cuda", "Training step", ("sketched scores",), "÷ plain")),
    several("docs/faq.md", "came first in # of 40 cases", facts(*DEFAULT_FACTS)),
]  # fmt: skip


def measured(figure: Figure) -> float:
    """What the results say."""
    results = json.loads((ROOT / f"benchmarks/results/{figure.results}.json").read_text(encoding="utf-8"))
    (rows,) = [table["rows"] for table in results["tables"] if table["title"].startswith(figure.table)][:1]
    for row in rows:
        cells = list(row.values())
        if all(cell.startswith(start) for cell, start in zip(cells, figure.row, strict=False)):
            return float(re.findall(NUMBER, row[figure.column])[figure.place].replace(",", ""))
    raise AssertionError(f"{figure.results}: no row {figure.row}")


@pytest.mark.parametrize("figures", FIGURES, ids=lambda figures: f"{figures[0].page}: {figures[0].around[:40]}")
def test_a_page_gives_the_figures_of_the_results(figures: list[Figure]) -> None:
    page = " ".join((ROOT / figures[0].page).read_text(encoding="utf-8").split())
    found = re.search(NUMBER.join(re.escape(text) for text in figures[0].around.split("#")), page)
    assert found, f"{figures[0].page} has no {figures[0].around!r}"
    for shown, figure in zip(found.groups(), figures, strict=True):
        digits, of = shown.replace(",", ""), measured(figure)
        half = 0.5 * 10 ** -len(digits.partition(".")[2])
        if digits.endswith("000"):  # 211,000
            half = 500.0
        assert abs(float(digits) - of) <= half * 1.000001, f"{figure}: {shown}, and {of} in the results"
