"""Every kind of FAISS index beside exact search and plain FAISS: recall, speed, bytes, building time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, mebibytes, scratch_folder, write_jsonl
from domains import read_rows, train
from numpy.typing import NDArray
from search import manifest_of, random_part
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Part, Store
from query.ann.index import AnnIndex
from query.ann.recall import recall_of
from query.search.part_score import Metric, Term
from query.search.search import search
from query.search.top_k import Ranking
from query.search.vectors import PartVectors

QUERIES = 64
ONE_BY_ONE = 16
MEMBERS = 16
CUTS = (10, 100)
CLUSTERS = 1000
KINDS = ("RaBitQ", "RaBitQfs", "SQ8", "SQfp16", "Flat", "IVF{lists},RaBitQ", "IVF{lists},SQ8", "HNSW32,SQ8")
SLOWEST_TO_BUILD = 50_000
"""Rows above which graphs, which are built row by row, are left out."""

Matrix = NDArray[np.float32]
Queries = dict[str, Matrix]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Rows around centres, some near and some far, of lengths that differ."""

    centres: Matrix

    @classmethod
    def of(cls, dimension: int) -> Clusters:
        return cls(np.random.default_rng(1).standard_normal((CLUSTERS, dimension), dtype=np.float32))

    def draw(self, rng: np.random.Generator, count: int, dimension: int) -> Matrix:
        """``count`` rows of random clusters."""
        return self.draw_of(rng, rng.integers(0, len(self.centres), count))

    def draw_of(self, rng: np.random.Generator, clusters: NDArray[np.int64]) -> Matrix:
        """A row of each of these clusters."""
        near = rng.uniform(0.3, 1.0, (len(clusters), 1)).astype(np.float32)
        rows = rng.standard_normal((len(clusters), self.centres.shape[1]), dtype=np.float32)
        rows += near * self.centres[clusters]
        return np.asarray(rows * rng.lognormal(0.0, 0.7, (len(clusters), 1)).astype(np.float32))

    def queries(self) -> Queries:
        """Rows that the part does not have, and means of such rows, each of one cluster."""
        rng = np.random.default_rng(2)
        clusters = rng.integers(0, len(self.centres), QUERIES)
        means = self.draw_of(rng, np.repeat(clusters, MEMBERS)).reshape(QUERIES, MEMBERS, -1).mean(1)
        return {"row": self.draw_of(rng, clusters), "mean": means}


