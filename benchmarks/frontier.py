"""What predicts best for its bytes? LDS of gradients in several metrics, exact and stored: numbers a layer × bits ×
projection × metric × damping × calibration samples, all on the same trainings.

Gradients are dense here, layer by layer, and every way is computed from them; the last table is of parts that
``ghoststore build`` made.

Legend: N samples of the corpus, V val samples, O, I axes of a layer's gradient matrix, D its numbers, M halves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, machine_facts, read_texts
from lds import MAX_LENGTH, demo_files, shown
from matplotlib import pyplot
from numpy.typing import NDArray
from torch import Tensor
from training_scores import own_groups
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, ProjectionConfig, Store
from ghoststore.checkpoint.load import find_checkpoint, load_model, load_tokenizer
from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent
from ghoststore.settings.question import RebuiltOptions
from indexer.encode.batching import plan_batches
from indexer.encode.encoder import RowEncoder
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from indexer.projection.matrices import Projection
from indexer.training.retrain import Recipe
from query.ask.question import Question
from query.ask.scorer import open_scorer
from query.demo.tokenizer import train_tokenizer
from query.evaluate.lds import Lds, half, lds
from query.evaluate.task import Task
from query.evaluate.tf_idf import TfIdf
from query.evaluate.trainings import By, losses_of
from query.search.vectors import PartVectors

LAYERS = ("mlp", "attn")
CALIBRATION = (256, 1024)
DAMPING = {"K-FAC": (0.3, 0.1, 0.03, 0.01, 0.001), "EK-FAC": (0.3, 0.1, 0.03, 0.01)}
LIMIT = 270
"""Bytes of a layer and row that the default may have."""
FEW = (0.1, 0.01)
"""Damping where calibration samples are few."""
STORED = {"K-FAC, damping 0.1", "EK-FAC, damping 0.1"}
"""The metrics, learned from the fewer samples, whose gradients are projected and rounded."""
SKETCHES: dict[str, tuple[int | None, dict[int, tuple[int, ...]]]] = {
    # How a block is projected: rank of the sides (None: none), then numbers of a sketch (0: none) and bits of each.
    "8 × 8": (8, {0: (32, 1)}),
    "16 × 16": (16, {0: (32, 8, 1)}),
    "45 × 45": (45, {0: (32, 8, 1)}),
    "64 × 64": (64, {64: (32,), 256: (8,), 512: (4,), 1024: (2,), 2048: (32, 1), 0: (32, 1)}),
    "128 × 128": (128, {2048: (32, 1), 8192: (1,)}),
    "whole": (None, {256: (8,), 2048: (32, 1)}),
}
BUILT: dict[str, dict[str, Any]] = {
    "float32": {"proj_dtype": "float32"},
    "int8": {"proj_dtype": "int8"},
    "onebit (default)": {},
    "onebit, damping 0.01": {"projection": ProjectionConfig(damping=0.01)},
    "onebit, plain gradients": {"projection": ProjectionConfig(precondition="none", compress_by="layer")},
    "onebit, with embeddings and head": {"projection": ProjectionConfig(include_embeddings=True)},
    "onebit, with norms": {"projection": ProjectionConfig(layers=("mlp", "attn", "norm"))},
    "onebit, all layers": {"projection": ProjectionConfig(layers=("all",))},
}
Key = tuple[str, str, int, int]
"""Metric, projection, numbers a layer (0: all), bits."""


@dataclass(slots=True)
class Sums:
    """Scores and squared lengths of rows by way, summed over layers."""

    scores: dict[Key, Tensor] = field(default_factory=dict)
    """(V, N)."""
    lengths: dict[Key, Tensor] = field(default_factory=dict)
    """(N,)."""

    def add(self, key: Key, query_VD: Tensor, rows_ND: Tensor) -> None:
        scores, lengths = (query_VD @ rows_ND.t()).double(), rows_ND.square().sum(1).double()
        self.scores[key] = self.scores[key] + scores if key in self.scores else scores
        self.lengths[key] = self.lengths[key] + lengths if key in self.lengths else lengths


def rounded(x_ND: Tensor, bits: int) -> Tensor:
    """Rows as an encoding of that many bits gives them back, with one scale a row."""
    deviation_N1 = x_ND.square().mean(1, keepdim=True).sqrt()
    if bits == 32:
        return x_ND
    if bits == 1:
        return x_ND.sign() * x_ND.abs().mean(1, keepdim=True)
    if bits == 2:  # the four levels of least error for normal numbers (Lloyd, Max)
        return x_ND.sign() * torch.where(x_ND.abs() > 0.9816 * deviation_N1, 1.510, 0.4528) * deviation_N1
    top, codes = (x_ND.abs().amax(1, keepdim=True), 127) if bits == 8 else (3 * deviation_N1, 7)
    return (x_ND / top.clamp_min(1e-30) * codes).round().clamp(-codes, codes) * top / codes


def sketched(x_ND: Tensor, numbers: int, seed: int) -> Tensor:
    """A count sketch; all of the numbers where that is 0."""
    if not numbers:
        return x_ND
    generator, dimension = torch.Generator().manual_seed(seed), x_ND.shape[1]
    width = -(-dimension // numbers)
    order, sign = torch.randperm(dimension, generator=generator), torch.randint(0, 2, (dimension,), generator=generator)
    padded = torch.zeros(len(x_ND), width * numbers)
    padded[:, :dimension] = (x_ND * (sign * 2.0 - 1))[:, order]
    return padded.view(len(x_ND), width, numbers).sum(1)


def evenly(rows_NOI: Tensor, count: int) -> Tensor:
    return rows_NOI[[place * len(rows_NOI) // count for place in range(min(count, len(rows_NOI)))]]


def in_metrics(
    rows_NOI: Tensor, val_VOI: Tensor, count: int, metrics: Mapping[str, Sequence[float]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, rows, val samples): the gradients of one layer in each metric, learned from ``count`` rows, by damping."""
    _, n_out, n_in = rows_NOI.shape
    sample = evenly(rows_NOI, count)
    factors = [torch.einsum(form, sample, sample).double() / len(sample) for form in ("noi,npi->op", "noi,noj->ij")]
    (a, u_out), (b, u_in) = (torch.linalg.eigh(factor) for factor in factors)
    a, b, u_out, u_in = (x.float() for x in (a.clamp_min(0), b.clamp_min(0), u_out, u_in))
    turned, asked = (u_out.t() @ matrices @ u_in for matrices in (rows_NOI, val_VOI))
    second = evenly(turned, count).square().mean(0)
    size = float(factors[0].trace() / (n_out * n_in)) ** -0.5
    for metric, dampings in metrics.items():
        for damping in dampings:
            weight = (second + damping * second.mean()).rsqrt()
            if metric == "K-FAC":
                outer = (b / b.mean() + damping).rsqrt()
                weight = size * (a / a.mean() + damping).rsqrt()[:, None] * outer[None]
            yield f"{metric}, damping {damping:g}", turned * weight, asked * weight


