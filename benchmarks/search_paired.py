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
from numpy.typing import NDArray
from search import TOP_K, Draw, chunk_files, manifest_of, normal, random_part, read_plainly

from ghoststore import Store
from query.search import products
from query.search.part_score import Metric, Term
from query.search.search import search

LAYERS = 48
"""Of GPT-2 Small: each is a block, with a scale of its own in codes."""
NUMBERS = {"float32": 64, "int8": 256, "onebit": 2048}
"""A layer's numbers of 256 bytes."""
WAYS: tuple[tuple[Metric, int], ...] = (("cosine", 1), ("dot", 1), ("dot", 64))
REPEATS = 2
READ = "plain read"
BEFORE, WITHOUT, AFTER = "before", "without kernel", "after"
DRAWN = 512
"""Rows that are drawn; all others are some of them, turned by some columns and scaled."""


def turned(drawn_RD: NDArray[np.float32]) -> Draw:
    """Rows that differ, at a fraction of the cost of drawing each."""

    def draw(rng: np.random.Generator, count: int, dimension: int) -> NDArray[np.float32]:
        rows = rng.integers(0, DRAWN, count)
        factor_R1 = rng.uniform(0.5, 1.5, (count, 1)).astype(np.float32)
        return np.roll(drawn_RD[rows], int(rng.integers(dimension)), axis=1) * factor_R1

    return draw


def measure(store: Path, threads: int, kernel: bool) -> dict[str, Any]:
    """Wall and CPU seconds of plain reads and searches with the code of this process, and a digest of the answers."""
    torch.set_num_threads(threads)
    if not kernel and hasattr(products, "KERNEL_QUERIES"):
        products.KERNEL_QUERIES = 0
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
        for metric, count in WAYS:
            generator = torch.Generator().manual_seed(1)
            vectors = torch.randn(count, part.layout.dimension, generator=generator, dtype=torch.float64)
            term = Term.of(part, vectors, metric=metric)
            name = f"{dtype}|{metric}, {count} queries"
            ranking, _ = record(name, lambda term=term: search([term], top_k=TOP_K))
            measured[f"answer {name}"] = [ranking.rows.tolist(), [x.hex() for x in ranking.scores.ravel().tolist()]]
    return measured


def child(tree: Path, store: Path, threads: int, kernel: bool) -> dict[str, Any]:
    """:func:`measure` with the code of a checkout."""
    options = ["--measure", str(store), "--threads", str(threads), "--kernel" if kernel else "--no-kernel"]
    done = subprocess.run(
        [sys.executable, "-P", __file__, *options],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": str(threads)},
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def add_table(results: Results, store: Path, before: Path, rows: int, turns: int, threads: int) -> None:
    here = Path(__file__).resolve().parent.parent
    trees = {BEFORE: before, WITHOUT: here, AFTER: here}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for turn in range(turns):
        for name in trees if turn % 2 == 0 else reversed(trees):
            runs[name].append(child(trees[name], store, threads, kernel=name == AFTER))
    table = []
    for key in runs[BEFORE][0]:
        if key.startswith("answer"):
            continue
        dtype, way = key.split("|")
        size = sum(path.stat().st_size for path in chunk_files(Store.open(store).part(dtype)))

        def seconds(name: str, column: int, key: str = key) -> list[float]:
            return [repeat[column] for run in runs[name] for repeat in run[key]]

        def total(run: dict[str, Any], column: int, key: str = key) -> float:
            return sum(repeat[column] for repeat in run[key])

        def of_read(name: str, column: int, read: str = f"{dtype}|{READ}", total: Any = total) -> list[float]:
            """Bytes a second ÷ those of the plain read of the same process, run by run."""
            return [total(run, column, read) / total(run, column) for run in runs[name]]

        line: dict[str, Any] = {"encoding": dtype, "way": way}
        for name in trees:
            line[f"rows a CPU second {name}"] = Spread.of([rows / s for s in seconds(name, 1)]).show(",.0f")
        for name in trees:
            line[f"÷ plain read, CPU, {name}"] = Spread.of(of_read(name, 1)).show(".3f")
        line["÷ plain read, wall, after"] = Spread.of(of_read(AFTER, 0)).show(".3f")
        line["GB a CPU second after"] = f"{size / float(np.median(seconds(AFTER, 1))) / 1e9:.2f}"
        line["CPU before ÷ after"] = Spread.of(
            [total(old, 1) / total(new, 1) for old, new in zip(runs[BEFORE], runs[AFTER], strict=True)]
        ).show(".1f")
        answers = [json.dumps(run[f"answer {key}"]) for name in trees for run in runs[name] if f"answer {key}" in run]
        line["answers"] = "–" if way == READ else ("same bits" if len(set(answers)) == 1 else "differ")
        table.append(line)
    note = (
        f"{rows:,} rows of {LAYERS} layers, {', '.join(f'{n:,} {dtype}' for dtype, n in NUMBERS.items())} numbers "
        f"each; {threads} thread(s), {turns} turns of {REPEATS} repeats in new processes, medians (least to largest); "
        f"warm files, the best {TOP_K}. The plain read goes into one buffer that stays in the cache, unchecked. "
        "Vectors are noise: more rows pass the screen than of gradients. The kernel is that of `ghoststore[fast]`; "
        "without it torch multiplies."
    )
    numbers = {
        name: [{key: x for key, x in run.items() if not key.startswith("answer")} for run in each]
        for name, each in runs.items()
    }
    results.add(
        Table(f"{rows:,} rows, {threads} thread(s)", table, note), **{f"{rows} rows, {threads} threads": numbers}
    )


@click.command()
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--rows", type=int, multiple=True, default=(4000, 20000), show_default=True)
@click.option("--turns", type=int, default=4, show_default=True)
@click.option("--measure", "measured", type=click.Path(exists=True, path_type=Path), hidden=True)
@click.option("--kernel/--no-kernel", default=True, hidden=True)
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
@folders
def main(
    before: Path | None,
    rows: tuple[int, ...],
    turns: int,
    measured: Path | None,
    kernel: bool,
    threads: tuple[int, ...],
    scratch: Path | None,
    out: Path,
) -> None:
    """Search the same parts with the code of BEFORE and of this checkout, in turns."""
    if measured is not None:
        sys.stdout.write(json.dumps(measure(measured, threads[0], kernel)))
        return
    if before is None:
        raise click.UsageError("give --before, a checkout to compare with")
    settings = {"rows": list(rows), "turns": turns, "threads": list(threads)}
    results = Results(
        name="search-paired", title="Exact search before and after", settings=settings, facts=machine_facts()
    )
    with scratch_folder(scratch) as folder:
        for size in rows:
            store = Store.create(folder / f"store-{size}")
            for dtype, numbers in NUMBERS.items():
                manifest = manifest_of(size, LAYERS * numbers, dtype)
                manifest["storage"]["groups"] = [[f"{n}", n * numbers, (n + 1) * numbers] for n in range(LAYERS)]
                drawn = normal(np.random.default_rng(0), DRAWN, LAYERS * numbers)
                random_part(store, dtype, manifest, draw=turned(drawn))
            for count in threads:
                add_table(results, store.path, before, size, turns, count)
                results.write(out)


if __name__ == "__main__":
    main()
