"""Which scores to choose samples by, in the step: many small trainings at once, each with its own way of choosing.

All arms of a seed begin with the same weights and see the same candidates. Every tensor has an axis of arms, so that a
GPU trains hundreds side by side. Nothing of ghoststore's engine is used: scores are inner products of per-sample
gradients that are formed one by one. What wins here is what ``ghoststore train --policy top-k`` does by default.

Legend: A arms, B candidates of a step, K chosen, T tokens, V vocabulary, I and O the sides of a linear layer.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from common import Clock, Results, Table, folders, machine_facts
from numpy.typing import NDArray
from torch import Tensor

from query.demo.tokenizer import train_tokenizer

VOCABULARY, LENGTH, WIDTH, LAYERS, HEADS = 2048, 128, 96, 3, 4
IGNORED = -100
LINEAR = ("qkv", "out", "up", "down")
"""Layers of a block whose gradients score."""
EVALUATIONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How an arm chooses."""

    score: str = "random"
    """random, loss, low-loss, or metric-unit: sgd, adam or a sketch of so many numbers a layer; dot, cosine, tokens
    (n·s), contrast (against the candidates' mean gradient, too), contrast-cosine."""
    begin: float = 0.1
    """Share of the steps before choosing begins."""
    refresh: int = 4
    val_rows: int = 8
    keep: int = 8
    bottom: bool = False
    temperature: float | None = None
    """Of a softmax over standardised scores, by which all candidates are weighted; None: the best are taken."""

    @property
    def name(self) -> str:
        given = {key: value for key, value in asdict(self).items() if value != getattr(Way(), key) and key != "score"}
        return " ".join([self.score, *(key if value is True else f"{key}={value}" for key, value in given.items())])


METRICS, UNITS = ("sgd", "adam"), ("dot", "cosine", "tokens", "contrast", "contrast-cosine")
SKETCHES = (64, 256)
"""Numbers of a layer's sketched gradients, squares."""
_FRESH = {"refresh": 1, "begin": 0.25}
SETS: dict[str, list[Way]] = {
    "scores": [
        *(Way(score=f"{metric}-{unit}") for metric in METRICS for unit in UNITS),
        *(Way(score="adam-cosine", begin=begin) for begin in (0.0, 0.25)),
        *(Way(score="adam-cosine", refresh=refresh) for refresh in (1, 10)),
        Way(score="adam-cosine", val_rows=32),
        Way(score="adam-cosine", keep=4),
        Way(score="adam-cosine", bottom=True),
        Way(score="adam-cosine", temperature=1.0),
        Way(score="sgd-cosine", refresh=1),
        Way(score="sgd-dot", begin=0.0),
        Way(score="loss"),
        Way(score="low-loss"),
    ],
    "fresh": [
        *(Way(score=f"{metric}-{unit}", **_FRESH) for metric in METRICS for unit in UNITS if unit != "tokens"),
        Way(score="sgd-contrast", refresh=1),
        Way(score="sgd-contrast", refresh=1, begin=0.5),
        Way(score="sgd-contrast", begin=0.25),
        Way(score="sgd-contrast", refresh=1, begin=0.25, val_rows=2),
        Way(score="sgd-contrast", refresh=1, begin=0.25, temperature=1.0),
    ],
    "sketched": [
        *(Way(score=f"sgd-{unit}", **_FRESH) for unit in ("dot", "contrast")),
        *(Way(score=f"sketch{size}-{unit}", **_FRESH) for size in SKETCHES for unit in ("dot", "contrast")),
        *(Way(score=f"{metric}-contrast", temperature=1.0, **_FRESH) for metric in ("sgd", "sketch64")),
        Way(score="sketch64-contrast", begin=0.25),
    ],
}
"""What is compared with random choice; ``fresh`` followed from what ``scores`` gave, ``sketched`` from that."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokenized samples: ids (N, T) padded with 0, labels (N, T) with -100, and domains."""

    ids: Tensor
    labels: Tensor
    domain: list[str]

    @classmethod
    def read(cls, path: Path, tokenizer: Any) -> Rows:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        tokens = [tokenizer(row["text"], verbose=False)["input_ids"][:LENGTH] for row in rows]
        ids = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
        labels = torch.full((len(rows), LENGTH), IGNORED)
        for place, row in enumerate(tokens):
            ids[place, : len(row)] = torch.tensor(row)
            labels[place, : len(row) - 1] = torch.tensor(row[1:])
        return cls(ids, labels, [row["domain"] for row in rows])

    def to(self, device: str) -> Rows:
        return Rows(self.ids.to(device), self.labels.to(device), self.domain)