def add_layer(sums: Sums, rows_NOI: Tensor, val_VOI: Tensor, seed: int) -> None:
    """All ways of one layer."""
    sums.add(("plain", "exact", 0, 32), val_VOI.flatten(1), rows_NOI.flatten(1))
    for count in CALIBRATION:
        metrics = {metric: dampings if count == max(CALIBRATION) else FEW for metric, dampings in DAMPING.items()}
        for metric, x, y in in_metrics(rows_NOI, val_VOI, count, metrics):
            name = f"{metric}, of {count:,}"
            sums.add((name, "exact", 0, 32), y.flatten(1), x.flatten(1))
            if count == min(CALIBRATION) and metric in STORED:
                add_stored(sums, name, x, y, seed)


def add_stored(sums: Sums, name: str, x_NOI: Tensor, y_VOI: Tensor, seed: int) -> None:
    """What is left of gradients in a metric when they are projected, sketched and rounded."""
    generator = torch.Generator().manual_seed(seed)
    for label, (rank, sizes) in SKETCHES.items():
        x, y = x_NOI, y_VOI
        if rank is not None:
            sides = [torch.randn(min(rank, n), n, generator=generator) / min(rank, n) ** 0.5 for n in x_NOI.shape[1:]]
            sides = [torch.linalg.qr(side).Q if len(side) == side.shape[1] else side for side in sides]
            x, y = (sides[0] @ matrices @ sides[1].t() for matrices in (x, y))
        for numbers, bits in sizes.items():
            if numbers and numbers >= x[0].numel():
                continue
            rows, query = (sketched(matrices.flatten(1), numbers, seed + numbers) for matrices in (x, y))
            for each in bits:
                sums.add(
                    (name, label, rows.shape[1] if numbers else rank**2 if rank else 0, each),
                    query,
                    rounded(rows, each),
                )


