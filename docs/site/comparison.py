"""The tables of ``docs/comparison.md``, from the results of the benchmark: ``python docs/site/comparison.py``.

Each table stands between a comment with its name and ``<!-- end -->``; what is between them is written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "comparison.md"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_THERE = "–"
SLOWEST = ("`--rerank-with cg` of all rows", "EK-FAC with CG, its gradients copied")
"""Ways that were measured on a few val rows alone, because of their time."""


def results(name: str) -> dict[str, Any]:
    """What ``benchmarks/rivals/compare.py`` found."""
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/rivals-{name}.json").read_text(encoding="utf-8"))
    return found


def rows_of(found: Mapping[str, Any], table: int) -> dict[tuple[str, str], dict[str, str]]:
    """By library without its version, and way, the cells of one of the benchmark's tables."""
    return {(row["library"].split()[0], row["way"]): row for row in found["tables"][table]["rows"]}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def prediction() -> str:
    """How well each way predicts trainings, on both corpora."""
    demo, real = rows_of(results("demo"), 0), rows_of(results("real"), 0)
    rows = []
    for key in dict.fromkeys((*real, *demo)):
        found = [corpus.get(key, {}) for corpus in (demo, real)]
        if not any("(" in row.get("LDS", "") for row in found):  # not measured on all val rows, or it failed
            continue
        cells = [row.get(column, NOT_THERE) for row in found for column in ("LDS", "− default")]
        rows.append((next(row["library"] for row in found if row), key[1], *cells))
    head = ("library", "way", "demo: LDS", "− ghoststore's default", "real text: LDS", "− ghoststore's default")
    return table(head, rows)


def costs() -> str:
    """What each way costs, and how often it finds the row that states a fact."""
    rows = []
    for row in rows_of(results("demo"), 0).values():
        failed = row["bytes a row"] == NOT_THERE
        facts = row["LDS"] if failed else row["facts"] or NOT_THERE
        rows.append((row["library"], row["way"], row["bytes a row"], row["CPU s build"], row["CPU s query"], facts))
    return table(("library", "way", "bytes a row", "CPU s build", "CPU s query", "facts found"), rows)


def slowest() -> str:
    """The ways of conjugate gradients, and what they are to be held against, on the same few val rows."""
    wanted = ("default", "exact gradients in the default's metric", "EK-FAC, damping 0.001", *SLOWEST)
    rows = [
        (row["library"], row["way"], row["LDS"], row["− default"])
        for row in rows_of(results("demo"), 1).values()
        if row["way"] in wanted
    ]
    return table(("library", "way", "demo, 10 val rows: LDS", "− ghoststore's default"), rows)


def setting() -> str:
    """What was trained, as it stands in the results."""
    lines = []
    for name in ("demo", "real"):
        found = results(name)
        told, facts = found["settings"], found["facts"]
        lines.append(
            f"- `{name}`: {told['samples']:,} rows, {told['val rows']} val rows, {told['halves']} trainings on random "
            f"halves, {told['max_steps']} steps of {told['batch_size']} rows; {facts['date']}, {facts['cores']} cores, "
            f"torch {facts['torch']}, transformers {facts['transformers']}."
        )
    return "\n".join(lines)


TABLES = {"prediction": prediction, "costs": costs, "slowest": slowest, "setting": setting}


def written(page: str) -> str:
    """The text of the page with its tables from the results. KeyError for a table that there is not."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
