"""Which scores of a training predict what training on half of the corpus does? LDS of training-time scores by metric,
val gradient, weight of the steps, and of what the gradients that a run keeps can be asked; all on the same trainings.

Every val sample is a val group of its own here, so that each has scores of its own.

Legend: V val samples, M halves, N samples of the corpus, D numbers of a kept gradient, P visits, S steps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, read_texts, scratch_folder
from lds import MAX_LENGTH, demo_files, shown, tell
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import ProjectionConfig, Run, Store
from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent
from ghoststore.settings.question import RebuiltOptions
from ghoststore.settings.shared import StepWeight
from ghoststore.store.run.visits import stream_visits
from indexer.training.retrain import Recipe
from query.ask.run_question import RunQuestion
from query.ask.run_scorer import RunScorer
from query.demo.tokenizer import train_tokenizer
from query.evaluate.lds import half, lds
from query.evaluate.predictors import grouped
from query.evaluate.task import Task
from query.evaluate.trainings import By, losses_of
from query.search.parts import open_parts
from query.training_scores.steps import choose_column, stream_steps, window_of
from query.training_scores.sums import ScoreSums, Units
from query.training_scores.weights import StepWeights

PART = "part"
KEPT = "sketched"
"""The run that keeps gradients, of every step."""
REACH = (0.1, 0.3, 1.0, 3.0)
"""Of trajectories: the most that one step turns an effect of a step before."""
DAMPING = (0.03, 0.1, 0.3, 1.0)
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arm:
    """One scored training. All of them train the same weights."""

    name: str
    label: str
    options: dict[str, Any] = field(default_factory=dict)


def arms() -> list[Arm]:
    """What is compared."""
    several = [
        Arm(f"plain-{interval}", f"exact, val gradient every {interval}", {"val_refresh_interval": interval})
        for interval in (1, 5, 10, 25, 50)
    ]
    blocks = {"score_layers": "blocks"}
    adam = {**blocks, "score_metric": "adam"}
    return [
        *several,
        Arm("blocks", "exact, linears of the blocks, every 1", blocks),
        Arm("adam", "the same in Adam's metric", adam),
        Arm("adam-10", "in Adam's metric, every 10", {**adam, "val_refresh_interval": 10}),
        Arm(KEPT, "sketched, every 1", {"score": "sketched", "keep_gradients": 1, "proj_dtype": "float32"}),
    ]


def own_groups(source: Path, target: Path, most: int) -> None:
    """The val set with every row as its own domain, at most ``most`` rows of each domain; ``of`` keeps the domain."""
    rows, counts = [], {}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        counts[row["domain"]] = counts.get(row["domain"], 0) + 1
        if counts[row["domain"]] <= most:
            rows.append({**row, "of": row["domain"], "domain": f"v{len(rows):03d}"})
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Bench:
    """The corpus, its scored trainings and those on halves."""

    def __init__(self, folder: Path, data: Path, val_set: Path, recipe: Recipe, out: Path, device: str) -> None:
        self.folder, self.data, self.val_set, self.recipe, self.out, self.device = (
            folder, data, val_set, recipe, out, device,
        )  # fmt: skip
        self.store = folder / "store"
        self.val_rows = val_set.read_text().count("\n")
        self.last: Path | None = None

    def train(self, arm: Arm) -> Run:
        """The run of one scored training."""
        output = self.folder / f"training-{arm.name}"
        ghoststore.train(
            data=self.data,
            val_set=self.val_set,
            store=self.store,
            name=arm.name,
            output_dir=output,
            tokenizer=self.folder / "tokenizer",
            architecture="GPT2-Tiny",
            max_length=MAX_LENGTH,
            overlong="truncate",
            val_batch_size=self.val_rows,
            val_groups=True,
            eval_interval=self.recipe.max_steps,
            device=self.device,
            progress=Silent(),
            **asdict(self.recipe),
            **arm.options,
        )
        self.last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return Store.open(self.store).run(arm.name)

    def task(self) -> Task:
        """With the default part at the end of the training."""
        assert self.last is not None
        ghoststore.build(
            checkpoint=self.last, data=self.data, store=self.store, name=PART, max_length=MAX_LENGTH,
            projection=ProjectionConfig(), device=self.device,
        )  # fmt: skip
        return Task.of(
            Store.open(self.store).part(PART), str(self.val_set), self.out, fields=Fields(), max_val_samples=None,
            recipe=self.recipe, behind=RebuiltOptions(), device=self.device, progress=Silent(),
        )  # fmt: skip


def of_run(task: Task, run: Run, weight: StepWeight) -> Float64:
    """(V, N): what a run's scores add up to, for each val sample."""
    window, units = window_of(run, None), Units(run, "window")
    rows = []
    for place in range(len(task.retrainer.val.rows)):
        sums = ScoreSums(len(units))
        weights = StepWeights(run, weight, window)
        column = choose_column(run, task.retrainer.val.domain_of(place))
        for piece in stream_steps(run, column, run.ranges, weights=weights):
            sums.add(piece.places, units.of(piece.places.row))
        rows.append(sums.values("cumulative"))
    source = np.asarray(run.rows.read("source_row", 0, len(run.rows)))
    values_VN = np.zeros((len(rows), task.samples))
    for value_N, row in zip(values_VN, rows, strict=True):
        np.add.at(value_N, source, np.nan_to_num(row))
    return values_VN