class Case:
    """A corpus, a model trained on it, and the losses of models trained on halves; in a folder, made once."""

    def __init__(self, folder: Path, halves: int, workers: int) -> None:
        self.folder, self.halves, self.workers, self.recipe = folder, halves, workers, Recipe()
        self.data, self.val_set = folder / "train.jsonl", folder / "val.jsonl"

    @property
    def checkpoint(self) -> Path:
        paths = (self.folder / "training").glob("checkpoint-*")
        return max(paths, key=lambda path: int(path.name.rpartition("-")[2]))

    def prepare(self) -> None:
        """Train what is not there."""
        if not (self.folder / "training").exists():
            train_tokenizer(read_texts(self.data)).save_pretrained(self.folder / "tokenizer")
            ghoststore.train(
                data=self.data, val_set=self.val_set, output_dir=self.folder / "training",
                tokenizer=self.folder / "tokenizer", architecture="GPT2-Tiny", max_length=MAX_LENGTH,
                overlong="truncate", method="Regular", eval_interval=self.recipe.max_steps, device="cpu",
                progress=Silent(), **asdict(self.recipe),
            )  # fmt: skip
        if (self.folder / "halved.npz").exists():
            return
        part = self.built("onebit (default)")
        task = Task.of(
            part, str(self.val_set), self.folder / "evaluation", fields=Fields(), max_val_samples=None,
            recipe=self.recipe, behind=RebuiltOptions(), device="cpu", progress=Silent(),
        )  # fmt: skip
        kept = {f"half-{place:05d}": half(self.recipe.seed, place, task.samples) for place in range(self.halves)}
        losses = losses_of(
            task.plan(kept), self.folder / "evaluation" / "trainings", By(workers=self.workers), Silent()
        )
        np.savez(self.folder / "halved.npz", kept=np.stack([*kept.values()]), losses=np.stack([*losses.values()], 1))

    def built(self, label: str, settings: dict[str, Any] | None = None) -> Any:
        """The part with these ``settings``, or those of ``label`` in BUILT; built if it is not there."""
        name = "".join(letter if letter.isalnum() else "-" for letter in label)
        ghoststore.build(
            checkpoint=self.checkpoint, data=self.data, store=self.folder / "parts-store", name=name,
            max_length=MAX_LENGTH, device="cpu", progress=Silent(), **(BUILT[label] if settings is None else settings),
        )  # fmt: skip
        return Store.open(self.folder / "parts-store").part(name)


def dense(model: Any, rows: list[Row], layer: str) -> Tensor:
    """(rows, O, I): the gradients of one layer."""
    projection = Projection.for_model(model, ProjectionConfig(rank_total="full", precondition="none", layers=(layer,)))
    gradients = torch.empty(len(rows), projection.plan.dimension)
    with RowEncoder(model, projection) as encoder:
        for batch in plan_batches([len(row.tokens) for row in rows], 2048):
            gradients[batch] = encoder([rows[place] for place in batch]).vectors
    block = projection.plan.layers[0].block
    return gradients.view(len(rows), block.n_out, block.n_in)


