"""Which scores predict what training on half of the corpus does? The linear datamodeling score of every kind of part
and score, all on the same trainings.

Legend: V val samples, M halves, N samples of the corpus.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, read_texts, scratch_folder
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, ProjectionConfig, Store
from ghoststore.corpus import Fields
from ghoststore.progress import Silent
from ghoststore.settings.question import RebuiltOptions
from indexer.training.retrain import Recipe
from query.ask.encoder import PartEncoder
from query.ask.question import Question
from query.common.rank_correlation import spearman
from query.demo.corpus import DemoCorpus, read_corpus, write_jsonl
from query.demo.tokenizer import train_tokenizer
from query.evaluate.lds import Lds, half, lds
from query.evaluate.predictors import grouped
from query.evaluate.task import Scored, Task
from query.evaluate.trainings import By, losses_of
from query.search.parts import open_parts

RUN = "run"
MAX_LENGTH = 128
CHECKPOINTS = 4
PROMPT_WORDS = 3
SCORES = ("dot", "cosine", "preconditioned-dot")
PLAIN = {"precondition": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One kind of part."""

    label: str
    name: str
    projection: ProjectionConfig
    damping: float
    """Of scores preconditioned by the second moment of the stored rows."""
    proj_dtype: str = "float32"
    adam: bool = False
    every: bool = False
    """At every checkpoint, not only the last."""

    def at(self, step: int) -> str:
        """The name of the part at one checkpoint."""
        return f"{self.name}-{step}"


PARTS = (
    Built(label="sketch", name="sketch", projection=ProjectionConfig(**PLAIN), damping=1.0, every=True),
    Built(
        label="sketch, preconditioned (default)",
        name="default",
        projection=ProjectionConfig(),
        damping=1.0,
        proj_dtype="onebit",
        every=True,
    ),
    Built(label="the same, 64 of float32", name="default-float32", projection=ProjectionConfig(), damping=1.0),
    Built(label="plain blocks of 256", name="plain", projection=ProjectionConfig(rank_total=256, **PLAIN), damping=0.1),
    Built(
        label="plain blocks of 256, preconditioned",
        name="plain-default",
        projection=ProjectionConfig(rank_total=256),
        damping=0.1,
    ),
    Built(label="pca, 64 a layer", name="pca", projection=ProjectionConfig(kind="pca", **PLAIN), damping=1.0),
    Built(label="sketch, Adam's state", name="adam", projection=ProjectionConfig(**PLAIN), damping=1.0, adam=True),
)
UNPROJECTED = {"sketch": ("exact-dot", "exact-cosine", "exact-layers-dot"), "default": ("exact-layers-dot",)}
"""Exact scores, by the part whose metric they are in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is trained, built and evaluated."""

    data: Path
    val_set: Path
    folder: Path
    """Of the scored run and the store."""
    out: Path
    """Of the trainings on halves, and the exact products."""
    recipe: Recipe
    halves: int
    workers: int

    @property
    def store(self) -> Path:
        return self.folder / "store"


@dataclass(frozen=True, slots=True)
class Halved:
    """What was trained on, and what came of it."""

    kept_MN: NDArray[np.bool_]
    losses_VM: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """One score."""

    samples: Lds | None
    """None for scores that are kept for groups alone."""
    groups: Lds
    samples_of: dict[str, float]
    """By val group: the mean over its val samples."""
    seconds: float
    """Of scoring."""


def demo_files(folder: Path) -> tuple[Path, Path]:
    """The demo's corpus, and a val set of its domains and facts as prompts with completions."""
    corpus = read_corpus()
    write_jsonl(folder / "train.jsonl", corpus.train)
    write_jsonl(folder / "val.jsonl", val_rows(corpus))
    return folder / "train.jsonl", folder / "val.jsonl"


def val_rows(corpus: DemoCorpus) -> list[dict[str, str]]:
    rows = []
    for row in corpus.val_domains:
        *words, rest = row["text"].split(" ", PROMPT_WORDS)
        rows.append({"id": row["id"], "prompt": " ".join(words), "completion": f" {rest}", "domain": row["domain"]})
    questions = corpus.val_facts_paraphrased
    return rows + [
        {**{name: row[name] for name in ("id", "prompt", "completion")}, "domain": "facts"} for row in questions
    ]


