"""``ghoststore.evaluate``: do a store's scores predict what training without some of the samples does?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint import find_checkpoint, resolve_device
from ghoststore.corpus import Fields
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.store import Part, Store
from indexer.tokenize import tokenize
from indexer.training.inputs import is_shards
from indexer.training.retrain import Recipe, Retrainer, Retraining
from query.blend import values_of_rows
from query.corpus_check import read_unchanged
from query.evaluate.lds import Lds, lds
from query.evaluate.predictors import (
    BASELINES,
    GRADIENTS,
    METHODS,
    by_sample,
    grouped,
    of_chance,
    of_gradients,
    of_words,
)
from query.evaluate.trainings import Plan, losses_of_halves
from query.parts import PartWeights, part_names
from query.question import Question
from query.texts import corpus_behind

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One method. LDS of the losses of single val samples, and of the mean losses of groups of them."""

    method: str
    samples: Lds | None
    """None for scores that are kept for the val set, or its groups, alone."""
    groups: Lds
    """By domain of the val set, or the whole of it where it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReport:
    """What ``ghoststore.evaluate`` found."""

    store: str
    out: str
    settings: dict[str, Any]
    loss: dict[str, float]
    """Over the trainings, mean val loss: its mean, and the standard deviation between halves."""
    results: list[Evaluated]

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore evaluate --json`` prints."""
        return asdict(self)