def loaded(case: Case) -> tuple[Any, list[Row], list[Row], list[str]]:
    """(model, rows of the corpus, val rows, names of the default's layers)."""
    found = find_checkpoint(str(case.checkpoint))
    model: Any = load_model(found, dtype="float32", device="cpu")
    tokenizer = Tokenizer(load_tokenizer(found.folder))
    settings = TokenSettings(max_length=MAX_LENGTH)
    train, val = (
        list(rows_of(Corpus.open(str(path)).samples(), tokenizer, settings)) for path in (case.data, case.val_set)
    )
    plan = Projection.for_model(model, ProjectionConfig(precondition="none", rank_total="full", layers=LAYERS)).plan
    return model, train, val, [layer.block.name for layer in plan.layers]


def all_ways(case: Case) -> tuple[Sums, NDArray[np.bool_], int]:
    """(sums, which samples are usable, layers)."""
    model, train, val, layers = loaded(case)
    usable = np.array([row.status.usable for row in train])
    sums, begun = Sums(), time.perf_counter()
    for place, layer in enumerate(layers):
        of_layer = partial(dense, model, layer=layer)
        add_layer(sums, of_layer([row for row in train if row.status.usable]), of_layer(val), 1000 * place)
        print(f"{layer}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return sums, usable, len(layers)


@dataclass(frozen=True, slots=True)
class Judge:
    """The trainings that scores are held against."""

    kept_MN: NDArray[np.bool_]
    losses_VM: NDArray[np.float64]

    def of(self, scores_VN: NDArray[np.float64]) -> Lds:
        return lds(scores_VN, self.kept_MN, self.losses_VM)

    def of_part(self, case: Case, label: str) -> dict[str, Lds]:
        """By dot and cosine."""
        part = case.built(label)
        question = Question(
            store=part.path.parent.parent, val_set=case.val_set, part=part.name, each=True, device="cpu"
        )
        with open_corpus(str(case.val_set), Fields()) as val_set:
            scorer = open_scorer(question, [part], [1.0], val_set, Silent())
        rows_ND = PartVectors(part).gather(np.arange(self.kept_MN.shape[1]))
        dot_VN = (scorer.terms[0].queries_QD.float() @ rows_ND.t()).double()
        lengths_N = rows_ND.norm(dim=1).double().clamp_min(1e-30)
        return {"dot": self.of(dot_VN.numpy()), "cosine": self.of((dot_VN / lengths_N).numpy())}


def bytes_of(numbers: int, bits: int) -> int:
    """Of a layer and row, with a scale of four bytes where numbers are rounded."""
    return -(-numbers * bits // 8) + (4 if bits < 32 else 0)


def picture(path: Path, stored: list[tuple[int, int, float]], exact: float, words: float) -> None:
    """LDS against bytes: every (bits, bytes, LDS) a point, a line through the best of each size for each number of
    bits.
    """
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for bits in sorted({bits for bits, _, _ in stored}):
        points = sorted((size, value) for each, size, value in stored if each == bits)
        (line,) = axes.plot(*zip(*sorted(dict(points).items()), strict=True), label=f"{bits} bit{'s' * (bits > 1)}")
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=line.get_color())
    for height, label, style in ((exact, "exact gradients", "--"), (words, "TF-IDF", ":")):
        axes.axhline(height, color="gray", linewidth=1, linestyle=style)
        axes.text(0.99, height, label, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)
    axes.axvline(LIMIT, color="gray", linewidth=0.5)
    axes.text(LIMIT, 0.01, f" {LIMIT} bytes", transform=axes.get_xaxis_transform(), va="bottom", fontsize=8)
    axes.set(xscale="log", xlabel="bytes of a layer and row", ylabel="LDS", ylim=(0, 1.1 * max(exact, words)))
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path)
    pyplot.close(figure)