@dataclass(frozen=True, slots=True)
class Kept:
    """Every visit's gradient, and the val samples' at the last checkpoint."""

    vectors_PD: Float64
    step_P: NDArray[np.int64]
    sample_P: NDArray[np.int64]
    rate_P: Float64
    val_VD: Float64
    samples: int

    @classmethod
    def read(cls, bench: Bench, task: Task, run: Run) -> Kept:
        pieces = list(stream_visits(run, run.ranges))
        source = np.asarray(run.rows.read("source_row", 0, len(run.rows)))
        options = {"checkpoint": bench.last, "each": True, "device": bench.device}
        question = RunQuestion(store=bench.store, run=run.name, val_set=bench.val_set, **options)
        with open_corpus(str(bench.val_set), Fields()) as val_set:
            val = RunScorer(question, val_set, Silent()).val
        assert val is not None
        join = np.concatenate
        return cls(
            join([p.vectors for p in pieces]).astype(np.float64),
            join([p.step for p in pieces]),
            source[join([p.row for p in pieces])],
            join([p.learning_rate for p in pieces]),
            val.vectors.double().numpy(),
            task.samples,
        )

    def summed(self, values_VP: Float64) -> Float64:
        """(V, N): the sum over each sample's visits."""
        values_VN = np.zeros((len(values_VP), self.samples))
        for value_N, value_P in zip(values_VN, values_VP, strict=True):
            np.add.at(value_N, self.sample_P, value_P)
        return values_VN

    def against_last(self, weight_P: Float64) -> Float64:
        """(V, N): Σ weight·⟨visit, val gradient of the last checkpoint⟩."""
        return self.summed(self.val_VD @ self.vectors_PD.T * weight_P)

    def preconditioned(self, damping: float) -> Float64:
        """(V, N): the same in the metric of the visits' second moment, each step scaled to one mean length."""
        scale_P = self.unit_lengths()
        rows_PD = self.vectors_PD * scale_P[:, None]
        moment_DD = rows_PD.T @ rows_PD / len(rows_PD)
        moment_DD += damping * np.trace(moment_DD) / len(moment_DD) * np.eye(len(moment_DD))
        return self.summed(np.linalg.solve(moment_DD, self.val_VD.T).T @ rows_PD.T)

    def unit_lengths(self) -> Float64:
        """(P,): 1 ÷ the mean length of the step's gradients."""
        length_P = np.linalg.norm(self.vectors_PD, axis=1)
        sums, counts = np.bincount(self.step_P, length_P), np.bincount(self.step_P)
        return np.asarray(counts[self.step_P] / np.maximum(sums[self.step_P], 1e-30))

    def trajectory(self, reach: float, *, unit: bool) -> Float64:
        """(V, N): what each visit's step has become at the end of the training, against the last val gradient.

        A step at t moves the weights by η_t g; each later step k carries that on by I − η_k H_k, H_k the mean of the
        outer products of its samples' gradients (DVEmb, Wang et al. 2024). Going backwards, the val gradient is
        carried instead. η is scaled so that η_k tr H_k is ``reach`` at most, for plain gradients say nothing of
        the lengths that Adam's steps have.
        """
        scale_P = self.unit_lengths() if unit else np.sqrt(self.rate_P)
        rows_PD = self.vectors_PD * scale_P[:, None]
        steps = np.unique(self.step_P)
        places = {step: np.flatnonzero(self.step_P == step) for step in steps}
        largest = max(float(np.square(rows_PD[p]).sum(1).mean()) for p in places.values())
        val_VD, values_VP = self.val_VD.copy(), np.zeros((len(self.val_VD), len(rows_PD)))
        for step in steps[::-1]:
            own_BD = rows_PD[places[step]]
            products_VB = val_VD @ own_BD.T
            values_VP[:, places[step]] = products_VB * scale_P[places[step]]
            val_VD -= reach / largest * products_VB @ own_BD / len(own_BD)
        return self.summed(values_VP)