def val_queries(part: Part) -> Queries:
    """Usable rows of a part that was built of a val set, and means of rows of one domain."""
    status, domain = (np.asarray(part.read(name, 0, part.layout.rows)) for name in ("status", "domain"))
    order = np.random.default_rng(0).permutation(np.flatnonzero(status < 16))
    vectors = PartVectors(part).gather(range(part.layout.rows)).numpy()
    groups = []
    for one in np.unique(domain[order]):
        mine = order[domain[order] == one]
        groups += [mine[first : first + MEMBERS] for first in range(0, len(mine) - MEMBERS + 1, MEMBERS)]
    return {"row": vectors[order[:QUERIES]], "mean": np.stack([vectors[group].mean(0) for group in groups[:QUERIES]])}


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to search."""

    recall: dict[str, float]
    one_by_one: float
    """Queries a second."""
    together: float
    bytes: int
    build_seconds: float
    open_seconds: float
    settings: str

    def cells(self, way: str) -> dict[str, str]:
        return {
            "way": way,
            **{name: f"{share:.3f}" for name, share in self.recall.items()},
            "queries/s, one by one": f"{self.one_by_one:,.3g}",
            "all at once": f"{self.together:,.3g}",
            "size": mebibytes(self.bytes),
            "build s": f"{self.build_seconds:.1f}",
            "open s": f"{self.open_seconds:.2f}",
            "settings": self.settings,
        }


Rank = Callable[[Term, int], Ranking]


def speeds(rank: Rank, term: Term) -> tuple[float, float]:
    """Queries a second at the first cut: one by one, and all at once."""
    single = [term.with_queries(query.unsqueeze(0)) for query in term.queries_QD[:ONE_BY_ONE]]
    rank(single[0], CUTS[0])
    rates = []
    for calls in (single, [term]):
        began = time.perf_counter()
        for one in calls:
            rank(one, CUTS[0])
        rates.append(sum(len(one.queries_QD) for one in calls) / (time.perf_counter() - began))
    return rates[0], rates[1]


def recalls(rank: Rank, terms: dict[str, Term], exact: dict[str, Ranking]) -> dict[str, float]:
    return {f"@{k}, {kind}s": recall_of(rank(term, k), exact[kind], k) for k in CUTS for kind, term in terms.items()}


def exactly(term: Term, k: int) -> Ranking:
    return search([term], top_k=k)[0]


def measure_index(part: Part, factory: str | None, metric: Metric, ways: tuple[Any, Any]) -> tuple[str, Measured]:
    """One index; ``ways`` are the terms and their exact rankings by kind of query."""
    report = ghoststore.index(store=part.path.parent.parent, part=part.name, factory=factory, metric=metric)
    began = time.perf_counter()
    index = AnnIndex.open(part, report.name)
    opened = time.perf_counter() - began

    def rank(term: Term, k: int) -> Ranking:
        return index.search(term, top_k=k)[0]

    manifest = report.manifest
    effort = "" if manifest.effort is None else f"effort {manifest.effort}, "
    settings = f"{manifest.front_dimension} numbers, {effort}{manifest.candidates} scored"
    found = Measured(
        recalls(rank, *ways), *speeds(rank, ways[0]["row"]), manifest.size, manifest.seconds, opened, settings
    )
    return manifest.factory, found


def measure_flat(part: Part, metric: Metric, ways: tuple[Any, Any]) -> Measured:
    """FAISS alone: all vectors as float32 in memory, by inner product, of length 1 for the cosine."""
    began = time.perf_counter()
    flat = faiss.IndexFlatIP(part.layout.dimension)
    for chunk in PartVectors(part).stream():
        rows = chunk.rows_RD if metric == "dot" else torch.nn.functional.normalize(chunk.rows_RD)
        flat.add(rows.numpy())
    built = time.perf_counter() - began

    def rank(term: Term, k: int) -> Ranking:
        scores, rows = flat.search(term.queries_QD.float().numpy(), k)
        return Ranking(rows, scores.astype(np.float64) * (1 + 1e-6) + 1e-9)  # its rounding is no error

    size = part.rows * part.layout.dimension * 4
    return Measured(recalls(rank, *ways), *speeds(rank, ways[0]["row"]), size, built, 0.0, "all rows in memory")


def add_part(results: Results, part: Part, queries: Queries, metric: Metric, kinds: Sequence[str]) -> None:
    """One table: exact search, FAISS's Flat, the default index and every kind."""
    terms = {kind: Term.of(part, torch.from_numpy(rows), metric=metric) for kind, rows in queries.items()}
    exact = {kind: exactly(term, max(CUTS)) for kind, term in terms.items()}
    ways = (terms, exact)
    stored = part.rows * part.layout.dimension * part.encoding.stored.itemsize
    found = {
        "exact search": Measured(
            recalls(exactly, *ways), *speeds(exactly, terms["row"]), stored, 0.0, 0.0, "streams the store"
        ),
        "plain FAISS Flat": measure_flat(part, metric, ways),
    }
    name, default = measure_index(part, None, metric, ways)
    found[f"index, default: {name}"] = default
    for kind in kinds:
        lists = 1 << round(np.log2(4 * np.sqrt(part.rows)))
        factory = kind.format(lists=lists)
        if factory != name and (part.rows <= SLOWEST_TO_BUILD or not factory.startswith("HNSW")):
            found[f"index, {factory}"] = measure_index(part, factory, metric, ways)[1]
    counts = ", ".join(f"{len(rows)} {kind}s" for kind, rows in queries.items())
    note = (
        f"{part.rows:,} rows × {part.layout.dimension:,} numbers, {part.layout.dtype}, {metric}; recall of {counts} "
        f"that the part does not have, against exact search; a mean is of {MEMBERS} rows. Size of an index: all its "
        "files; the stored vectors are needed, too. Queries a second for the best 10, warm, the rows scored exactly. "
        "Building includes measuring. Opening checks every byte."
    )
    title = f"{part.name}, {metric}"
    numbers = {way: {field: getattr(one, field) for field in one.__slots__} for way, one in found.items()}
    results.add(Table(title, [one.cells(way) for way, one in found.items()], note), **{title: numbers})


