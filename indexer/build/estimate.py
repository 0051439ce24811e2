"""What a build would take: bytes, and seconds, measured on one batch of its rows and on one axis of each shape that is
learned.
"""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice

import torch

from ghoststore.store import PartLayout
from ghoststore.store.spans.layout import CRC_BYTES
from indexer.build.calibrate import axis_lengths, learning_bytes
from indexer.build.job import BuildJob
from indexer.build.leading import Leading, drawn_directions, random_directions
from indexer.build.report import BuildReport
from indexer.encode.batching import batches_of
from indexer.encode.encoder import RowEncoder
from indexer.encode.tokens import rows_of
from indexer.projection.matrices import Projection, drawn_sides
from indexer.projection.plan import ProjectionPlan

ROWS = 64
"""Most rows that are looked at."""
LEARNING = 1.16
"""Learning ÷ building as many rows, eigenvectors not counted: of GPT-2 Small; see docs/measured.md."""


def report_of(job: BuildJob) -> BuildReport:
    """The report of a build that has not begun."""
    options, layout = job.inputs.options, job.layout
    return BuildReport(
        store=str(options.store),
        part=job.inputs.part_name,
        rows=layout.rows,
        tokens=job.plan.tokens,
        layers=len(job.projected.layers),
        coverage=job.projected.coverage,
        dimension=layout.dimension,
        bytes_on_disk=_bytes_on_disk(layout),
        memory_bytes=_memory(job),
        dry_run=options.dry_run,
        manifest=job.manifest,
    )


def estimated_seconds(job: BuildJob) -> dict[str, float]:
    """Seconds by kind of work, ``learning`` and ``compute``, on this machine as busy as it is; empty where no row can
    be used, or all are built. Computes a batch of the first rows twice, the second time measured, and the eigenvectors
    of one axis of each shape, and drops them.
    """
    inputs, plan, rows_left = job.inputs, job.projected, job.plan.rows
    if inputs.existing is not None:
        rows_left -= inputs.existing.rows
    rows = rows_of(islice(inputs.corpus.samples(), inputs.most_samples), inputs.tokenizer, inputs.tokens)
    usable = list(islice((row for row in rows if row.status.usable), ROWS))
    if not usable or not rows_left or job.plan.tokens is None:
        return {}
    batch = max(batches_of(usable, inputs.batch_tokens, padding=job.padding), key=len)
    projection = Projection.with_sides(
        plan, {layer.block.name: drawn_sides(plan.config, layer) for layer in plan.layers}
    )
    options = inputs.options
    with RowEncoder(
        inputs.model, projection, reduction=options.loss_reduction, checkpointing=options.gradient_checkpointing
    ) as encoder:
        spent = 0.0
        for _ in range(2):
            begun = time.perf_counter()
            encoder([usable[place] for place in batch])
            if encoder.device.type == "cuda":
                torch.cuda.synchronize(encoder.device)
            spent = time.perf_counter() - begun
    of_all = spent / sum(usable[place].length for place in batch) * job.plan.tokens
    seconds = {"compute": of_all * rows_left / job.plan.rows}
    if plan.calibrated and plan.calibration is None:
        by_rows = LEARNING * min(1.0, plan.config.calibration_samples / job.plan.rows) * of_all
        seconds["learning"] = by_rows + _eigenvector_seconds(plan, encoder.device)
    return seconds


def _eigenvector_seconds(plan: ProjectionPlan, device: torch.device) -> float:
    """Of all axes that are learned: their time depends on their lengths alone, not on rows."""
    seconds, generator = 0.0, torch.Generator().manual_seed(0)
    for (n, k), axes in Counter(axis_lengths(plan)).items():
        begun = time.perf_counter()
        leading = Leading(n, k, drawn_directions("estimate", n, k, device), device)
        terms = torch.randn(n, 2 * random_directions(n, k), generator=generator)
        leading.add(terms.to(device), 1)
        leading.factor()
        seconds += axes * (time.perf_counter() - begun)
    return seconds


def _bytes_on_disk(layout: PartLayout) -> int:
    total = 0
    for spec in layout.arrays():
        if spec.dtype is not str:
            total += (spec.chunk_bytes + CRC_BYTES) * -(-layout.rows // spec.chunk_rows)
    return total


def _memory(job: BuildJob) -> int:
    model, layout = job.inputs.model, job.layout
    matrices = sum(4 * (shape.k_in * shape.n_in + shape.k_out * shape.n_out) for shape in job.projected.shapes)
    spans = 3 * layout.span_rows * layout.dimension * 4
    logits = job.inputs.batch_tokens * int(len(model.get_input_embeddings().weight) * model.dtype.itemsize)
    return matrices + max(spans, learning_bytes(job.projected, job.inputs.device)) + logits
