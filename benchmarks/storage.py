"""What each ``--proj-dtype`` does to the ranking of real gradients, and what exact re-ranking mends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from common import Clock, Results, Table, folders, machine_facts, ratios, scratch_folder, write_jsonl
from domains import best, build, read_rows, train
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from ghoststore import Corpus, Part, ProjectionConfig, Store
from ghoststore.store import PartLayout
from ghoststore.store.part.encoding import ENCODINGS
from ghoststore.store.part.part import create_part, span_table
from ghoststore.store.part.sealing import seal_vectors
from ghoststore.store.spans.writer import BackgroundWriter, SpanData
from query.ask.encoder import PartEncoder
from query.ask.question import Grouping
from query.ask.rerank import rerank
from query.common.rank_correlation import spearman
from query.search.part_score import Term
from query.search.search import search
from query.search.top_k import Ranking
from query.search.vectors import PartVectors

EXACT = "float32"
PROJECTIONS = {"sketched": ProjectionConfig(), "plain blocks": ProjectionConfig(rank_total=256)}
QUERIES: dict[str, Grouping] = {"domain means": "domain", "val samples": "each"}
CUTS = (10, 100)
CANDIDATES = (100,)
TOP_K = 10

Scores = NDArray[np.float64]
RowSource = Callable[[NDArray[np.int64]], Tensor]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near the rankings of one dtype are to float32's: means over the queries, and the least."""

    spearman: float
    least_spearman: float
    recall: dict[int, float]
    """By number of rows: the share of float32's best that are among this dtype's best."""


def encoded_again(store: Store, part: Part, dtype: str) -> Part:
    """The same part as a build with ``--proj-dtype`` makes it, from the vectors of a float32 part."""
    layout = PartLayout.choose(
        rows=part.layout.rows,
        dimension=part.layout.dimension,
        groups=part.layout.groups,
        dtype=dtype,
        span_rows=part.layout.span_rows,
        store_text=False,
    )
    storage = {**asdict(layout), "groups": part.manifest["storage"]["groups"]}
    path = store.part_path(f"{part.name}-{dtype}")
    other = create_part(path, {**part.manifest, "storage": storage}, span_table(part))
    with BackgroundWriter(other) as writer:
        for span in part.spans:
            rows = part.layout.span_of(span)
            copied = {spec.name for spec in other.layout.arrays()} - {"vectors", "scale", "norm"}
            arrays = {name: part.read(name, *rows) for name in copied}
            seal_vectors(arrays, PartVectors(part).gather(range(*rows)).numpy(), other)
            writer.put(SpanData(span, arrays))
    return Part(path)


def cosines(part: Part, queries_QD: Tensor) -> Scores:
    """(Q, N): of every usable row; -1 of the others, which stand last."""
    queries = queries_QD.double()
    queries /= queries.norm(dim=1, keepdim=True)
    found = np.full((len(queries), part.rows), -1.0)
    norm = np.linalg.norm(part.read("norm", 0, part.rows).astype(np.float64), axis=1)
    for piece in PartVectors(part).stream():
        products = (queries @ piece.rows_RD.double().T).numpy()
        lengths = norm[piece.start : piece.stop]
        found[:, piece.start : piece.stop] = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), -1)
    return found


def agreement(exact_QN: Scores, found_QN: Scores) -> Agreement:
    """Of rankings by ``found_QN`` with those by ``exact_QN``."""
    pairs = list(zip(exact_QN, found_QN, strict=True))
    correlations = spearman(exact_QN, found_QN)
    recall = {cut: mean_shared((best(exact, cut), best(found, cut)) for exact, found in pairs) for cut in CUTS}
    return Agreement(float(correlations.mean()), float(correlations.min()), recall)


