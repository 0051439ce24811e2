"""Exact search before and after a change: two checkouts, in turns, on the same parts; and whether they answer alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Spread, Table, folders, machine_facts, scratch_folder
from search import TOP_K, chunk_files, manifest_of, random_part, read_plainly

from ghoststore import Store
from query.search.part_score import Term
from query.search.search import search

LAYERS = 48
"""Of GPT-2 Small: each is a block, with a scale of its own in codes."""
NUMBERS = {"float32": 64, "int8": 256, "onebit": 2048}
"""A layer's numbers of 256 bytes."""
QUERIES = (1, 20)
REPEATS = 2
READ = "plain read"


def measure(store: Path, threads: int) -> dict[str, Any]:
    """Wall and CPU seconds of plain reads and searches with the code of this process, and a digest of the answers."""
    torch.set_num_threads(threads)
    measured: dict[str, Any] = {}

    def record(name: str, run: Any) -> Any:
        answer = run()
        for _ in range(REPEATS):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            measured.setdefault(name, []).append([time.perf_counter() - wall, time.process_time() - cpu])
        return answer

    for dtype in NUMBERS:
        part = Store.open(store).part(dtype)
        record(f"{dtype}|{READ}", read_plainly(part, 0))
        for metric in ("cosine", "dot"):
            for count in QUERIES:
                generator = torch.Generator().manual_seed(1)
                vectors = torch.randn(count, part.layout.dimension, generator=generator, dtype=torch.float64)
                term = Term.of(part, vectors, metric=metric)  # type: ignore[arg-type]
                name = f"{dtype}|{metric}, {count} queries"
                ranking, _ = record(name, lambda term=term: search([term], top_k=TOP_K))
                measured[f"answer {name}"] = [ranking.rows.tolist(), [x.hex() for x in ranking.scores.ravel().tolist()]]
    return measured


def child(tree: Path, store: Path, threads: int) -> dict[str, Any]:
    """:func:`measure` with the code of a checkout."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, "--measure", str(store), "--threads", str(threads)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": str(threads)},
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def add_table(results: Results, store: Path, before: Path, rows: int, turns: int, threads: int) -> None:
    trees = {"before": before, "after": Path(__file__).resolve().parent.parent}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for turn in range(turns):
        for name in trees if turn % 2 == 0 else reversed(trees):
            runs[name].append(child(trees[name], store, threads))
    table = []
    for key in runs["before"][0]:
        if key.startswith("answer"):
            continue
        dtype, way = key.split("|")
        size = sum(path.stat().st_size for path in chunk_files(Store.open(store).part(dtype)))

        def seconds(name: str, column: int, key: str = key) -> list[float]:
            return [repeat[column] for run in runs[name] for repeat in run[key]]

        line: dict[str, Any] = {"encoding": dtype, "way": way}
        for name in trees:
            line[f"rows/s {name}"] = Spread.of([rows / s for s in seconds(name, 0)]).show(",.0f")
            line[f"rows a CPU second {name}"] = Spread.of([rows / s for s in seconds(name, 1)]).show(",.0f")
        old, new = (float(np.median(seconds(name, 1))) for name in trees)
        read = np.median([repeat[1] for run in runs["after"] for repeat in run[f"{dtype}|{READ}"]])
        line |= {"GB a CPU second after": f"{size / new / 1e9:.2f}", "÷ plain read": f"{read / new:.2f}"}
        line["CPU before ÷ after"] = f"{old / new:.1f}"
        answers = [json.dumps(run[f"answer {key}"]) for name in trees for run in runs[name] if f"answer {key}" in run]
        line["answers"] = "–" if way == READ else ("same bits" if len(set(answers)) == 1 else "differ")
        table.append(line)
    note = (
        f"{rows:,} rows of {LAYERS} layers, {', '.join(f'{n:,} {dtype}' for dtype, n in NUMBERS.items())} numbers "
        f"each; {threads} thread(s), {turns} turns of {REPEATS} repeats in new processes, medians (least to largest); "
        f"warm files, the best {TOP_K}. The plain read goes into one buffer that stays in the cache, unchecked. "
        "Vectors are noise: more rows pass the screen than of gradients."
    )
    numbers = {
        name: [{key: x for key, x in run.items() if not key.startswith("answer")} for run in each]
        for name, each in runs.items()
    }
    results.add(Table(f"{threads} thread(s)", table, note), **{f"{threads} threads": numbers})


@click.command()
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--rows", type=int, default=4000, show_default=True)
@click.option("--turns", type=int, default=4, show_default=True)
@click.option("--measure", "measured", type=click.Path(exists=True, path_type=Path), hidden=True)
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
@folders
def main(
    before: Path | None,
    rows: int,
    turns: int,
    measured: Path | None,
    threads: tuple[int, ...],
    scratch: Path | None,
    out: Path,
) -> None:
    """Search the same parts with the code of BEFORE and of this checkout, in turns."""
    if measured is not None:
        sys.stdout.write(json.dumps(measure(measured, threads[0])))
        return
    if before is None:
        raise click.UsageError("give --before, a checkout to compare with")
    settings = {"rows": rows, "turns": turns, "threads": list(threads)}
    results = Results(
        name="search-paired", title="Exact search before and after", settings=settings, facts=machine_facts()
    )
    with scratch_folder(scratch) as folder:
        store = Store.create(folder / "store")
        for dtype, numbers in NUMBERS.items():
            manifest = manifest_of(rows, LAYERS * numbers, dtype)
            manifest["storage"]["groups"] = [[f"{n}", n * numbers, (n + 1) * numbers] for n in range(LAYERS)]
            random_part(store, dtype, manifest)
        for count in threads:
            add_table(results, store.path, before, rows, turns, count)
            results.write(out)


if __name__ == "__main__":
    main()
