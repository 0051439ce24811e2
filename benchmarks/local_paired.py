"""Commands on a store on this machine's disk before and after a change: two checkouts, in turns, from the shell."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
from common import Results, Spread, Table, folders, machine_facts, ratios, scratch_folder
from workers import saved_model

BEFORE, AGAIN, AFTER = "before", "before, again", "after"
"""The second is the first once more: what it differs by is what the machine makes of equal code."""


def run(tree: Path, words: list[str]) -> tuple[float, float]:
    """(wall, CPU) seconds of ``ghoststore`` with ``words``, by the code of the checkout ``tree``, on one thread."""
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-P", "-m", "ghoststore", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
    )
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


@click.command()
@click.option("--before", required=True, type=Path, help="Checkout of the code to compare with.")
@click.option("--data", required=True, help="Corpus.")
@click.option("--val-set", required=True, help="Val set.")
@click.option("--tokenizer", required=True, help="Folder of a tokenizer.")
@click.option("--rows", default=1000, show_default=True, help="Rows of the corpus.")
@click.option("--turns", default=5, show_default=True)
@folders
def main(
    before: Path, data: str, val_set: str, tokenizer: str, rows: int, turns: int, scratch: Path | None, out: Path
) -> None:
    """The commands of two checkouts, in turns."""
    here = Path(__file__).resolve().parent.parent
    trees = {BEFORE: before.resolve(), AGAIN: before.resolve(), AFTER: here}
    measured: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with scratch_folder(scratch) as folder:
        model = saved_model(folder / "model", tokenizer, 4, 256)
        for turn in range(turns):
            for name in trees if turn % 2 == 0 else reversed(trees):
                store = ["--store", str(folder / f"{name} {turn}")]
                corpus = ["--checkpoint", str(model), "--data", data, "--max-samples", str(rows), "--device", "cpu"]
                random = ["--name", "part", "--proj-kind", "gaussian", "--proj-precondition", "none"]
                commands = {
                    "build, nothing learned": ["build", *store, *corpus, *random],
                    "build of what is there": ["build", *store, *corpus, *random],
                    "query": ["query", *store, "--val-set", val_set, "--device", "cpu"],
                    "verify": ["verify", *store],
                    "info": ["info", *store],
                }
                for command, words in commands.items():
                    measured.setdefault(command, {}).setdefault(name, []).append(run(trees[name], words))
    lines = []
    for command, by_tree in measured.items():
        line = {"command": command}
        for column, kind in enumerate(("wall", "CPU")):
            seconds = {name: [repeat[column] for repeat in by_tree[name]] for name in trees}
            line[f"{kind} seconds after"] = Spread.of(seconds[AFTER]).show(".2f")
            for name, title in ((AFTER, "after ÷ before"), (AGAIN, "before ÷ itself")):
                line[f"{kind}, {title}"] = ratios(seconds[name], seconds[BEFORE]).show(".3f")
        lines.append(line)
    results = Results(
        name="local-paired",
        title="Commands on a local store, before and after",
        settings={"rows": rows, "model": "GPT-2, 4 layers, width 256", "turns": turns, "threads a process": 1},
        facts=machine_facts(),
    )
    note = "Whole processes from the shell, imports included. Medians of the turns' ratios (least to largest)."
    results.add(Table(title="Commands", rows=lines, note=note), measured=measured)
    results.write(out)


if __name__ == "__main__":
    main()