def kept_scores(kept: Kept) -> dict[str, Callable[[], Float64]]:
    """What the kept gradients can be asked, by name."""
    scores: dict[str, Callable[[], Float64]] = {
        "last val gradient, η": lambda: kept.against_last(kept.rate_P),
        "last val gradient, unit lengths": lambda: kept.against_last(kept.unit_lengths()),
    }
    for damping in DAMPING:
        scores[f"last val gradient, second moment, damping {damping:g}"] = lambda d=damping: kept.preconditioned(d)
    for reach in REACH:
        for unit in (False, True):
            label = f"trajectory, reach {reach:g}, {'unit lengths' if unit else 'η'}"
            scores[label] = lambda r=reach, u=unit: kept.trajectory(r, unit=u)
    return scores


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Corpus; without it that of the demo.")
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), help="Val corpus, with --data.")
@click.option("--halves", type=int, default=60, show_default=True, help="Trainings on random halves.")
@click.option("--max-steps", type=int, default=200, show_default=True, help="Of every training.")
@click.option("--of-each", type=int, default=12, show_default=True, help="Val samples of a domain.")
@click.option("--workers", type=int, default=2, show_default=True, help="Trainings at once.")
@click.option("--trainings", type=click.Path(path_type=Path), help="Keep the trainings here; take those there.")
@click.option("--device", default="cpu", show_default=True)
@folders
def main(
    data: Path | None, val_set: Path | None, halves: int, max_steps: int, of_each: int, workers: int,
    trainings: Path | None, device: str, scratch: Path | None, out: Path,
) -> None:  # fmt: skip
    """Train once with every kind of score, and as many models on halves; correlate scores with losses."""
    if (data is None) != (val_set is None):
        raise click.UsageError("give --data and --val-set, or neither")
    disable_progress_bar()
    torch.manual_seed(0)
    with scratch_folder(scratch) as folder:
        used = demo_files(folder) if data is None or val_set is None else (data, val_set)
        own_groups(used[1], folder / "val-own.jsonl", of_each)
        train_tokenizer(read_texts(used[0])).save_pretrained(folder / "tokenizer")
        recipe = Recipe(max_steps=max_steps)
        bench = Bench(folder, used[0], folder / "val-own.jsonl", recipe, trainings or folder / "evaluation", device)
        runs = {}
        for arm in arms():
            runs[arm.name] = bench.train(arm)
            tell(f"trained: {arm.name}")
        task = bench.task()
        kept = {f"half-{number:05d}": half(recipe.seed, number, task.samples) for number in range(halves)}
        losses = losses_of(task.plan(kept), bench.out / "trainings", By(workers=workers), Silent())
        kept_MN, losses_VM = np.stack(list(kept.values())), np.stack(list(losses.values()), axis=1)
        domain_of = [json.loads(line)["of"] for line in bench.val_set.read_text().splitlines()]
        domains = {name: [p for p, own in enumerate(domain_of) if own == name] for name in sorted(set(domain_of))}
        table, numbers = [], {}

        def add(label: str, score: str, values_VN: Float64) -> None:
            each = lds(values_VN, kept_MN, losses_VM)
            groups = lds(grouped(values_VN, domains), kept_MN, grouped(losses_VM, domains))
            table.append({"scores": label, "weight": score, "val samples": shown(each), "domains": shown(groups)})
            numbers[f"{label}/{score}"] = {"samples": asdict(each), "domains": asdict(groups)}
            tell(f"{label}, {score}: {shown(each)}, domains {shown(groups)}")

        for label, score, values_VN in references(bench, task):
            add(label, score, values_VN)
        for arm in arms():
            for weight in get_args(StepWeight):
                add(arm.label, weight, of_run(task, runs[arm.name], weight))
        for label, compute in kept_scores(Kept.read(bench, task, runs[KEPT])).items():
            add("kept gradients", label, compute())
        results = Results(
            name="training-scores" if data is None else f"training-scores-{data.stem}",
            title="Training-time scores: linear datamodeling score",
            settings={
                "data": "the demo's corpus" if data is None else data.name,
                "halves": halves,
                "val samples": len(domain_of),
                **asdict(recipe),
            },
            facts=machine_facts(device),
        )
        note = (
            f"LDS over {halves} models, each trained on another random half of {task.samples:,} samples. "
            "`val samples`: the mean over the losses of val samples, each scored by itself; `domains`: over the mean "
            "losses of domains. Intervals (95 %) resample the trainings."
        )
        results.add(Table("Linear datamodeling score", table, note), lds=numbers)
    results.write(out)


def references(bench: Bench, task: Task) -> list[tuple[str, str, Float64]]:
    """The default part at the end of the training, and words."""
    from query.ask.question import Question

    parts, weights = open_parts(bench.store, PART, None, Silent())
    base = Question(store=bench.store, val_set=bench.val_set, part=PART, each=True, device=bench.device)
    methods = task.methods(base, parts, weights, ("dot", "tf-idf", "random"), None, None)
    scored = [(name, compute().samples_VN) for name, compute in methods.items()]
    return [("default part" if name == "dot" else "–", name, values) for name, values in scored if values is not None]


if __name__ == "__main__":
    sys.exit(main())