def train_scored(setting: Setting) -> dict[int, Path]:
    """One training by the recipe, every sample scored against the whole val set: the checkpoint of each step kept."""
    tokenizer, recipe, output = setting.folder / "tokenizer", setting.recipe, setting.folder / "training"
    train_tokenizer(read_texts(setting.data)).save_pretrained(tokenizer)
    val = list(Corpus.open(str(setting.val_set)).samples())
    ghoststore.train(
        data=setting.data,
        val_set=setting.val_set,
        store=setting.store,
        name=RUN,
        output_dir=output,
        tokenizer=tokenizer,
        architecture="GPT2-Tiny",
        max_length=MAX_LENGTH,
        overlong="truncate",
        val_batch_size=len(val),
        val_refresh_interval=1,
        val_groups=all(sample.domain for sample in val),
        checkpoint_interval=max(1, recipe.max_steps // CHECKPOINTS),
        keep_checkpoints=None,
        eval_interval=recipe.max_steps,
        device="cpu",
        **asdict(recipe),
    )
    found = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*")}
    return dict(sorted(found.items()))


def build_parts(setting: Setting, checkpoints: dict[int, Path]) -> None:
    """Every part at the last checkpoint, some at all."""
    for built in PARTS:
        for step, checkpoint in checkpoints.items():
            if built.every or step == max(checkpoints):
                ghoststore.build(
                    checkpoint=checkpoint,
                    data=setting.data,
                    store=setting.store,
                    name=built.at(step),
                    max_length=MAX_LENGTH,
                    projection=built.projection,
                    proj_dtype=built.proj_dtype,
                    device="cpu",
                    optimizer_state=checkpoint if built.adam else None,
                )
                tell(f"built: {built.at(step)}")


class Bench:
    """The trainings on halves, and the scores that are compared with them."""

    def __init__(self, setting: Setting, steps: list[int]) -> None:
        self.setting, self.steps = setting, steps
        self.store = Store.open(setting.store)
        self.task = Task.of(
            self.store.part(PARTS[0].at(steps[-1])),
            str(setting.val_set),
            setting.out,
            fields=Fields(),
            max_val_samples=None,
            recipe=setting.recipe,
            behind=RebuiltOptions(),
            device="cpu",
            progress=Silent(),
        )

    def halved(self) -> Halved:
        """From the folder, or trained now."""
        samples, seed = self.task.samples, self.setting.recipe.seed
        kept = {f"half-{number:05d}": half(seed, number, samples) for number in range(self.setting.halves)}
        losses = losses_of(
            self.task.plan(kept), self.setting.out / "trainings", By(workers=self.setting.workers), Silent()
        )
        return Halved(np.stack(list(kept.values())), np.stack(list(losses.values()), axis=1))

    def scores(self) -> Iterator[tuple[str, str, Callable[[], Scored]]]:
        """(part, score, what computes it)."""
        last = self.steps[-1]
        for built in PARTS:
            for method, compute in self._methods([built.at(last)], SCORES, damping=built.damping).items():
                damping = f", damping {built.damping:g}" if method.startswith("preconditioned") else ""
                yield built.label, method + damping, compute
        for built in (built for built in PARTS if built.every and len(self.steps) > 1):
            for method, compute in self._methods([built.at(step) for step in reversed(self.steps)], ()).items():
                yield f"{built.label}, at {len(self.steps)} checkpoints", method, compute
        for name, methods in UNPROJECTED.items():
            (built,) = (built for built in PARTS if built.name == name)
            for method, compute in self._methods([built.at(last)], methods).items():
                yield "exact gradients" + built.label.removeprefix("sketch").removesuffix(" (default)"), method, compute
        run = self.store.run(RUN)
        for method, compute in self._methods([PARTS[0].at(last)], ("tf-idf", "random"), run=run).items():
            yield "–", method.partition(" ")[0], compute

    def _methods(
        self, parts: list[str], methods: tuple[str, ...], *, damping: float | None = None, run: Any = None
    ) -> dict[str, Callable[[], Scored]]:
        opened, weights = open_parts(self.setting.store, parts, None, Silent())
        base = Question(store=self.setting.store, val_set=self.setting.val_set, part=parts[0], each=True, device="cpu")
        task = replace(self.task, encoder=PartEncoder(opened[0], device="cpu"))
        return task.methods(base, opened, weights, methods, damping, run)

    def measure(self, compute: Callable[[], Scored], halved: Halved) -> Measured:
        """The LDS of one score: over val samples, over the mean losses of val groups, and of the samples of each."""
        began = time.perf_counter()
        scored = compute()
        seconds = time.perf_counter() - began
        kept_MN, losses_VM, places = halved.kept_MN, halved.losses_VM, self.task.places(scored)
        groups = lds(np.stack(list(scored.groups.values())), kept_MN, grouped(losses_VM, places))
        if scored.samples_VN is None:
            return Measured(None, groups, {}, seconds)
        each_V = spearman(scored.samples_VN @ kept_MN.T.astype(np.float64), -losses_VM)
        samples_of = {name: float(each_V[some].mean()) for name, some in self.task.groups.items()}
        return Measured(lds(scored.samples_VN, kept_MN, losses_VM), groups, samples_of, seconds)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shown(found: Lds | None) -> str:
    return "–" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def cells(part: str, score: str, found: Measured, groups: list[str]) -> dict[str, str]:
    """One row of the table."""
    by_group = {f"samples of {name}": f"{found.samples_of[name]:.3f}" if found.samples_of else "–" for name in groups}
    return {
        "part": part,
        "score": score,
        "val samples": shown(found.samples),
        "val groups": shown(found.groups),
        **by_group,
        "seconds": f"{found.seconds:.1f}",
    }


def add_table(results: Results, bench: Bench, halved: Halved) -> None:
    rows, numbers = [], {}
    groups = list(bench.task.groups)
    for part, score, compute in bench.scores():
        found = bench.measure(compute, halved)
        rows.append(cells(part, score, found, groups))
        numbers[f"{part}/{score}"] = asdict(found)
        tell(f"{part}, {score}: {shown(found.samples)}, groups {shown(found.groups)}")
    spread = float(halved.losses_VM.std(axis=1, ddof=1).mean())
    note = (
        f"LDS over {len(halved.kept_MN)} models, each trained on another random half of {bench.task.samples:,} "
        f"samples; {len(bench.task.ids)} val samples in {len(groups)} group(s). `val samples`: the mean over their "
        "losses; `val groups`: over the mean losses of groups; `samples of`: over the val samples of one. Intervals "
        "(95 %) resample the trainings. Preconditioned parts: the Kronecker preconditioner of a build; "
        "`preconditioned-dot`: the second moment of the stored rows, on top. Several checkpoints are weighted by their "
        "learning rates. `training-time`: Σ unit·score of the run, kept for groups alone. Exact gradients are computed "
        "for the first line of a metric, and serve the others. Between halves the loss of a val sample has a standard "
        f"deviation of {spread:.3f}."
    )
    results.add(Table("Linear datamodeling score", rows, note), lds=numbers, losses=halved.losses_VM.tolist())


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Training corpus; without it that of the demo."
)
@click.option("--val-set", type=click.Path(exists=True, path_type=Path), help="Val corpus, with --data.")
@click.option("--halves", type=int, default=60, show_default=True, help="Trainings on random halves.")
@click.option("--max-steps", type=int, default=200, show_default=True, help="Of every training.")
@click.option("--workers", type=int, default=2, show_default=True, help="Trainings at once.")
@click.option(
    "--trainings",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the trainings here, and take those that are there.",
)
@folders
def main(
    data: Path | None,
    val_set: Path | None,
    halves: int,
    max_steps: int,
    workers: int,
    trainings: Path | None,
    scratch: Path | None,
    out: Path,
) -> None:
    """Train a GPT2-Tiny, build its parts, train as many models on halves, and correlate scores with losses."""
    if (data is None) != (val_set is None):
        raise click.UsageError("give --data and --val-set, or neither")
    disable_progress_bar()
    torch.manual_seed(0)
    facts = machine_facts()
    with scratch_folder(scratch) as folder:
        used = demo_files(folder) if data is None or val_set is None else (data, val_set)
        setting = Setting(
            data=used[0],
            val_set=used[1],
            folder=folder,
            out=trainings or folder / "evaluation",
            recipe=Recipe(max_steps=max_steps),
            halves=halves,
            workers=workers,
        )
        checkpoints = train_scored(setting)
        tell(f"trained: {list(checkpoints)}")
        build_parts(setting, checkpoints)
        bench = Bench(setting, list(checkpoints))
        halved = bench.halved()
        results = Results(
            name="lds" if data is None else f"lds-{data.stem}",
            title="Linear datamodeling score by part and score",
            settings={
                "data": "the demo's corpus" if data is None else data.name,
                **({} if val_set is None else {"val set": val_set.name}),
                "halves": halves,
                **asdict(setting.recipe),
            },
            facts=facts,
        )
        add_table(results, bench, halved)
    results.write(out)


if __name__ == "__main__":
    main()
