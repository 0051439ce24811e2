"""A minute on a GPU: a plain step, the vectors of a build, a scored step, on GPT-2 Small; and what the time goes to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, mebibytes, wait_for
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from ghoststore import GradDotProdEngine, ProjectionConfig
from ghoststore.corpus import Sample
from ghoststore.store import Status
from indexer.encode.encoder import RowEncoder
from indexer.encode.losses import training_loss
from indexer.encode.tokens import Row
from indexer.projection.matrices import Projection

REFRESH = 10
KERNELS = 12


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds by way, peak bytes, and the kernels (name, milliseconds a pass) that took longest."""

    plain: float
    encoder: float
    regular: float
    scored: dict[str, float]
    peak: int
    kernels: dict[str, list[tuple[str, float]]]


def measure(device: str, batch: int, length: int, val: int, repeats: int) -> Found:
    """All of it, in bfloat16, in this process."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=max(1024, length), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model: Any = GPT2LMHeadModel(config).to(device, torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (batch, length))
    kernels: dict[str, list[tuple[str, float]]] = {}

    def timed(work: Callable[[], Any]) -> float:
        work()
        wait_for(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        wait_for(device)
        return (time.perf_counter() - begun) / repeats * 1e3

    def look_at(name: str, work: Callable[[], Any]) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
        with profile(activities=activities) as profiled:
            work()
            wait_for(device)
        events = [(event.key, float(event.self_device_time_total) / 1e3) for event in profiled.key_averages()]
        kernels[name] = sorted(events, key=lambda pair: -pair[1])[:KERNELS]

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        here = ids.to(device)
        model(input_ids=here, labels=here, use_cache=False).loss.backward()

    of_plain = timed(plain)
    model.zero_grad(set_to_none=True)
    rows = [
        Row(Sample(place, str(place), None, "", -1, 0), 0, 0, row.numpy().astype(np.int32), 1, Status.OK)
        for place, row in enumerate(ids)
    ]
    with RowEncoder(model, Projection.for_model(model, ProjectionConfig())) as encoder:
        of_encoder = timed(lambda: encoder(rows))
        look_at("vectors", lambda: encoder(rows))
    model.train().requires_grad_(True)
    here, optimizer = ids.to(device), torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step(engine: GradDotProdEngine | None = None) -> None:
        if engine is not None:
            engine.prepare(batch, tokens=here.numel())
        logits = model(input_ids=here, use_cache=False).logits
        loss, _ = training_loss(logits, here, here.numel() - batch)
        del logits
        if engine is not None:
            engine.watch(loss)
        loss.backward()
        if engine is not None:
            engine.collect()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    regular, scored = timed(step), {}
    for name, options in {"exact": {}, "sketched": {"projection": ProjectionConfig()}}.items():
        samples = {"input_ids": here[:val], "labels": here[:val]}
        given: dict[str, Any] = {"optimizer": optimizer, "val_refresh_interval": REFRESH, "check": False}
        with GradDotProdEngine(model, samples, **given, **options) as engine:
            scored[name] = timed(lambda engine=engine: step(engine))
            look_at(f"scored, {name}", lambda engine=engine: step(engine))
    peak = int(torch.cuda.max_memory_allocated(device)) if device.startswith("cuda") else 0
    return Found(of_plain, of_encoder, regular, scored, peak, kernels)


def tables(results: Results, found: Found, tokens: int) -> None:
    """Times beside what they compare with, then kernels."""
    ways = [
        ("forward and backward, all weight gradients", found.plain, found.plain),
        ("vectors of a build, in memory", found.encoder, found.plain),
        ("training step", found.regular, found.regular),
        *((f"training step, {name} scores", ms, found.regular) for name, ms in found.scored.items()),
    ]
    rows = [
        {"way": way, "ms": f"{ms:.1f}", "÷": f"{ms / base:.2f}", "tokens/s": f"{tokens / ms * 1e3:,.0f}"}
        for way, ms, base in ways
    ]
    note = f"÷: vectors by the first line, scored steps by the plain one (val gradient every {REFRESH} steps)."
    if found.peak:
        note += f" Peak of everything: {mebibytes(found.peak)}."
    results.add(Table("Time", rows, note), milliseconds={way: ms for way, ms, _ in ways}, peak=found.peak)
    for name, kernels in found.kernels.items():
        lines = [{"operation or kernel": kernel[:80], "ms": f"{ms:.2f}"} for kernel, ms in kernels]
        results.add(Table(f"Where the device's time goes: {name}", lines, "Of one pass; operations and their kernels."))


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--batch", type=int, default=16, show_default=True)
@click.option("--length", type=int, default=1024, show_default=True)
@click.option("--val", type=int, default=8, show_default=True, help="Val samples.")
@click.option("--repeats", type=int, default=10, show_default=True)
@folders
def main(device: str, batch: int, length: int, val: int, repeats: int, scratch: Path | None, out: Path) -> None:
    """Measure on a device in a minute."""
    results = Results(
        name=f"gpu-{device}",
        title=f"GPT-2 Small in bfloat16, {batch} × {length}, on {device}",
        settings={"batch": batch, "length": length, "val": val, "repeats": repeats},
        facts=machine_facts(device),
    )
    tables(results, measure(device, batch, length, val, repeats), batch * length)
    results.write(out)


if __name__ == "__main__":
    main()
