"""How long a build would take: measured on one batch of its rows, and on one axis of each shape that is learned."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice

import torch

from indexer.build.calibrate import axis_lengths
from indexer.build.job import BuildJob
from indexer.build.leading import Leading, drawn_directions, random_directions
from indexer.encode.batching import batches_of
from indexer.encode.encoder import RowEncoder
from indexer.encode.tokens import rows_of
from indexer.projection.matrices import Projection, drawn_sides
from indexer.projection.plan import ProjectionPlan

ROWS = 64
"""Most rows that are looked at."""
LEARNING = 1.16
"""Learning ÷ building as many rows, eigenvectors not counted: of GPT-2 Small; see docs/measured.md."""


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