def train_and_build(folder: Path, data: Path, val_set: Path, minutes: float, max_length: int) -> tuple[Path, Path]:
    """Train a GPT-2 as ``domains.py`` does; the stores of the training and of the val corpus."""
    train(read_rows(data), folder / "checkpoint", minutes=minutes, steps=None, max_length=max_length)
    for name, rows in (("store", read_rows(data)), ("val-store", read_rows(val_set))):
        ghoststore.build(
            checkpoint=folder / "checkpoint",
            data=write_jsonl(folder / f"{name}.jsonl", rows),
            store=folder / name,
            name="gpt2-tiny",
            max_length=max_length,
        )
    return folder / "store", folder / "val-store"


@click.command()
@click.option("--rows", type=int, default=200_000, show_default=True, help="Synthetic rows.")
@click.option("--dimension", type=int, default=3072, show_default=True, help="Numbers of a synthetic row.")
@click.option("--dtype", default="float16", show_default=True, help="How synthetic rows are stored.")
@click.option("--metric", type=click.Choice(["cosine", "dot"]), default="cosine", show_default=True)
@click.option("--kinds", default=";".join(KINDS), help="Factory strings, separated by ';'.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Real gradients: train on this corpus.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), help="Val corpus, for the queries.")
@click.option("--minutes", type=float, default=4.0, show_default=True, help="How long to train.")
@click.option("--max-length", type=int, default=128, show_default=True, help="Tokens of a sample.")
@click.option("--store", type=click.Path(exists=True, path_type=Path), help="Real gradients: a store that is there.")
@click.option("--val-store", type=click.Path(exists=True, path_type=Path), help="Parts of the same names, of val rows.")
@click.option("--threads", type=int, default=1, show_default=True)
@folders
def main(
    rows: int,
    dimension: int,
    dtype: str,
    metric: Metric,
    kinds: str,
    data: Path | None,
    val_set: Path | None,
    minutes: float,
    max_length: int,
    store: Path | None,
    val_store: Path | None,
    threads: int,
    scratch: Path | None,
    out: Path,
) -> None:
    """Build each kind of index, of synthetic rows or of real gradients, and compare."""
    disable_progress_bar()
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    real = data is not None or store is not None
    results = Results(
        name="index-gradients" if real else f"index-{rows}x{dimension}" + ("-dot" if metric == "dot" else ""),
        title="The FAISS index, kind by kind",
        settings={"threads": threads, "faiss": faiss.__version__},
        facts=machine_facts(),
    )
    with scratch_folder(scratch) as folder:
        if data is not None and val_set is not None:
            store, val_store = train_and_build(folder, data, val_set, minutes, max_length)
        if store is not None and val_store is not None:
            for name in Store.open(store).part_names():
                part, val = Store.open(store).part(name), Store.open(val_store).part(name)
                for one in ("cosine", "dot"):
                    add_part(results, part, val_queries(val), one, kinds.split(";") if one == metric else ())
        elif not real:
            clusters = Clusters.of(dimension)
            part = random_part(
                Store.create(folder / "store"), "clusters", manifest_of(rows, dimension, dtype), draw=clusters.draw
            )
            add_part(results, part, clusters.queries(), metric, kinds.split(";"))
        else:
            raise click.UsageError("real gradients need --data and --val-set, or --store and --val-store")
    results.write(out)


if __name__ == "__main__":
    main()
