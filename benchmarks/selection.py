"""Do training-time scores mean anything? Score by domain; then train on the best half, a random one, the worst."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import CORES, Results, Table, folders, machine_facts, read_texts, scratch_folder
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, Store
from ghoststore.settings.shared import STEP_WEIGHT_SYMBOLS, WeightOption
from query.demo.tokenizer import train_tokenizer
from query.training_scores.steps import choose_column, stream_steps
from query.training_scores.weights import StepWeights

VOCABULARY = 4096
SYMBOL = STEP_WEIGHT_SYMBOLS[WeightOption.weight]
HALVES = ("highest", "random", "lowest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How every model here is trained."""

    architecture: str
    batch: int
    length: int
    learning_rate: float

    def options(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "batch_size": self.batch,
            "max_length": self.length,
            "learning_rate": self.learning_rate,
            "overlong": "truncate",
            "eval_interval": 1 << 30,
            "keep_checkpoints": 1,
        }


def score(
    scratch: Path, data: Path, val_set: Path, tokenizer: Path, setting: Setting, *, steps: int, interval: int, seed: int
) -> tuple[Any, Any]:
    """(report, run): a training on all rows, every sample scored against every domain of the val set."""
    report = ghoststore.train(
        data=data,
        val_set=val_set,
        store=scratch / "store",
        name="all",
        output_dir=scratch / "all",
        tokenizer=tokenizer,
        max_steps=steps,
        val_batch_size=32,
        val_refresh_interval=interval,
        val_groups=True,
        seed=seed,
        **setting.options(),
    )
    return report, Store.open(scratch / "store").run("all")


def values_of(run: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """((rows, groups) Σ weight·s of every row, as ``ghoststore scores`` sums by default; (rows,) how often it was
    scored).
    """
    total = np.zeros((len(run.rows), len(run.layout.groups)))
    times = np.zeros(len(run.rows), dtype=np.int64)
    for place, group in enumerate(run.layout.groups):
        weights = StepWeights(run, WeightOption.weight, (0, run.layout.steps))
        for piece in stream_steps(run, choose_column(run, group), run.ranges, weights=weights):
            places = piece.places
            np.add.at(total[:, place], places.row, np.nan_to_num(places.weight * places.score))
            if not place:
                np.add.at(times, places.row, 1)
    return total, times


def halves_of(values: NDArray[np.float64], seed: int) -> dict[str, NDArray[np.int64]]:
    """Places of the rows of each half."""
    order = np.argsort(-values, kind="stable")
    half = len(order) // 2
    shuffled = np.random.default_rng(seed).permutation(len(order))
    return {"highest": order[:half], "random": shuffled[:half], "lowest": order[-half:]}


def train_on(
    scratch: Path,
    name: str,
    rows: Sequence[dict[str, Any]],
    val_set: Path,
    tokenizer: Path,
    setting: Setting,
    *,
    steps: int,
    seed: int,
) -> float:
    """The val loss of a model trained on ``rows``, nats a token."""
    folder = scratch / name
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = ghoststore.train(
        data=folder / "rows.jsonl",
        val_set=val_set,
        output_dir=folder / "out",
        tokenizer=tokenizer,
        method="Regular",
        max_steps=steps,
        seed=seed,
        **setting.options(),
    )
    assert report.val_loss is not None
    return report.val_loss


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True, help="Corpus with domains.")
@click.option("--val-set", type=click.Path(path_type=Path, exists=True), required=True, help="The same domains.")
@click.option("--architecture", default="GPT2-Tiny", show_default=True)
@click.option("--steps", type=int, default=375, show_default=True, help="Of the scored training.")
@click.option("--half-steps", type=int, default=375, show_default=True, help="Of each training on a half.")
@click.option("--batch", type=int, default=16, show_default=True)
@click.option("--length", type=int, default=128, show_default=True)
@click.option("--learning-rate", type=float, default=2e-3, show_default=True)
@click.option("--interval", type=int, default=5, show_default=True, help="Steps between val gradients.")
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--domain", "domains", multiple=True, help="Val domains of the second table (default: all).")
@folders
def main(
    data: Path,
    val_set: Path,
    architecture: str,
    steps: int,
    half_steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    interval: int,
    seeds: int,
    domains: tuple[str, ...],
    scratch: Path | None,
    out: Path,
) -> None:
    """Mean score by domain for each val domain, and what training on the best and worst half comes to."""
    disable_progress_bar()
    setting = Setting(architecture=architecture, batch=batch, length=length, learning_rate=learning_rate)
    with scratch_folder(scratch) as folder:
        tokenizer = folder / "tokenizer"
        train_tokenizer(read_texts(data), VOCABULARY).save_pretrained(tokenizer)
        begun = time.perf_counter()
        report, run = score(folder, data, val_set, tokenizer, setting, steps=steps, interval=interval, seed=1000)
        results = Results(
            name="selection",
            title="What training-time scores say, and what comes of following them",
            settings={
                "architecture": architecture,
                "vocabulary": VOCABULARY,
                "steps": steps,
                "half steps": half_steps,
                "batch": batch,
                "tokens": length,
                "interval": interval,
                "rows": len(run.rows),
                "cores": CORES,
                "threads": torch.get_num_threads(),
            },
            facts=machine_facts(),
        )
        values, times = values_of(run)
        by_domain(results, run, values, times, report, time.perf_counter() - begun)
        samples = list(Corpus.open(str(data)).samples())
        rows = [{"id": s.id, "text": "".join(s.texts()), "domain": s.domain} for s in samples]
        source = np.asarray(run.rows.read("source_row", 0, len(run.rows)))
        found: dict[str, dict[str, list[float]]] = {}
        shares: dict[str, dict[str, float]] = {}
        for group in domains or run.layout.groups:
            own = folder / f"val-{group}.jsonl"
            ghost = [s for s in Corpus.open(str(val_set)).samples() if s.domain == group]
            own.write_text("".join(json.dumps({"id": s.id, "text": "".join(s.texts())}) + "\n" for s in ghost))
            column = values[:, run.layout.groups.index(group)]
            found[group] = {half: [] for half in HALVES}
            for seed in range(seeds):
                for half, places in halves_of(column, seed).items():
                    chosen = [rows[place] for place in source[np.sort(places)]]
                    shares.setdefault(group, {})[half] = float(np.mean([row["domain"] == group for row in chosen]))
                    loss = train_on(
                        folder, f"{group}-{half}-{seed}", chosen, own, tokenizer, setting, steps=half_steps, seed=seed
                    )
                    found[group][half].append(loss)
                    print(f"{group} {half} seed {seed}: {loss:.4f}", flush=True)
            del results.tables[1:]  # what there is so far is kept, should the next domain not end
            by_half(results, found, shares)
            results.write(out)