def mean_shared(pairs: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> float:
    """The mean share of the first of each pair that is in the second."""
    return float(np.mean([np.isin(wanted, found).mean() for wanted, found in pairs]))


def add_agreement(results: Results, label: str, parts: dict[str, Part], queries: dict[str, Tensor]) -> None:
    """Each dtype against float32: bytes, and the ranking of every row for each kind of query."""
    exact = {kind: cosines(parts[EXACT], vectors) for kind, vectors in queries.items()}
    rows, numbers = [], {}
    size = parts[EXACT].layout.row_bytes
    for dtype, part in parts.items():
        row = {
            "dtype": dtype,
            "bytes a sample": f"{part.layout.row_bytes:,}",
            "÷ float32": f"{part.layout.row_bytes / size:.3f}",
        }
        for kind, vectors in queries.items():
            found = agreement(exact[kind], cosines(part, vectors))
            numbers[f"{dtype}, {kind}"] = asdict(found)
            row[f"{kind}: Spearman, mean (least)"] = f"{found.spearman:.4f} ({found.least_spearman:.4f})"
            row |= {f"{kind}: recall@{cut}": f"{found.recall[cut]:.3f}" for cut in CUTS}
        rows.append(row)
    counts = ", ".join(f"{len(vectors)} {kind}" for kind, vectors in queries.items())
    note = (
        f"{parts[EXACT].rows:,} rows × {parts[EXACT].layout.dimension:,} numbers in {len(parts[EXACT].groups)} "
        f"block(s), cosine, {counts}. Spearman: of the scores of all rows with those of the float32 part. Bytes: all "
        "numbers of a row, its id and text aside."
    )
    results.add(Table(f"Rankings against float32, {label}", rows, note), **{f"agreement, {label}": numbers})


def add_reranking(results: Results, label: str, parts: dict[str, Part], queries: dict[str, Tensor]) -> None:
    """recall@10 of the scaled codes before and after exact scores of their candidates."""
    rows, numbers = [], {}
    for dtype in (dtype for dtype, part in parts.items() if part.encoding.scaled):
        recompute = PartEncoder(parts[dtype], device="cpu").recompute
        sources: dict[str, RowSource] = {"domain means": recompute, "val samples": PartVectors(parts[EXACT]).gather}
        for kind, vectors in queries.items():
            wanted = best_rows(parts[EXACT], vectors, TOP_K).rows
            row = {"dtype": dtype, "query": kind}
            for count in (TOP_K, *CANDIDATES):
                found, seconds = reranked(parts[dtype], vectors, count, sources[kind])
                recall = mean_shared(zip(wanted, found, strict=True))
                numbers[f"{dtype}, {kind}, {count}"] = {"recall": recall, "seconds": seconds}
                row["as stored" if count == TOP_K else f"of {count} candidates"] = f"{recall:.3f}"
                if count > TOP_K:
                    row[f"seconds, {count}"] = f"{seconds:.1f}" if kind == "domain means" else ""
            rows.append(row)
    note = (
        f"recall@{TOP_K}: the share of float32's best {TOP_K} among the best {TOP_K} after exact scores of so many "
        "candidates a query. For domain means these are computed again from model and corpus (seconds: search and "
        "all); for val samples they are read from the float32 part, which holds the same numbers."
    )
    results.add(Table(f"Exact re-ranking, {label}", rows, note), **{f"re-ranking, {label}": numbers})


def reranked(part: Part, queries_QD: Tensor, count: int, source: RowSource) -> tuple[NDArray[np.int64], float]:
    """((Q, 10) rows, seconds): the best of ``count`` candidates by exact scores; as they are stored if it is 10."""
    began = Clock.now()
    found = best_rows(part, queries_QD, count)
    if count > TOP_K:
        found = rerank(found, queries_QD, metric="cosine", top_k=TOP_K, recompute=source)
    return found.rows, Clock.now().since(began).wall


def best_rows(part: Part, queries_QD: Tensor, count: int) -> Ranking:
    return search([Term.of(part, queries_QD, metric="cosine")], top_k=count)[0]


def add_speed(results: Results, label: str, parts: dict[str, Part], queries: dict[str, Tensor], repeats: int) -> None:
    """Wall time of exact search over the stored codes, dtypes in turns."""
    rows = [{"dtype": dtype} for dtype in parts]
    numbers = {}
    for count in (1, 64):
        spent: dict[str, list[float]] = {dtype: [] for dtype in parts}
        for repeat in range(repeats + 1):
            for dtype, part in parts.items():
                began = Clock.now()
                best_rows(part, queries["val samples"][:count], TOP_K)
                if repeat:  # the first fills the page cache
                    spent[dtype].append(Clock.now().since(began).wall)
        for row, (dtype, times) in zip(rows, spent.items(), strict=True):
            row[f"queries: {count}"] = ratios(times, spent[EXACT]).show(".2f")
            numbers[f"{dtype}, {count}"] = times
    note = (
        f"Wall time ÷ that of float32: rows read, checked, decoded and multiplied for the best {TOP_K}; warm files, "
        f"medians of {repeats} repeats (least to largest), in turns."
    )
    results.add(Table(f"Time to search, {label}", rows, note), **{f"seconds, {label}": numbers})


def measure(results: Results, store: Store, name: str, label: str, val_set: Path, repeats: int) -> None:
    """All tables of one projection, whose float32 part is called ``name``."""
    exact = store.part(name)
    parts = {dtype: exact if dtype == EXACT else encoded_again(store, exact, dtype) for dtype in ENCODINGS}
    corpus = Corpus.open(str(val_set))
    encoder = PartEncoder(exact, device="cpu")
    queries = {kind: encoder.encode_val_set(corpus, grouping, None).vectors for kind, grouping in QUERIES.items()}
    add_agreement(results, label, parts, queries)
    add_reranking(results, label, parts, queries)
    add_speed(results, label, parts, queries, repeats)


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), required=True, help="Training corpus, with domains."
)
@click.option("--val", type=click.Path(exists=True, path_type=Path), required=True, help="Val corpus, with domains.")
@click.option("--minutes", type=float, default=2.0, show_default=True, help="How long to train.")
@click.option("--steps", type=int, help="Train so many steps instead.")
@click.option("--max-length", type=int, default=256, show_default=True, help="Tokens of a sample.")
@click.option("--max-samples", type=int, help="Only every so many-th sample of the training corpus, this many in all.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Of the searches that are timed.")
@folders
def main(
    data: Path,
    val: Path,
    minutes: float,
    steps: int | None,
    max_length: int,
    max_samples: int | None,
    repeats: int,
    scratch: Path | None,
    out: Path,
) -> None:
    """Train a small GPT-2, build its store, keep its gradients in every dtype, and compare the rankings."""
    disable_progress_bar()
    torch.manual_seed(0)
    facts = machine_facts()
    rows, val_rows = read_rows(data), read_rows(val)
    rows = rows[:: max(1, len(rows) // max_samples)][:max_samples] if max_samples else rows
    with scratch_folder(scratch) as folder:
        trained = train(rows, folder / "checkpoint", minutes=minutes, steps=steps, max_length=max_length)
        corpus, val_set = write_jsonl(folder / "train.jsonl", rows), write_jsonl(folder / "val.jsonl", val_rows)
        results = Results(
            name="storage",
            title="Rankings by stored dtype",
            settings={
                "data": data.name,
                "val set": val.name,
                "train rows": len(rows),
                "val rows": len(val_rows),
                "max length": max_length,
                **{f"training {key}": round(value, 3) for key, value in trained.items()},
            },
            facts=facts,
        )
        for place, (label, projection) in enumerate(PROJECTIONS.items()):
            build(folder, f"part-{place}", corpus, max_length, projection)
            measure(results, Store.open(folder / "store"), f"part-{place}", label, val_set, repeats)
    results.write(out)


if __name__ == "__main__":
    main()
