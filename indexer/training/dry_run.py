"""What a training would do: its inputs are read, and two of its steps are made in memory; nothing is written."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghoststore.store.base.manifest import Manifest
from ghoststore.store.base.object_path import location
from ghoststore.store.run.layout import RunLayout
from indexer.dotprod import GradDotProdEngine
from indexer.session.run_plan import RunPlan
from indexer.training.inputs import Inputs, is_shards
from indexer.training.loop import Trainer
from indexer.training.state import Resumed

WEIGHTS_AND_MOMENTS = 3
"""AdamW keeps two numbers for each weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a training needs before its first step."""

    inputs: Inputs
    engine: GradDotProdEngine | None
    layout: RunLayout
    manifest: Manifest
    plan: RunPlan | None
    """None where nothing is stored."""
    resumed: Resumed
    trainer: Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """What ``ghoststore train`` would do with the same options. Sizes are in bytes, times in seconds."""

    samples: int
    usable_rows: int
    """Rows with a target: samples, or windows of long ones."""
    tokens: int
    """Of all usable rows, once."""
    rows_per_step: int
    """Samples that a step draws, over all micro-batches; candidates where it chooses."""
    tokens_per_step: float
    """Mean number of tokens of the rows that a step draws."""
    epochs: float
    """Passes over the rows."""
    layers: list[str]
    """Names of the modules that are scored."""
    training_bytes: int
    """Weights, their gradients and AdamW's moments; activations come on top."""
    peak_bytes: int | None
    """The most that these steps took on the GPU; None on a CPU."""
    seconds_per_step: float | None
    """Of the second step that is left, on this machine as busy as it is: the first of a process does what later ones
    need not. With a val gradient where one is due at that step. None where no step is left."""
    seconds_left: float | None
    """``seconds_per_step`` times the steps that are left; val losses and checkpoints come on top."""
    checkpoint_bytes: int
    run_bytes: int
    """The arrays of the run, not compressed."""
    writes: list[str]
    """Folders that would be made, or continued."""


@contextmanager
def tokens_aside() -> Iterator[Path]:
    """A temporary folder for the tokens of a corpus."""
    with tempfile.TemporaryDirectory(prefix="ghoststore-dry-run-") as folder:
        yield Path(folder)


def plan_of(prepared: Prepared, data: str, output_dir: Path, log_folders: list[str]) -> TrainPlan:
    """What the training ``prepared`` would do; its first and second step are made, in memory. ``log_folders`` are
    others that it would write. MismatchError if its run is there with other settings.
    """
    inputs, trainer, plan, layout = prepared.inputs, prepared.trainer, prepared.plan, prepared.layout
    if plan is not None:
        plan.refuse_other()
    seconds, peak = _tried(trainer, prepared.resumed.step)
    rows, usable = inputs.rows, inputs.rows.usable
    tokens, drawn = int(rows.length[usable].sum()), inputs.order.step_rows
    weights = sum(p.numel() * p.element_size() for p in inputs.model.parameters())
    writes = [] if is_shards(data) else [str(output_dir / "tokens")]
    writes += [str(output_dir / "checkpoint-…")]
    writes += [] if plan is None else [str(location(plan.store) / "runs" / plan.name)]
    left = inputs.steps - prepared.resumed.step
    return TrainPlan(
        samples=rows.shards.samples,
        usable_rows=len(usable),
        tokens=tokens,
        rows_per_step=drawn,
        tokens_per_step=tokens / len(usable) * drawn,
        epochs=inputs.steps * drawn / len(usable),
        layers=[] if prepared.engine is None else sorted(prepared.engine.method.kinds),
        training_bytes=weights * (1 + WEIGHTS_AND_MOMENTS),
        peak_bytes=peak,
        seconds_per_step=seconds,
        seconds_left=None if seconds is None else seconds * left,
        checkpoint_bytes=weights * WEIGHTS_AND_MOMENTS,
        run_bytes=0 if plan is None else _array_bytes(layout),
        writes=[*writes, *log_folders],
    )


def _tried(trainer: Trainer, step: int) -> tuple[float | None, int | None]:
    """(seconds of the last, most bytes on the GPU) of ``step`` and the next one, whose results are dropped."""
    if step >= trainer.steps:
        return None, None
    device = torch.device(trainer.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = None
    with trainer.session, trainer.running():
        for place in range(step, min(step + 2, trainer.steps)):
            begun = time.perf_counter()
            trainer.step(place)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begun
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _array_bytes(layout: RunLayout) -> int:
    specs: list[Any] = layout.arrays()
    return sum(spec.count(layout.length) * spec.width * int(spec.dtype.itemsize) for spec in specs)