def by_domain(
    results: Results, run: Any, values: NDArray[np.float64], times: NDArray[np.int64], report: Any, seconds: float
) -> None:
    """The first table."""
    names = run.domains
    domain = np.asarray(run.rows.read("domain", 0, len(run.rows)))
    seen = times > 0
    table = []
    for place, group in enumerate(run.layout.groups):
        means = {name: float(values[seen & (domain == index), place].mean()) for index, name in enumerate(names)}
        errors = {
            name: float(values[seen & (domain == index), place].std() / np.sqrt((seen & (domain == index)).sum()))
            for index, name in enumerate(names)
        }
        first = max(means, key=lambda name: means[name])
        cells = {name: f"{means[name]:.3f} ± {errors[name]:.3f}" for name in names}
        table.append({"val domain": group, **cells, "first": first})
    score = run.read_committed("score")
    results.add(
        Table(
            f"Mean Σ {SYMBOL}·s of a training sample, by domain, for a val set of one domain",
            table,
            f"± one standard error. {int(seen.sum()):,} rows were trained on; {float((score < 0).mean()):.1%} of the "
            f"scores against the mean of all domains are negative. Final train loss {report.train_loss:.3f}, val loss "
            f"{report.val_loss:.3f}. Scoring took {report.score_share:.0%} of the steps' time; {seconds:.0f} s in all.",
        ),
        values=table,
    )


def by_half(results: Results, found: dict[str, dict[str, list[float]]], shares: dict[str, dict[str, float]]) -> None:
    """The second table."""
    table = []
    for group, losses in found.items():
        row = {"val domain": group}
        for half in HALVES:
            mean, spread = (
                float(np.mean(losses[half])),
                float(np.std(losses[half], ddof=1)) if len(losses[half]) > 1 else 0.0,
            )
            row[half] = f"{mean:.4f} ± {spread:.4f}"
        for half in HALVES:
            row[f"of the domain, {half}"] = f"{shares[group][half]:.0%}"
        table.append(row)
    results.add(
        Table(
            "Val loss after training on half of the rows, same number of steps",
            table,
            "Nats a token on the val domain's own val samples; mean ± standard deviation over seeds. Halves by "
            f"Σ {SYMBOL}·s against that val domain. The last columns: how much of each half is of the val domain.",
        ),
        val_loss=found,
        share_of_domain=shares,
    )


if __name__ == "__main__":
    main()