def add_tables(results: Results, case: Case, judge: Judge, out: Path) -> None:
    """Metrics, what is stored of one, and parts as built."""
    sums, usable, _ = all_ways(case)
    values: dict[Key, tuple[Lds, Lds]] = {}
    for key, scores in sums.scores.items():
        pair = []
        for divisor in (1.0, sums.lengths[key].clamp_min(1e-30).sqrt()):
            scores_VN = np.zeros((len(scores), len(usable)))
            scores_VN[:, usable] = (scores / divisor).numpy()
            pair.append(judge.of(scores_VN))
        values[key] = (pair[0], pair[1])
    texts = read_texts(case.data)
    words = TfIdf(texts)
    lexical = judge.of((words.vectors(read_texts(case.val_set)) @ words.rows.T).astype(np.float64))
    exact = [
        {"metric": metric, "dot": shown(dot), "cosine": shown(cosine)}
        for (metric, label, _, _), (dot, cosine) in values.items()
        if label == "exact"
    ]
    exact.append({"metric": "TF-IDF", "dot": "", "cosine": shown(lexical)})
    note = "Gradients of all linears of the blocks, nothing projected. `of N`: samples that the metric is learned from."
    results.add(Table("Exact gradients by metric", exact, note))
    rows, points = [], []
    for (metric, label, numbers, bits), (dot, cosine) in values.items():
        if label != "exact":
            size = bytes_of(numbers, bits)
            base = values[metric, "exact", 0, 32][0].value
            rows.append({
                "metric": metric, "projection": label, "numbers": f"{numbers:,}" if numbers else "all",
                "bits": str(bits), "bytes": f"{size:,}" if numbers else "", "dot": shown(dot),
                "÷ exact": f"{dot.value / base:.2f}", "cosine": shown(cosine),
            })  # fmt: skip
            if metric.startswith("K-FAC") and numbers:
                points.append((bits, size, dot.value))
    results.add(Table("Projected, sketched and rounded: a layer and row", rows, "As many numbers for each layer."))
    kfac = values[f"K-FAC, damping 0.1, of {min(CALIBRATION)}", "exact", 0, 32][0].value
    picture(out / f"{results.name}.svg", points, kfac, lexical.value)
    parts = []
    for label in BUILT:
        measured = judge.of_part(case, label)
        share = f"{measured['dot'].value / kfac:.2f}"
        parts.append({"part": label, **{name: shown(value) for name, value in measured.items()}, "÷ exact": share})
    note = "256 bytes a layer on average, by each layer's share of the gradient. ÷ exact: by K-FAC, damping 0.1."
    results.add(
        Table("Parts as built", parts, note),
        lds={" | ".join(map(str, key)): [asdict(each) for each in pair] for key, pair in values.items()},
        parts=parts,
        tf_idf=asdict(lexical),
    )


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Corpus; without it that of the demo.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), help="Val corpus, with --data.")
@click.option("--name", default="demo", show_default=True, help="Of the results.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder of the trainings; kept and taken.")
@click.option("--halves", type=int, default=48, show_default=True, help="Trainings on random halves.")
@click.option("--workers", type=int, default=2, show_default=True, help="Trainings at once.")
@click.option("--of-each", type=int, default=10, show_default=True, help="Val samples of a domain, of the demo.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    data: Path | None, val_set: Path | None, name: str, work: Path, halves: int, workers: int, of_each: int, out: Path
) -> None:
    """Compare metrics, projections and encodings by what they predict."""
    disable_progress_bar()
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "train.jsonl").exists():
        if data is None or val_set is None:
            _, whole = demo_files(work)
            own_groups(whole, work / "own.jsonl", of_each)
            (work / "own.jsonl").replace(whole)
        else:
            (work / "train.jsonl").write_bytes(data.read_bytes())
            (work / "val.jsonl").write_bytes(val_set.read_bytes())
    case = Case(work, halves, workers)
    case.prepare()
    losses = np.load(work / "halved.npz")
    judge = Judge(losses["kept"], losses["losses"])
    results = Results(
        name=f"frontier-{name}",
        title="What predicts best for its bytes",
        settings={
            "corpus": name,
            "samples": judge.kept_MN.shape[1],
            "val samples": len(judge.losses_VM),
            "halves": len(judge.kept_MN),
            **asdict(case.recipe),
        },
        facts=machine_facts(),
    )
    out.mkdir(parents=True, exist_ok=True)
    add_tables(results, case, judge, out)
    results.write(out)


if __name__ == "__main__":
    main()