def new_weights(seed: int, arms: int, device: str) -> dict[str, Tensor]:
    """A GPT-2 of each arm, all the same: (A, …) by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.02) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    weights = {"words": normal(VOCABULARY, WIDTH), "places": normal(LENGTH, WIDTH), "norm": torch.ones(WIDTH)}
    weights["norm.bias"] = torch.zeros(WIDTH)
    sides = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    for layer in range(LAYERS):
        for name, shape in sides.items():
            scale = 0.02 / math.sqrt(2 * LAYERS) if name in ("out", "down") else 0.02
            weights[f"{layer}.{name}"] = normal(*shape, scale=scale)
            weights[f"{layer}.{name}.bias"] = torch.zeros(shape[1])
        for name in ("first", "second"):
            weights[f"{layer}.{name}"] = torch.ones(WIDTH)
            weights[f"{layer}.{name}.bias"] = torch.zeros(WIDTH)
    return {
        name: value.to(device).expand(arms, *value.shape).contiguous().requires_grad_(True)
        for name, value in weights.items()
    }


class Pass:
    """One forward pass of all arms: (A, B) losses of the samples, and what goes into and out of the linears."""

    def __init__(self, weights: dict[str, Tensor], ids_ABT: Tensor, labels_ABT: Tensor) -> None:
        self.weights = weights
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        arms, batch, length = ids_ABT.shape
        first_of_arm = VOCABULARY * torch.arange(arms, device=ids_ABT.device).view(-1, 1, 1)
        x = F.embedding(ids_ABT + first_of_arm, weights["words"].flatten(0, 1))
        x = x + weights["places"][:, None, :length]
        for layer in range(LAYERS):
            q, k, v = self._linear(f"{layer}.qkv", self._norm(f"{layer}.first", x)).split(WIDTH, dim=-1)
            heads = [one.view(arms * batch, length, HEADS, -1).transpose(1, 2) for one in (q, k, v)]
            mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
            x = x + self._linear(f"{layer}.out", mixed.reshape(arms, batch, length, WIDTH))
            up = F.gelu(self._linear(f"{layer}.up", self._norm(f"{layer}.second", x)), approximate="tanh")
            x = x + self._linear(f"{layer}.down", up)
        x = self._norm("norm", x)
        logits = torch.matmul(x.flatten(1, 2), weights["words"].transpose(1, 2))
        flat = F.cross_entropy(logits.flatten(0, 1), labels_ABT.flatten(), ignore_index=IGNORED, reduction="none")
        self.count_AB = (labels_ABT != IGNORED).sum(2).clamp_min(1)
        self.losses_AB = flat.view(arms, batch, length).sum(2) / self.count_AB

    def _norm(self, name: str, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2), WIDTH)
        scaled = F.layer_norm(x, (WIDTH,))
        return scaled * self.weights[name].view(shape) + self.weights[f"{name}.bias"].view(shape)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = torch.baddbmm(self.weights[f"{name}.bias"].unsqueeze(1), x.flatten(1, 2), self.weights[name])
        self.inputs[name], self.outputs[name] = x.detach(), y
        return y.view(*x.shape[:3], -1)

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, inputs (A, B, T, I), gradients at its outputs (A, B, T, O)) of each linear, of the own losses."""
        deltas = torch.autograd.grad(self.losses_AB.sum(), list(self.outputs.values()), retain_graph=True)
        for name, delta in zip(self.outputs, deltas, strict=True):
            x = self.inputs[name]
            yield name, x, delta.view(*x.shape[:3], -1)


