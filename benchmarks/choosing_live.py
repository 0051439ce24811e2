"""Choosing in the step as ``ghoststore train`` does it: the val loss that each way reaches, at equal updates and at
equal CPU seconds.

Arms of a seed begin with the same weights and draw the same candidates. The val loss is that of rows of the domain that
nothing was scored against.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, read_texts, scratch_folder
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.progress import Silent
from indexer.encode.losses import next_token_losses
from query.demo.tokenizer import train_tokenizer

VOCABULARY = 2048
POINTS = 6
"""Checkpoints of a training whose val loss is taken."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to train."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    timed: bool = False
    """Whether it is trained for as many steps as take the CPU seconds of a plain training."""

    @property
    def blind(self) -> bool:
        """Whether the training does not depend on the val set."""
        return self.options.get("policy") == "random"


EXACT: dict[str, Any] = {"score": "exact"}
SKETCHED: dict[str, Any] = {"score": "sketched"}
CONTRAST: dict[str, Any] = {"contrast": True}
ONE: dict[str, Any] = {"choosing_passes": "one"}
REWEIGHT: dict[str, Any] = {"policy": "reweight", "keep": None}
"""It trains on all candidates, as ``random, all candidates`` does."""
ARMS = (
    Arm("random", {"policy": "random", **SKETCHED}),
    Arm("random, all candidates", {"policy": "random", "keep": None, **SKETCHED}),
    Arm("top-k, exact", {"contrast": False, **EXACT}),
    Arm("top-k, exact, contrast", {**EXACT, **CONTRAST}),
    Arm("top-k, sketched", {**SKETCHED, "contrast": False}),
    Arm("top-k, sketched, contrast", {**SKETCHED, **CONTRAST}),
    Arm("the same, val gradient every 4", {**SKETCHED, **CONTRAST, "val_refresh_interval": 4}),
    Arm("the same, 8 × 8 numbers a layer", {**SKETCHED, **CONTRAST, "projection": ProjectionConfig(rank_total=64)}),
    Arm("the same, 32 × 32 a layer", {**SKETCHED, **CONTRAST, "projection": ProjectionConfig(rank_total=1024)}),
    Arm("top-k, exact, Adam's metric", {**EXACT, "score_metric": "adam"}),
    Arm("bottom-k, exact", {**EXACT, "policy": "bottom-k"}),
    Arm("reweight, exact, contrast", {**EXACT, **REWEIGHT, **CONTRAST}),
    Arm("reweight, sketched, contrast", {**REWEIGHT, **SKETCHED, **CONTRAST}),
)
TIMED = (
    Arm("top-k, exact, contrast, one pass", {**EXACT, **CONTRAST, **ONE}, True),
    Arm("top-k, sketched, contrast, one pass", {**SKETCHED, **CONTRAST, **ONE}, True),
    Arm(
        "top-k, sketched, contrast, one pass, val gradient every 4",
        {**SKETCHED, **CONTRAST, **ONE, "val_refresh_interval": 4},
        True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every arm shares."""

    folder: Path
    data: Path
    steps: int
    candidates: int
    keep: int
    length: int
    rate: float
    device: str

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def prepare(self) -> None:
        """The tokenizer, and the configuration of a small GPT-2."""
        tokenizer = train_tokenizer(read_texts(self.data), VOCABULARY)
        tokenizer.save_pretrained(self.tokenizer)
        ghoststore.tokenize(data=self.data, tokenizer=self.tokenizer, out=self.folder / "tokens", progress=Silent())
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=self.length, n_layer=3, n_embd=96, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        config.save_pretrained(self.folder / "config")


Parts = dict[str, tuple[Path, list[str]]]
"""By domain, and "all": (the rows to score against, texts that nothing is scored against)."""


def split_val(val_set: Path, folder: Path) -> Parts:
    rows = [json.loads(line) for line in val_set.read_text().splitlines()]
    domains = sorted({row["domain"] for row in rows})
    parts = {}
    for name in [*domains, "all"]:
        own = [row for row in rows if name in (row["domain"], "all")]
        path = folder / f"val-{name}.jsonl"
        path.write_text("".join(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in own[::2]))
        parts[name] = (path, [row["text"] for row in own[1::2]])
    return parts


def train(setting: Setting, options: dict[str, Any], val_set: Path, seed: int, steps: int) -> tuple[list[Path], float]:
    """(checkpoints, CPU seconds) of one training."""
    output, store = (setting.folder / f"{name}-{os.getpid()}" for name in ("out", "store"))
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(store, ignore_errors=True)
    begun = time.process_time()
    stored = {} if options.get("method") == "Regular" else {"store": store, "name": "run"}
    ghoststore.train(
        data=setting.folder / "tokens", val_set=val_set, output_dir=output,
        tokenizer=setting.tokenizer, model_config=setting.folder / "config",
        max_length=setting.length, overlong="truncate", max_steps=steps, learning_rate=setting.rate, seed=seed,
        checkpoint_interval=max(1, -(-steps // POINTS)), keep_checkpoints=None, eval_interval=steps,
        device=setting.device, progress=Silent(), **stored, **options,
    )  # fmt: skip
    seconds = time.process_time() - begun
    paths = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return paths, seconds


def chosen_options(setting: Setting, arm: Arm) -> dict[str, Any]:
    """Of an arm that chooses. All candidates are one micro-batch."""
    size = setting.candidates
    options = {"batch_size": size, "candidates": size, "keep": setting.keep, "val_batch_size": 8, **arm.options}
    if options.get("policy") == "random" and options["keep"] is None:
        options["keep"] = size
    return options


def loss_of(checkpoint: Path, texts: list[str], setting: Setting) -> float:
    """Mean loss a target."""
    from ghoststore.checkpoint.load import load_tokenizer

    tokenizer = load_tokenizer(setting.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).to(setting.device).eval()
    total, count = 0.0, 0
    for first in range(0, len(texts), 32):
        rows = [tokenizer(text, verbose=False)["input_ids"][: setting.length] for text in texts[first : first + 32]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=setting.device)
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows], device=setting.device)
        with torch.no_grad():  # rows are padded on the right, behind what they attend to
            losses_B, targets_B = next_token_losses(model(input_ids=ids).logits, labels)
        total += float((losses_B * targets_B).sum())
        count += int(targets_B.sum())
    return total / count


@dataclass(frozen=True, slots=True)
class Job:
    """An arm of a seed, and the val sets that it is measured on: of a blind arm all of them."""

    arm: Arm
    seed: int
    domains: tuple[str, ...]

    def run(self, setting: Setting, parts: Parts, plain: float) -> tuple[Job, dict[str, list[float]], float]:
        """(itself, val loss of each checkpoint by domain, CPU seconds). ``plain``: those of a plain training."""
        disable_progress_bar()
        options, scored, count = chosen_options(setting, self.arm), parts[self.domains[0]][0], setting.steps
        if self.arm.timed:  # a tenth of the steps tells what one costs
            _, tenth = train(setting, options, scored, self.seed, max(2, count // 10))
            _, few = train(setting, options, scored, self.seed, 2)
            count = max(4, min(count, round(plain / ((tenth - few) / max(1, count // 10 - 2)))))
        paths, spent = train(setting, options, scored, self.seed, count)
        return self, {name: [loss_of(path, parts[name][1], setting) for path in paths] for name in self.domains}, spent


def jobs_of(arms: Sequence[Arm], seed: int, domains: Sequence[str]) -> Iterator[Job]:
    for arm in arms:
        if arm.blind:
            yield Job(arm, seed, tuple(domains))
        else:
            yield from (Job(arm, seed, (name,)) for name in domains if name != "all" or not arm.timed)


def reached(curve: list[float], goal: float) -> float:
    """Share of the updates after which a curve is at ``goal``, between its points on a line; 1.05: never."""
    for place, value in enumerate(curve):
        if value <= goal:
            if place == 0:
                return 1 / len(curve)
            before = curve[place - 1]
            return (place + (before - goal) / (before - value)) / len(curve)
    return 1.05


Curves = dict[tuple[str, str], list[list[float]]]


def add_tables(results: Results, curves: Curves, seconds: dict[str, list[float]], domains: list[str]) -> None:
    """Losses, shares of the updates, and costs."""
    plain = float(np.median(seconds.get("plain", [float("nan")])))
    losses, shares = [], []
    for arm in (*ARMS, *TIMED):
        if not any(curves.get((arm.name, domain)) for domain in domains):
            continue
        loss, share = {"way": arm.name}, {"way": arm.name}
        singles = []
        for domain in domains:
            pairs = list(zip(curves.get((arm.name, domain), []), curves["random", domain], strict=False))
            pairs = [(curve, other) for curve, other in pairs if curve and other]
            own, control = [curve for curve, _ in pairs], [other for _, other in pairs]
            loss[domain] = share[domain] = ""
            if not own:
                continue
            differences = np.array([one[-1] - other[-1] for one, other in zip(own, control, strict=True)])
            error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else float("nan")
            value = f"{differences.mean():+.3f} ± {error:.3f}"
            loss[domain] = f"{np.mean([one[-1] for one in own]):.3f}" if arm.name == "random" else value
            each = [reached(one, other[-1]) for one, other in zip(own, control, strict=True)]
            share[domain] = f"{np.mean(each):.2f}"
            if domain != "all":
                singles.append(differences)
        single = f"{np.mean(np.concatenate(singles)):+.3f}" if singles else ""
        loss["single domains"] = "" if arm.name == "random" else single
        spent = seconds.get(arm.name)
        loss["CPU s ÷ plain"] = f"{np.median(spent) / plain:.2f}" if spent else ""
        losses.append(loss)
        if not arm.timed:
            shares.append(share)
    del results.tables[:]
    note = (
        "Nats a token on val rows of the domain that nothing was scored against; mean and standard error of the "
        "differences from `random` over seeds. Negative is better. First line: random choice's own. `one pass`: as "
        "many steps as take the CPU seconds of a plain training without scores on as many samples a step. The last "
        f"column: CPU seconds of a training ÷ those of a plain one ({plain:.1f})."
    )
    results.add(Table("Last val loss less that of random choice", losses, note), seconds=seconds)
    results.add(
        Table("Share of the updates after which the val loss is random choice's last one", shares, "1.05: never."),
        curves={f"{name}|{domain}": value for (name, domain), value in curves.items()},
    )


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="jsonl of text and domain.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), required=True, help="The same.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--steps", type=int, default=300, show_default=True)
@click.option("--candidates", type=int, default=16, show_default=True)
@click.option("--keep", type=int, default=8, show_default=True)
@click.option("--length", type=int, default=64, show_default=True)
@click.option("--rate", type=float, default=2e-3, show_default=True)
@click.option("--only", default="", help="Only these val domains, with commas.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--arm", "names", multiple=True, help="Only these ways (and none that is timed, unless named).")
@click.option("--workers", default=1, show_default=True, help="Trainings at once; with several no times are kept.")
@click.option("--add", is_flag=True, help="To the results that are there, of the seeds before.")
@folders
def main(
    data: Path, val_set: Path, device: str, seeds: int, steps: int, candidates: int, keep: int, length: int,
    rate: float, only: str, first_seed: int, names: tuple[str, ...], workers: int, add: bool, scratch: Path | None,
    out: Path,
) -> None:  # fmt: skip
    """Train with every way to choose, and compare val losses."""
    disable_progress_bar()
    curves: Curves = {}
    seconds: dict[str, list[float]] = {}
    name = "choosing-live" + ("" if device == "cpu" else f"-{device}")
    if add:
        before = json.loads((out / f"{name}.json").read_text())["numbers"]
        seconds = before["seconds"]
        curves = {tuple(key.split("|")): value for key, value in before["curves"].items()}
    arms = [arm for arm in (*ARMS, *TIMED) if not (names and arm.name not in names) and not (arm.timed and workers > 1)]
    with scratch_folder(scratch) as folder:
        setting = Setting(
            folder=folder, data=data, steps=steps, candidates=candidates, keep=keep, length=length, rate=rate,
            device=device,
        )  # fmt: skip
        setting.prepare()
        parts = split_val(val_set, folder)
        domains = [name for name in parts if not only or name in only.split(",")]
        results = Results(
            name=name,
            title="Choosing in the step, by ghoststore train",
            settings={"steps": steps, "candidates": candidates, "keep": keep, "tokens": length, "rate": rate},
            facts=machine_facts(device),
        )
        jobs = [job for seed in range(first_seed, first_seed + seeds) for job in jobs_of(arms, seed, domains)]
        for number, (job, curve_of, spent) in enumerate(measured(jobs, setting, parts, seconds, workers), 1):
            for domain, curve in curve_of.items():
                own = curves.setdefault((job.arm.name, domain), [])
                own.extend([[]] * (job.seed - len(own)))  # of seeds that this way was not run with
                own[job.seed : job.seed + 1] = [curve]
            click.echo(f"seed {job.seed}, {job.arm.name}, {spent:.0f} s: {json.dumps(curve_of)}", err=True)
            if number == len(jobs) or job.seed != jobs[number].seed:  # what is cut off leaves the seeds before
                add_tables(results, curves, seconds, [name for name in parts if curves.get(("random", name))])
                results.write(out)


def measured(
    jobs: Sequence[Job], setting: Setting, parts: Parts, seconds: dict[str, list[float]], workers: int
) -> Iterator[tuple[Job, dict[str, list[float]], float]]:
    """What each job gives: in this process, its CPU seconds kept in ``seconds``, or in several."""
    if workers > 1:  # beside others a second of the CPU is another: none is kept
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for future in [pool.submit(job.run, setting, parts, float("nan")) for job in jobs]:
                yield future.result()
        return
    plain: dict[int, float] = {}
    for job in jobs:
        if job.seed not in plain:
            options = {"method": "Regular", "batch_size": setting.keep}
            _, plain[job.seed] = train(setting, options, parts[job.domains[0]][0], job.seed, setting.steps)
            seconds.setdefault("plain", []).append(plain[job.seed])
        result = job.run(setting, parts, plain[job.seed])
        seconds.setdefault(job.arm.name, []).append(result[2])
        yield result


if __name__ == "__main__":
    main()
