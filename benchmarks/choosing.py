"""What choosing k of N = 2k candidates costs beside a plain step on k: two passes, one pass, exact and sketched."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from common import CORES, Clock, PeakMemory, Results, Spread, Table, folders, in_fresh_process, machine_facts, ratios
from common import mebibytes as shown
from dot_product import REFRESH, Bench, Setting, parse
from torch import nn

from ghoststore import GradDotProdEngine, ProjectionConfig
from indexer.encode.losses import own_losses, training_loss

BLOCKS: dict[str, Any] = {"score_layers": "blocks"}
MODES: dict[str, tuple[bool, dict[str, Any]]] = {
    # Whether one pass is all, and how samples are scored.
    "two passes, exact": (False, BLOCKS),
    "two passes, sketched": (False, {"projection": ProjectionConfig()}),
    "one pass, exact": (True, BLOCKS),
    "one pass, sketched": (True, {"projection": ProjectionConfig()}),
    "one pass, every parameter": (True, {}),
}


class Choosing(Bench):
    """One model, its plain step on k samples, and the step that chooses them among 2k."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.candidates = torch.cat([self.ids, self.ids.flip(1)])

    def update(self, ids: torch.Tensor) -> None:
        """Forward and backward of a plain step."""
        logits = self.model(input_ids=ids, use_cache=False).logits
        loss, _ = training_loss(logits, ids, ids.numel() - len(ids))
        del logits
        loss.backward()

    def chosen(self, engine: GradDotProdEngine | None, *, one_pass: bool = False) -> Clock:
        """CPU and wall seconds of one optimizer step."""
        begun = Clock.now(self.setting.device)
        if engine is None:
            self.update(self.ids)
        else:
            ids, keep = self.candidates, len(self.ids)
            with engine.scoring(len(ids), tokens=ids.numel(), hold=one_pass) as batch:
                scores = batch.scores(own_losses(self.model(input_ids=ids, use_cache=False).logits, ids))
            best = scores.total.topk(keep).indices
            if one_pass:
                batch.add_gradients(torch.zeros(len(ids)).index_fill(0, best.cpu(), 1 / keep))
            else:
                self.update(ids[best])
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Clock.now(self.setting.device).since(begun)


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of plain steps and, for each mode, of steps with a fresh val gradient and without, taking turns."""
    bench = Choosing(setting)
    engines = {mode: bench.engine(options, REFRESH) for mode, (_, options) in MODES.items()}
    seconds: dict[str, Any] = {"plain": [], "modes": {mode: {"fresh": [], "cached": []} for mode in MODES}}
    for turn in range(setting.repeats + 1):
        plain = [*bench.chosen(None)]
        if turn:  # the first is a warm-up
            seconds["plain"].append(plain)
        for mode, (one_pass, _) in MODES.items():
            with engines[mode] as engine:
                engine.set_validation(engine.val_batches)
                for kind in ("fresh", "cached"):
                    clock = [*bench.chosen(engine, one_pass=one_pass)]
                    if turn:
                        seconds["modes"][mode][kind].append(clock)
    return seconds


def memory(setting: Setting, mode: str | None) -> int:
    """Peak bytes of two steps beyond model and optimizer state."""
    bench = Choosing(setting)
    bench.chosen(None)
    one_pass, options = MODES[mode] if mode is not None else (False, {})
    engine = None if mode is None else bench.engine(options, REFRESH).attach()
    peak = PeakMemory(setting.device)
    peak.start()
    for _ in range(2):
        bench.chosen(engine, one_pass=one_pass)
    return peak.beyond()


def rows_of(setting: Setting, seconds: dict[str, Any], clock: int) -> list[dict[str, str]]:
    plain = [values[clock] for values in seconds["plain"]]
    rows = [{"setting": f"{setting.told} of {2 * setting.batch}", "mode": "plain step on k", "÷ plain, R=1": "1"}]
    rows[0] |= {"÷ plain, R=10": "1", "s a step": Spread.of(plain).show(".2f")}
    for mode, times in seconds["modes"].items():
        fresh, cached = ([values[clock] for values in times[kind]] for kind in ("fresh", "cached"))
        tenth = [(f + (REFRESH - 1) * c) / REFRESH for f, c in zip(fresh, cached, strict=True)]
        over = {"÷ plain, R=1": ratios(fresh, plain).show(".2f"), "÷ plain, R=10": ratios(tenth, plain).show(".2f")}
        rows.append({"setting": "", "mode": mode, **over, "s a step": ""})
    return rows


@click.command()
@click.option(
    "--setting",
    "settings",
    multiple=True,
    callback=parse,
    metavar="NAME:BxTxV",
    default=("GPT2-Small:4x128x4", "GPT2-Tiny:8x128x8"),
    show_default=True,
    help="Architecture, samples that are chosen, tokens, val samples. Repeatable.",
)
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=1, show_default=True, help="CPU time on one thread is the steadiest.")
@folders
def main(
    settings: list[tuple[str, int, int, int]],
    repeats: int,
    dtype: str,
    device: str,
    threads: int,
    scratch: Path | None,
    out: Path,
) -> None:
    """Time and memory of a step that chooses k of 2k candidates ÷ those of a plain step on k."""
    plain = dtype == "float32" and device == "cpu"
    results = Results(
        name="choosing" if plain else f"choosing-{device}-{dtype}",
        title="Choosing in the step beside a plain step on the chosen",
        settings={"dtype": dtype, "device": device, "threads": threads, "cores": CORES, "repeats": repeats},
        facts=machine_facts(device),
    )
    clock = 0 if device == "cpu" and threads == 1 else 1
    rows, numbers, peaks = [], {}, []
    for architecture, batch, length, val in settings:
        setting = Setting(
            architecture=architecture, batch=batch, length=length, val=val, dtype=dtype, device=device, repeats=repeats
        )
        seconds = in_fresh_process(measure, setting, threads=threads)
        numbers[setting.told] = {"setting": asdict(setting), **seconds}
        rows += rows_of(setting, seconds, clock)
        alone = in_fresh_process(memory, setting, None, threads=threads)
        own = {mode: in_fresh_process(memory, setting, mode, threads=threads) for mode in list(MODES)[::2]}
        measured = {mode: f"{shown(peak)} ({peak / alone:.2f})" for mode, peak in own.items()}
        peaks.append({"setting": setting.told, "plain step on k": shown(alone), **measured})
    which = "CPU" if clock == 0 else "wall"
    note = "R: steps between val gradients; R=10 is one fresh and nine cached steps. Scores are over the block linears."
    results.add(Table(f"Time ({which} seconds of a whole step, optimizer included)", rows, note), measured=numbers)
    results.add(Table("Peak memory of a step beyond weights and optimizer state", peaks))
    results.write(out)


if __name__ == "__main__":
    main()