class Adam:
    """AdamW of every arm."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights
        self.first = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.second = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.steps = 0

    def preconditioner(self, name: str) -> Tensor:
        """1 / (√v̂ + ε), (A, …); ones before the first step."""
        if not self.steps:
            return torch.ones_like(self.second[name])
        return 1 / ((self.second[name] / (1 - 0.95**self.steps)).sqrt() + 1e-8)

    def step(self, gradients: dict[str, Tensor], rate: float) -> None:
        self.steps += 1
        norm_A = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        clip_A = (1 / norm_A.clamp_min(1e-6)).clamp_max(1.0)
        with torch.no_grad():
            for name, gradient in gradients.items():
                g = gradient * clip_A.view(-1, *[1] * (gradient.dim() - 1))
                self.first[name].lerp_(g, 0.1)
                self.second[name].lerp_(g.square(), 0.05)
                mean = self.first[name] / (1 - 0.9**self.steps)
                if gradient.dim() == 3:
                    self.weights[name].mul_(1 - 0.1 * rate)
                self.weights[name].sub_(rate * mean * self.preconditioner(name))


def sides(layer: str, size: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(I, √size) and (O, √size): random matrices of a layer, the same at every call."""
    generator = torch.Generator().manual_seed(size + 1000 * zlib.crc32(layer.encode()))
    side = math.isqrt(size)
    p_i, p_o = (torch.randn(count, side, generator=generator) / math.sqrt(side) for count in shape)
    return p_i.to(device), p_o.to(device)


def sketched_scores(vectors_ABD: Tensor, val_AD: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) twice: dots of the sketched gradients, and those against the candidates' mean, too."""
    dot = torch.einsum("abd,ad->ab", vectors_ABD, val_AD)
    return dot, dot - torch.einsum("abd,ad->ab", vectors_ABD, vectors_ABD.mean(1))


def scores_of(passed: Pass, val: dict[str, Tensor], adam: Adam) -> dict[str, Tensor]:
    """(A, B) by metric and unit."""
    names = ("dot", "size", "against mean", "mean size", "mean dot", "val size")
    sums: dict[tuple[str, str], Tensor] = {}
    vectors: dict[int, list[Tensor]] = {size: [] for size in SKETCHES}
    val_vectors: dict[int, list[Tensor]] = {size: [] for size in SKETCHES}

    def add(metric: str, name: str, value: Tensor) -> None:
        sums[metric, name] = sums[metric, name] + value if (metric, name) in sums else value

    for layer, x, delta in passed.gradients():
        each = torch.matmul(x.transpose(2, 3), delta)  # (A, B, I, O)
        mean = each.mean(1, keepdim=True)
        for size in SKETCHES:
            p_i, p_o = sides(layer, size, each.shape[2:], each.device)
            vectors[size].append((p_i.T @ each @ p_o).flatten(2))
            val_vectors[size].append((p_i.T @ val[layer] @ p_o).flatten(1))
        for metric in METRICS:
            p = adam.preconditioner(layer).unsqueeze(1) if metric == "adam" else torch.ones_like(mean)
            scaled, scaled_mean = val[layer].unsqueeze(1) * p, mean * p
            values = (each * scaled, each.square() * p, each * scaled_mean, mean * scaled_mean, mean * scaled)
            for name, value in zip(names, values, strict=False):
                add(metric, name, value.sum((2, 3)))
            add(metric, "val size", (val[layer].unsqueeze(1) * scaled).sum((2, 3)))
    scores = {}
    for metric in METRICS:
        dot, size, against, mean_size, _, _ = (sums[metric, name] for name in names)
        contrast = dot - against
        own = (size - 2 * against + mean_size).clamp_min(1e-20).sqrt()
        scores |= {
            f"{metric}-dot": dot,
            f"{metric}-cosine": dot / size.clamp_min(1e-20).sqrt(),
            f"{metric}-tokens": dot * passed.count_AB,
            f"{metric}-contrast": contrast,
            f"{metric}-contrast-cosine": contrast / own,
        }
    for size in SKETCHES:
        dot, contrast = sketched_scores(torch.cat(vectors[size], 2), torch.cat(val_vectors[size], 1))
        scores |= {f"sketch{size}-dot": dot, f"sketch{size}-contrast": contrast}
    return scores


