"""Building an index: stream the committed rows into FAISS, tune its settings, and measure the recall.

Legend: N rows of the index, T rows to train on, D numbers of a vector, d numbers of a vector in FAISS.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.software import versions_of
from ghoststore.store import Part
from ghoststore.store.base.own import remember_digest
from ghoststore.store.part.index_manifest import IndexManifest
from ghoststore.store.part.indexes import begun_path, building, publish_index, seal_files
from indexer.projection import draws
from query.ann.engine import Engine, load_faiss
from query.ann.recall import CANDIDATES, measure, take_samples, tune
from query.ann.rows import ROW, CheckedRows, digest_of
from query.ann.searcher import Front, Searcher, front_key, power_of_two
from query.search.part_score import Metric
from query.search.search import RowFacts
from query.search.vectors import PartVectors

TRAIN_ROWS = 16_384
TRAIN_ROWS_PER_LIST = 40
"""Rows to train on for each inverted list. FAISS wants at least 39."""
TRAIN_BYTES = 512 << 20
KEY = "ghoststore/1|index|training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settings of an index to build; see :class:`IndexManifest`."""

    name: str
    factory: str
    metric: Metric
    front_dimension: int
    target_recall: float
    device: str


def row_table(part: Part) -> tuple[NDArray[np.void], NDArray[np.int16]]:
    """The table (:data:`ROW`) of the rows that have a vector, with digests still zero, and the domains of
    these rows.
    """
    usable, facts = part.usable(), RowFacts(part)
    lengths = [np.zeros(0), *(facts.of(*part.layout.span_of(span))[1] for span in part.spans)]
    table = np.zeros(int(usable.sum()), dtype=ROW)
    table["row"], table["length"] = part.row_numbers[usable], np.concatenate(lengths)[usable]
    return table, part.column("domain")[usable]


def build_index(part: Part, plan: Plan, progress: Progress) -> IndexManifest:
    """Build the index and measure it. It then replaces any index of that name, atomically.

    Memory: the index itself, 24 bytes a row, at most 512 MiB of rows to train on, and one chunk. The same part gives
    the same index with one thread and the same version of FAISS.

    UsageError for a factory string that FAISS rejects and for a part without a usable row other than zero, CorruptError
    for damaged rows, BusyError while another process builds an index of that name.
    """
    began = time.perf_counter()
    engine = Engine.create(plan.factory, plan.front_dimension, plan.device)
    table, domain = row_table(part)
    if not len(table):
        raise UsageError(f"part {part.name!r} has no usable row to index")
    if not bool((table["length"] > 0).any()):
        raise UsageError(
            f"every usable row of part {part.name!r} is zero: there is nothing to rank, and nothing to index"
        )
    sketched = plan.front_dimension < part.layout.dimension
    key = front_key(part.layout.dimension) if sketched else None
    scale = power_of_two(float(np.median(table["length"])))
    front = Front(part.layout.dimension, plan.front_dimension, key, plan.metric, scale)
    with building(part, plan.name) as folder:
        if engine.needs_training:
            engine.train(training_rows(part, front, table, engine, progress))
        fill(engine, front, part, table, progress)
        engine.write(begun_path(folder, "faiss"))
        table.tofile(begun_path(folder, "rows"))
        files = seal_files(folder)
        searcher = Searcher(engine, front, CheckedRows(part, table), max(CANDIDATES))
        with closing(progress.task("measuring recall", part.rows)) as task:
            samples = take_samples(searcher.rows, domain, plan.metric, task)
        code_bytes = files["faiss"].bytes / len(table)
        effort, searcher.candidates = tune(engine, searcher, samples, plan.target_recall, code_bytes)
        engine.set_effort(effort)
        manifest = IndexManifest(
            factory=plan.factory,
            metric=plan.metric,
            dimension=part.layout.dimension,
            front_dimension=plan.front_dimension,
            front_key=key,
            scale=scale,
            rows=len(table),
            spans=len(part.spans),
            coverage=part.fingerprint(),
            effort=effort,
            candidates=searcher.candidates,
            target_recall=plan.target_recall,
            recall=measure(searcher, samples),
            seconds=time.perf_counter() - began,
            software=versions_of("ghoststore", "numpy") | {"faiss": load_faiss().__version__},
            files=files,
        )
        problem = remember_digest(manifest.digest, folder)  # before any query can open it
        if problem is not None:
            progress.note(f"that this index is yours cannot be remembered ({problem}): queries will refuse it")
        publish_index(folder, manifest)
    return manifest


def training_rows(
    part: Part, front: Front, table: NDArray[np.void], engine: Engine, progress: Progress
) -> NDArray[np.float32]:
    """(T, d) float32: rows to train FAISS on, drawn at random from a fixed seed."""
    wanted = max(TRAIN_ROWS, TRAIN_ROWS_PER_LIST * (engine.lists or 1))
    wanted = min(len(table), wanted, max(TRAIN_BYTES // (4 * engine.dimension), engine.lists or 1))
    chosen = table["row"][np.sort(draws.permutation(KEY, len(table))[:wanted])]
    pieces = []
    with closing(progress.task("sampling rows", part.rows)) as task:
        for chunk in PartVectors(part).stream():
            first, last = np.searchsorted(chosen, (chunk.start, chunk.stop))
            if first < last:
                pieces.append(front.rows(chunk.rows_RD[torch.from_numpy(chosen[first:last] - chunk.start)]))
            task.advance(chunk.stop - chunk.start)
    return np.concatenate(pieces)


def fill(engine: Engine, front: Front, part: Part, table: NDArray[np.void], progress: Progress) -> None:
    """Add every row of ``table`` to the index, and write its digest into ``table``."""
    with closing(progress.task("indexing", part.rows)) as task:
        for chunk in PartVectors(part).stream():
            first, last = np.searchsorted(table["row"], (chunk.start, chunk.stop))
            if first < last:
                rows_RD = chunk.rows_RD[torch.from_numpy(table["row"][first:last] - chunk.start)]
                table["digest"][first:last] = [digest_of(row_D) for row_D in rows_RD.numpy()]
                engine.add(front.rows(rows_RD))
            task.advance(chunk.stop - chunk.start)
