"""Exact search by the actors of a Ray cluster of this machine ÷ that of one process with as many threads, in turns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import CORES, Results, Spread, Table, folders, machine_facts, ratios, scratch_folder
from search import TOP_K, manifest_of, random_part
from search_paired import DRAWN, turned

from ghoststore import Store
from query.search.on_ray import searching_on_ray
from query.search.part_score import Term
from query.search.search import search


@click.command()
@click.option("--rows", default=30_000, show_default=True)
@click.option("--dimension", default=12_288, show_default=True)
@click.option("--dtype", default="int8", show_default=True)
@click.option("--queries", multiple=True, type=int, default=(1, 64), show_default=True)
@click.option("--repeats", default=3, show_default=True)
@folders
def main(
    rows: int, dimension: int, dtype: str, queries: tuple[int, ...], repeats: int, scratch: Path | None, out: Path
) -> None:
    """One process and actors, after each was asked once."""
    with scratch_folder(scratch) as folder:
        store = Store.create(folder / "store")
        drawn = np.random.default_rng(1).standard_normal((DRAWN, dimension), dtype=np.float32)
        part = random_part(store, "part", manifest_of(rows, dimension, dtype), draw=turned(drawn))
        began = time.perf_counter()
        with searching_on_ray(None, [part]) as on_ray:
            terms = [Term.of(part, torch.ones(1, dimension), metric="dot")]
            on_ray(terms, top_k=TOP_K)
            starting = time.perf_counter() - began
            lines, numbers = [], {}
            for count in queries:
                query_QD = torch.randn(count, dimension, generator=torch.Generator().manual_seed(count))
                terms = [Term.of(part, query_QD, metric="dot")]
                spent: dict[str, list[float]] = {"one process": [], "actors": []}
                alike = True
                for turn in range(repeats + 1):
                    answers: list[Any] = []
                    for way, find in (("one process", search), ("actors", on_ray)):
                        began = time.perf_counter()
                        answers.append(find(terms, top_k=TOP_K)[0])
                        if turn:
                            spent[way].append(time.perf_counter() - began)
                    alike = alike and np.array_equal(answers[0].scores, answers[1].scores)
                    alike = alike and np.array_equal(answers[0].rows, answers[1].rows)
                lines.append(
                    {
                        "queries": str(count),
                        **{f"{way}, seconds": Spread.of(some).show(".2f") for way, some in spent.items()},
                        "÷": ratios(spent["one process"], spent["actors"]).show(".2f"),
                        "same bits": "yes" if alike else "NO",
                    }
                )
                numbers[str(count)] = spent
        results = Results(
            name="search-on-ray",
            title="Exact search by a Ray cluster of one machine",
            settings={"rows": rows, "numbers a row": dimension, "dtype": dtype, "repeats": repeats},
            facts=machine_facts(),
        )
        note = (
            f"{CORES} threads, or as many actors of one. Medians (least to largest), in turns, the files in the page "
            f"cache. Before: {starting:.1f} s from nothing to the first answer of the cluster."
        )
        results.add(
            Table("A question to a part that was asked before", lines, note), starting=starting, seconds=numbers
        )
        results.write(out)


if __name__ == "__main__":
    main()