def weights_of(way: Way, scores_B: NDArray[np.float32]) -> NDArray[np.float32]:
    """(B,) weights of the candidates."""
    if way.temperature is not None:
        z = (scores_B - scores_B.mean()) / max(float(scores_B.std()), 1e-12) / way.temperature
        share = np.exp(z - z.max())
        return np.asarray(share / share.sum() * len(share), dtype=np.float32)
    order = np.argsort(-scores_B if not way.bottom else scores_B, kind="stable")
    weights = np.zeros(len(scores_B), dtype=np.float32)
    weights[order[: way.keep]] = 1.0
    return weights


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to choose, and the domain whose val loss shall fall."""

    way: Way
    domain: str


def train(
    arms: Sequence[Arm], train_rows: Rows, val_rows: Rows, *, seed: int, steps: int, batch: int, rate: float
) -> list[list[float]]:
    """The val loss of every arm, ``EVALUATIONS`` times in equal distances, on rows that nothing was scored against."""
    device = str(train_rows.ids.device)
    weights = new_weights(seed, len(arms), device)
    adam = Adam(weights)
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(train_rows.domain)) for _ in range(steps * batch // len(train_rows.domain) + 1)]
    )
    rows_of = {}
    for arm in arms:
        places = [p for p, name in enumerate(val_rows.domain) if arm.domain in (name, "all")]
        rows_of[arm.domain] = (places[::2], places[1::2])
    val: dict[str, Tensor] = {}
    curves: list[list[float]] = [[] for _ in arms]
    marks = {round(steps * (k + 1) / EVALUATIONS) - 1 for k in range(EVALUATIONS)}
    for step in range(steps):
        chosen_rows = torch.from_numpy(order[step * batch : (step + 1) * batch]).to(device)
        ids, labels = (t[chosen_rows].expand(len(arms), -1, -1) for t in (train_rows.ids, train_rows.labels))
        refresh_val(arms, rows_of, weights, val_rows, step, val)
        passed = Pass(weights, ids, labels)
        scores = scores_of(passed, val, adam)
        losses = passed.losses_AB.detach()
        scores |= {"loss": losses, "low-loss": -losses}
        columns = list(scores)
        scores_SAB = torch.stack([scores[name].float() for name in columns]).cpu().numpy()
        chosen_AB = np.zeros((len(arms), batch), dtype=np.float32)
        for place, arm in enumerate(arms):
            if arm.way.score == "random" or step < arm.way.begin * steps:
                chosen_AB[place, : arm.way.keep] = 1.0  # the order is a random one
            else:
                chosen_AB[place] = weights_of(arm.way, scores_SAB[columns.index(arm.way.score), place])
        share_AB = torch.from_numpy(chosen_AB).to(device) * passed.count_AB
        loss = (passed.losses_AB * share_AB / share_AB.sum(1, keepdim=True)).sum()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        warm = min(1.0, (step + 1) / (0.05 * steps))
        adam.step(gradients, rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))))
        if step in marks:
            for curve, value in zip(curves, held_out(arms, rows_of, weights, val_rows), strict=True):
                curve.append(value)
    return curves


def refresh_val(
    arms: Sequence[Arm], rows_of: dict[str, Any], weights: Any, rows: Rows, step: int, val: dict[str, Tensor]
) -> None:
    """Put the new val gradients of the arms for which they are due into ``val``: (A, I, O) by layer."""
    for count in sorted({arm.way.val_rows for arm in arms}):
        due = [p for p, arm in enumerate(arms) if arm.way.val_rows == count and not step % arm.way.refresh]
        if not due:
            continue
        places = []
        for place in due:
            own = rows_of[arms[place].domain][0]
            start = step // arms[place].way.refresh * count
            places.append([own[(start + k) % len(own)] for k in range(count)])
        where = torch.tensor(places, device=rows.ids.device)
        some = {name: value[due] for name, value in weights.items()} if len(due) < len(arms) else weights
        for layer, x, delta in Pass(some, rows.ids[where], rows.labels[where]).gradients():
            mean = torch.einsum("abti,abto->aio", x, delta) / count
            if layer not in val:
                val[layer] = torch.zeros(len(arms), *mean.shape[1:], device=mean.device)
            val[layer][due] = mean


def held_out(arms: Sequence[Arm], rows_of: dict[str, Any], weights: Any, rows: Rows) -> list[float]:
    """Mean loss a target of each arm, on the val rows of its domain that it does not score against."""
    values = [0.0] * len(arms)
    for domain, (_, places) in rows_of.items():
        own = [p for p, arm in enumerate(arms) if arm.domain == domain]
        total, targets = 0.0, 0.0
        for start in range(0, len(places), 25):
            where = torch.tensor(places[start : start + 25], device=rows.ids.device)
            with torch.no_grad():
                some = {name: value[own] for name, value in weights.items()}
                ids, labels = (t[where].expand(len(own), -1, -1) for t in (rows.ids, rows.labels))
                passed = Pass(some, ids, labels)
            total = total + (passed.losses_AB * passed.count_AB).sum(1)
            targets = targets + passed.count_AB.sum(1)
        for place, value in zip(own, (total / targets).tolist(), strict=True):
            values[place] = value
    return values


def reached(curve: Sequence[float], goal: float) -> float:
    """Share of the updates after which ``curve`` is at ``goal``; above 1 if it never is."""
    for k, value in enumerate(curve):
        if value <= goal:
            before = curve[k - 1] if k else value
            part = 1.0 if before == value or not k else (before - goal) / (before - value)
            return (k + part) / len(curve)
    return 1.05


def add_tables(results: Results, found: dict[tuple[str, str], list[list[float]]], domains: Sequence[str]) -> None:
    """Last val losses less those of random choice, paired by seed; and the share of updates to reach random's last."""
    random = {domain: np.array(found["random", domain]) for domain in domains}
    ways = list(dict.fromkeys(name for name, _ in found))
    losses, shares = [], []
    for name in ways:
        row, share = {"way": name}, {"way": name}
        all_differences = []
        for domain in domains:
            curves = np.array(found[name, domain])
            difference = curves[:, -1] - random[domain][:, -1]
            all_differences.append(difference)
            error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else float("nan")
            value = (
                f"{random[domain][:, -1].mean():.3f}" if name == "random" else f"{difference.mean():+.3f} ± {error:.3f}"
            )
            row[domain] = value
            each = [reached(curve, goal) for curve, goal in zip(curves, random[domain][:, -1], strict=True)]
            share[domain] = f"{np.mean(each):.2f}"
        single = np.stack([d for d, domain in zip(all_differences, domains, strict=True) if domain != "all"]).mean(0)
        row["mean of single"] = (
            ""
            if name == "random"
            else (
                f"{single.mean():+.3f} ± {single.std(ddof=1) / math.sqrt(max(1, len(single))):.3f}"
                if len(single) > 1
                else f"{single.mean():+.3f}"
            )
        )
        losses.append(row)
        shares.append(share)
    results.add(
        Table(
            "Last val loss less that of random choice",
            losses,
            "Nats a token on val rows of the domain that nothing was scored against; mean and standard error of the "
            "differences over seeds, same weights and candidates. Negative is better. First line: random choice's own.",
        ),
        curves={f"{name}|{domain}": curves for (name, domain), curves in found.items()},
    )
    results.add(
        Table("Share of the updates after which the val loss is random choice's last one", shares, "1.05: never.")
    )


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="jsonl of text and domain.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), required=True, help="The same.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--steps", type=int, default=300, show_default=True)
@click.option("--candidates", type=int, default=16, show_default=True)
@click.option("--rate", type=float, default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--arms", "at_once", type=int, default=128, show_default=True, help="Arms trained side by side.")
@click.option("--ways", type=click.Choice(list(SETS)), default="scores", show_default=True)
@click.option("--only", default="", help="Only these val domains, with commas.")
@folders
def main(
    data: Path, val_set: Path, device: str, seeds: int, steps: int, candidates: int, rate: float, at_once: int,
    ways: str, only: str, scratch: Path | None, out: Path,
) -> None:  # fmt: skip
    """Compare ways to choose candidates by the val loss that they reach."""
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    train_rows, val_rows = (Rows.read(path, tokenizer).to(device) for path in (data, val_set))
    domains = [name for name in [*sorted(set(val_rows.domain)), "all"] if not only or name in only.split(",")]
    arms = [Arm(way, domain) for way, domain in itertools.product([Way(), *SETS[ways]], domains)]
    found: dict[tuple[str, str], list[list[float]]] = {(arm.way.name, arm.domain): [] for arm in arms}
    torch.set_float32_matmul_precision("high")  # of small trainings, not of what is stored
    begun = Clock.now(device)
    for seed in range(seeds):
        for first in range(0, len(arms), at_once):
            some = arms[first : first + at_once]
            curves = train(some, train_rows, val_rows, seed=seed, steps=steps, batch=candidates, rate=rate)
            for arm, curve in zip(some, curves, strict=True):
                found[arm.way.name, arm.domain].append(curve)
        click.echo(f"seed {seed}: {Clock.now(device).since(begun).wall:.0f} s", err=True)
        results = Results(
            name=f"choosing-ways-{ways}" + ("" if device == "cpu" else f"-{device}"),
            title="Ways to choose candidates in the step",
            settings={
                "steps": steps,
                "candidates": candidates,
                "rate": rate,
                "seeds": seed + 1,
                "vocabulary": VOCABULARY,
            },
            facts=machine_facts(device),
        )
        add_tables(results, found, domains)
        results.write(out)  # after each seed: what is cut off leaves the seeds before


if __name__ == "__main__":
    main()
