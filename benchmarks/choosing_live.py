"""Choosing in the step as ``ghoststore train`` does it: the val loss that each way reaches, at equal updates and at
equal CPU seconds.

Arms of a seed begin with the same weights and draw the same candidates. The val loss is that of rows of the domain that
nothing was scored against.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, read_texts, scratch_folder
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils.logging import disable_progress_bar

import ghoststore
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
    of_time: str | None = None
    """The arm whose options these are, trained for as many steps as take the CPU seconds of a plain training."""


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
    Arm("top-k, exact, Adam's metric", {**EXACT, "score_metric": "adam"}),
    Arm("bottom-k, exact", {**EXACT, "policy": "bottom-k"}),
    Arm("reweight, exact, contrast", {**EXACT, **REWEIGHT, **CONTRAST}),
    Arm("reweight, sketched, contrast", {**REWEIGHT, **SKETCHED, **CONTRAST}),
)
TIMED = (
    Arm("top-k, exact, contrast, one pass", {**EXACT, **CONTRAST, **ONE}, "time"),
    Arm("top-k, sketched, contrast, one pass", {**SKETCHED, **CONTRAST, **ONE}, "time"),
    Arm(
        "top-k, sketched, contrast, one pass, val gradient every 4",
        {**SKETCHED, **CONTRAST, **ONE, "val_refresh_interval": 4},
        "time",
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


def split_val(val_set: Path, folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """By domain, and "all": (the rows to score against, texts that nothing is scored against)."""
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
    output = setting.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(setting.folder / "store", ignore_errors=True)
    begun = time.process_time()
    stored = {} if options.get("method") == "Regular" else {"store": setting.folder / "store", "name": "run"}
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
    plain = float(np.median(seconds["plain"]))
    losses, shares = [], []
    for arm in (*ARMS, *TIMED):
        if not any(curves.get((arm.name, domain)) for domain in domains):
            continue
        loss, share = {"way": arm.name}, {"way": arm.name}
        singles = []
        for domain in domains:
            own = [curve for curve in curves.get((arm.name, domain), []) if curve]
            control = curves["random", domain][: len(own)]
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
        loss["CPU s ÷ plain"] = f"{np.median(seconds[arm.name]) / plain:.2f}"
        losses.append(loss)
        if arm.of_time is None:
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
@click.option("--add", is_flag=True, help="To the results that are there, of the seeds before.")
@folders
def main(
    data: Path, val_set: Path, device: str, seeds: int, steps: int, candidates: int, keep: int, length: int,
    rate: float, only: str, first_seed: int, names: tuple[str, ...], add: bool, scratch: Path | None, out: Path,
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
    arms = [arm for arm in (*ARMS, *TIMED) if not names or arm.name in names]
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
        for seed in range(first_seed, first_seed + seeds):
            plain = {"method": "Regular", "batch_size": keep}
            _, spent = train(setting, plain, parts[domains[0]][0], seed, steps)
            seconds.setdefault("plain", []).append(spent)
            for domain in domains:
                scored, texts = parts[domain]
                for arm in [arm for arm in arms if domain != "all" or arm.of_time is None]:
                    count = steps
                    if arm.of_time is not None:  # a tenth of the steps tells what one costs
                        _, tenth = train(setting, chosen_options(setting, arm), scored, seed, max(2, steps // 10))
                        _, few = train(setting, chosen_options(setting, arm), scored, seed, 2)
                        each = (tenth - few) / max(1, steps // 10 - 2)
                        count = max(4, min(steps, round(seconds["plain"][-1] / each)))
                    paths, spent = train(setting, chosen_options(setting, arm), scored, seed, count)
                    curve = [loss_of(path, texts, setting) for path in paths]
                    curves.setdefault((arm.name, domain), []).append(curve)
                    seconds.setdefault(arm.name, []).append(spent)
                    told = f"seed {seed}, {domain}, {arm.name}: {curve[-1]:.3f}, {count} steps, {spent:.0f} s"
                    click.echo(told, err=True)
                add_tables(results, curves, seconds, [name for name in parts if ("random", name) in curves])
                results.write(out)  # after each domain: what is cut off leaves the ones before


if __name__ == "__main__":
    main()