def evaluate(
    *,
    store: str | Path,
    val_set: str | Path,
    out: str | Path,
    part: str | Sequence[str] | None = None,
    part_weights: PartWeights | None = None,
    run: str | None = None,
    methods: Sequence[str] = METHODS,
    halves: int = 20,
    max_steps: int = 200,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    damping: float | None = None,
    fields: Fields | None = None,
    max_val_samples: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> EvaluateReport:
    """The linear datamodeling score of each of ``methods``: see `query.evaluate.lds`.

    ``halves`` models of the architecture of the part's checkpoint are trained anew, each on another random half of the
    corpus that the part was built from, for ``max_steps`` steps of ``batch_size`` samples, by ``workers`` processes at
    once (default: as many as processors, at most 4; 1 on a GPU). What each loses on each val sample is kept in ``out``:
    the same call goes on where it was interrupted, and asks other methods without training again.

    With several names as ``part``, methods are those of the first, and ``checkpoints-dot`` and ``checkpoints-cosine``
    of all together, weighted by ``part_weights`` as in ``ghoststore.query``. ``run`` is a training run of the store,
    whose values (Σ η·score) are evaluated, too.

    Raises UsageError for unknown methods and counts that make no sense, MismatchError if the corpus has changed or
    ``out`` is of another evaluation, and what ``ghoststore.query`` raises.
    """
    progress = progress or Silent()
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UsageError(f"--method {unknown[0]!r} is unknown; known: {', '.join(METHODS)}")
    for option, value, least in (("--halves", halves, 3), ("--max-steps", max_steps, 1), ("--workers", workers, 1)):
        if value is not None and value < least:
            raise UsageError(f"{option} must be at least {least}, not {value}")
    device = resolve_device(device)
    folder = Path(out)
    task = _Task.of(
        Store.open(store).part(part_names(part)[0]), str(val_set), folder, fields or Fields(), max_val_samples,
        Recipe(max_steps=max_steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed), device, progress,
    )  # fmt: skip
    plan = task.plan(halves, seed)
    if workers is None:
        workers = 1 if device.startswith("cuda") else min(4, os.cpu_count() or 1)
    losses_VM = losses_of_halves(plan, folder / "halves", workers, progress)
    base = Question(
        store=store, val_set=val_set, part=task.part.name, each=True, fields=fields, max_samples=max_val_samples,
        device=device,
    )  # fmt: skip
    several = {"part": part_names(part), "part_weights": part_weights}
    scores = task.scores(base, several, methods, damping, seed, progress)
    results = [task.result(method, of(), plan.kept(), losses_VM) for method, of in scores.items()]
    if run is not None:
        results.append(task.of_run(store, run, plan.kept(), losses_VM, progress))
    means_M = losses_VM.mean(0)
    return EvaluateReport(
        store=str(store), out=str(folder), loss={"mean": float(means_M.mean()), "deviation": float(means_M.std())},
        settings={
            "part": task.part.name, "val_set": str(val_set), "val_samples": len(task.ids), "samples": plan.samples,
            "groups": {name: len(places) for name, places in task.groups.items()}, "halves": halves,
            **asdict(plan.job.recipe),
        },
        results=results,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What all methods are evaluated on."""

    part: Part
    job: Retraining
    ids: list[str]
    """Of the val samples."""
    texts: list[str]
    groups: dict[str, list[int]]
    """Places of val samples, by domain."""
    samples: int
    val_fingerprint: str

    @classmethod
    def of(
        cls, part: Part, val_set: str, out: Path, fields: Fields, max_val_samples: int | None, recipe: Recipe,
        device: str, progress: Progress,
    ) -> _Task:  # fmt: skip
        """Check the corpus, tokenize it once, read the val set."""
        corpus = corpus_behind(part)
        read_unchanged(corpus, part, lambda sample: None, progress)
        source = part.manifest["source"]
        model = find_checkpoint(source["checkpoint"]).folder
        tokenizer = Path(source["tokenizer"]) if source["tokenizer"] else model
        shards = Path(source["data"])
        if not is_shards(str(shards)):
            shards = out / "tokens"
            kept = part.manifest["corpus"]
            names = ("text", "prompt", "completion", "messages", "id", "domain")
            tokenize(
                data=source["data"], tokenizer=tokenizer, out=shards, max_samples=kept["max_samples"],
                fields=Fields(**{name: kept["fields"].get(name) for name in names}), progress=progress,
            )  # fmt: skip
        job = Retraining(
            model_folder=str(model), tokenizer_folder=str(tokenizer), shards=str(shards), val_set=val_set,
            fields=fields, max_val_samples=max_val_samples, max_length=part.manifest["tokens"]["max_length"],
            recipe=recipe, device=device,
        )  # fmt: skip
        retrainer = Retrainer(job)
        rows = retrainer.val.rows
        groups: dict[str, list[int]] = {}
        for place in range(len(rows)):
            groups.setdefault(retrainer.val.domain_of(place), []).append(place)
        return cls(
            part=part, job=job, ids=[row.sample.id for row in rows], texts=[row.sample.preview() for row in rows],
            groups=dict(sorted(groups.items())), samples=len(retrainer.shards.length),
            val_fingerprint=retrainer.val.fingerprint,
        )  # fmt: skip

    def plan(self, halves: int, seed: int) -> Plan:
        """The trainings, and what their results are of."""
        manifest = self.part.manifest
        identity = {
            "corpus": manifest["corpus"]["fingerprint"], "tokenizer": manifest["tokenizer"]["fingerprint"],
            "val": self.val_fingerprint, "architecture": (Path(self.job.model_folder) / "config.json").read_text(),
        }  # fmt: skip
        return Plan(job=self.job, identity=identity, samples=self.samples, seed=seed, halves=halves)

    def scores(
        self, base: Question, several: dict[str, Any], methods: Sequence[str], damping: float | None, seed: int,
        progress: Progress,
    ) -> dict[str, Callable[[], Scores]]:  # fmt: skip
        """By method, what gives its (V, N) scores: one at a time in memory."""

        def gradients(**settings: Any) -> Callable[[], Scores]:
            if "precondition" in settings:
                settings["damping"] = damping
            question = replace(base, **settings)
            return lambda: of_gradients(question, self.ids, self.samples, progress)

        found = {method: gradients(**GRADIENTS[method]) for method in methods if method in GRADIENTS}
        if len(several["part"]) > 1:
            found |= {f"checkpoints-{metric}": gradients(**several, metric=metric) for metric in ("dot", "cosine")}
        baselines: dict[str, Callable[[], Scores]] = {
            "tf-idf": lambda: of_words(corpus_behind(self.part), self.texts, self.samples),
            "random": lambda: of_chance(len(self.ids), self.samples, seed),
        }
        return found | {method: baselines[method] for method in BASELINES if method in methods}

    def result(self, method: str, scores_VN: Scores, kept_MN: NDArray[np.bool_], losses_VM: Scores) -> Evaluated:
        """The LDS of one method."""
        return Evaluated(
            method=method, samples=lds(scores_VN, kept_MN, losses_VM),
            groups=lds(grouped(scores_VN, self.groups), kept_MN, grouped(losses_VM, self.groups)),
        )  # fmt: skip

    def of_run(
        self, store: str | Path, name: str, kept_MN: NDArray[np.bool_], losses_VM: Scores, progress: Progress
    ) -> Evaluated:
        """The LDS of a training run's values: by val group where it keeps them for ours, else for the whole val set."""
        run = Store.open(store).run(name)
        groups = self.groups if set(self.groups) <= set(run.layout.groups) else {"all": list(range(len(self.ids)))}
        scores = [
            by_sample(values_of_rows(self.part, run, progress, None if group == "all" else group).value[None],
                      self.part, self.samples)[0]
            for group in groups
        ]  # fmt: skip
        return Evaluated(
            method=f"training-time ({name})", samples=None,
            groups=lds(np.stack(scores), kept_MN, grouped(losses_VM, groups)),
        )  # fmt: skip
