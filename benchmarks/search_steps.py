"""What does an exact search of warm files spend its time on? The plain read of its files, the same read with every
check, with the products as well, and the whole search: CPU seconds of one thread, in turns, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import google_crc32c
import numpy as np
import torch
from common import Results, Spread, Table, folders, machine_facts, scratch_folder
from search import TOP_K, chunk_files, manifest_of, normal, random_part, read_plainly
from search_paired import DRAWN, LAYERS, NUMBERS, turned

from ghoststore import Store
from ghoststore.progress import Silent
from ghoststore.store import Part
from query.ask.hybrid import HybridSearch
from query.search import products as query_products
from query.search.kernel import registers
from query.search.part_score import Term
from query.search.products import Products, products_of
from query.search.search import search, similarities
from query.search.units import Units

PIECE = 1 << 18
"""Bytes of which checksums are computed in the cache."""
READ, CHECKSUMS, CHECKED, MULTIPLIED, WHOLE = (
    "plain read of the vectors, one buffer",
    "their checksums alone, of bytes in the cache",
    "read chunk by chunk, opened safely, checked",
    "the same, and multiplied",
    "search",
)
WITHOUT = "search without the compiled kernel"
WORDS = "search with words (`--lexical 0.1`), their BM25 at hand"
ALL = "scores of all rows"


def units_read(part: Part, products: list[Products]) -> Callable[[], Any]:
    def run() -> None:
        units = Units([part], products)
        for span in part.spans:
            for _ in units.of_span(span):
                pass

    return run


def checksums(size: int) -> Callable[[], Any]:
    piece = np.random.default_rng(0).integers(0, 256, PIECE, dtype=np.uint8).tobytes()

    def run() -> None:
        for _ in range(size // PIECE):
            google_crc32c.value(piece)

    return run


def without_kernel(run: Callable[[], Any]) -> Callable[[], Any]:
    def wrapped() -> Any:
        with patch.object(query_products, "KERNEL_QUERIES", 0):
            return run()

    return wrapped


def with_words(part: Part, term: Term) -> Callable[[], Any]:
    """One row in ten shares a word."""
    rng, ranked_N = np.random.default_rng(2), np.ones(part.layout.rows, dtype=bool)
    lexical_QN = np.where(rng.random((1, part.layout.rows)) < 0.1, rng.random((1, part.layout.rows)), 0.0)

    def run() -> None:
        found = HybridSearch([term], lexical_QN, 0.1, ranked_N, by_rows=False, device="cpu")
        found.rank(TOP_K, 0, Silent().task("searching", part.rows))

    return run


def measure(part: Part, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each step, in turns."""
    vectors = torch.randn(1, part.layout.dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    term = Term.of(part, vectors, metric="dot")
    products = products_of(part, term.queries_QD / term.queries_QD.norm())
    ways = {
        READ: read_plainly(part, 0),
        CHECKSUMS: checksums(sum(path.stat().st_size for path in chunk_files(part))),
        CHECKED: units_read(part, []),
        MULTIPLIED: units_read(part, [products]),
        WHOLE: lambda: search([term], top_k=TOP_K),
        WITHOUT: without_kernel(lambda: search([term], top_k=TOP_K)),
        WORDS: with_words(part, term),
        ALL: lambda: similarities([term]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - began)
    return seconds


@click.command()
@click.option("--rows", type=int, default=24_000, show_default=True)
@click.option("--repeats", type=int, default=9, show_default=True)
@folders
def main(rows: int, repeats: int, scratch: Path | None, out: Path) -> None:
    """Take an exact search apart."""
    torch.set_num_threads(1)
    settings = {"rows": rows, "layers": LAYERS, "repeats": repeats, "threads": 1, "registers": str(registers())}
    results = Results(
        name="search-steps", title="What an exact search is made of", settings=settings, facts=machine_facts()
    )
    with scratch_folder(scratch) as folder:
        store = Store.create(folder / "store")
        for dtype, numbers in NUMBERS.items():
            manifest = manifest_of(rows, LAYERS * numbers, dtype)
            manifest["storage"]["groups"] = [[f"{n}", n * numbers, (n + 1) * numbers] for n in range(LAYERS)]
            drawn = normal(np.random.default_rng(0), DRAWN, LAYERS * numbers)
            part = random_part(store, dtype, manifest, draw=turned(drawn))
            seconds = measure(part, repeats)
            lines = []
            for name, own in seconds.items():
                shares = [of_read / mine for of_read, mine in zip(seconds[READ], own, strict=True)]
                lines.append(
                    {
                        "step": name,
                        "µs a row": Spread.of([1e6 * second / rows for second in own]).show(".2f"),
                        "plain read ÷ it": Spread.of(shares).show(".2f"),
                    }
                )
            note = (
                f"{rows:,} rows of {LAYERS} layers of {numbers:,} numbers, {part.layout.span_rows} a span; one "
                "question, dot; vectors are noise. Medians (least to largest) of turns. The search reads status, norms "
                "and scales of each span, too, keeps the best rows, and scores in float64 what may be among them."
            )
            results.add(Table(dtype, lines, note), **{dtype: seconds})
            results.write(out)


if __name__ == "__main__":
    main()
