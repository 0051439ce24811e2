"""What scores are evaluated on: the corpus of a part, a val set, and the scores themselves.

Legend: V val samples, G val groups, N samples of the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint.load import find_checkpoint
from ghoststore.corpus import Fields
from ghoststore.progress import Progress
from ghoststore.store import Part, Run
from indexer.tokenize.tokenize import tokenize
from indexer.training.inputs import is_shards
from indexer.training.retrain import Recipe, Retrainer, Retraining
from query.ask.blend import values_of_rows
from query.ask.encoder import load_for
from query.ask.question import Question
from query.common.texts import corpus_behind
from query.common.unchanged import read_unchanged
from query.evaluate.exact import ExactScores
from query.evaluate.predictors import BASELINES, EXACT, GRADIENTS, by_sample, grouped, of_chance, of_gradients, of_words
from query.evaluate.trainings import Plan

WHOLE = "all"
"""The group of a whole val set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What one method says of every sample of the corpus."""

    whole_N: NDArray[np.float64]
    """For the whole val set."""
    groups: dict[str, NDArray[np.float64]]
    """(N,) for each val group, or for ``WHOLE`` alone where scores are not kept by our groups."""
    samples_VN: NDArray[np.float64] | None
    """For each val sample, where there is such a score."""
    by_group: bool = True
    """Whether ``groups`` are the val set's own; else the one there stands for the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Made by :meth:`of`."""

    part: Part
    retrainer: Retrainer
    groups: dict[str, list[int]]
    """Places of val samples, by domain."""
    out: Path
    progress: Progress

    @classmethod
    def of(
        cls,
        part: Part,
        val_set: str,
        out: Path,
        *,
        fields: Fields,
        max_val_samples: int | None,
        recipe: Recipe,
        device: str,
        progress: Progress,
    ) -> Task:
        """Check the model and the corpus behind ``part``, tokenize it once (into ``out``), read the val set.

        MismatchError if one of them is not the one that the part was built from any more.
        """
        load_for(part, None, device)  # trainings take its configuration, its weights and its tokenizer from the folder
        deque(read_unchanged(corpus_behind(part), part, progress), maxlen=0)
        source, kept = part.manifest["source"], part.manifest["corpus"]
        model = find_checkpoint(source["checkpoint"]).folder
        tokenizer = Path(source["tokenizer"]) if source["tokenizer"] else model
        shards = Path(source["data"])
        if not is_shards(str(shards)):
            shards = out / "tokens"
            names = ("text", "prompt", "completion", "messages", "id", "domain")
            tokenize(
                data=source["data"],
                tokenizer=tokenizer,
                out=shards,
                max_samples=kept["max_samples"],
                fields=Fields(**{name: kept["fields"].get(name) for name in names}),
                progress=progress,
            )
        retrainer = Retrainer(
            Retraining(
                model_folder=str(model),
                tokenizer_folder=str(tokenizer),
                shards=str(shards),
                val_set=val_set,
                fields=fields,
                max_val_samples=max_val_samples,
                max_length=part.manifest["tokens"]["max_length"],
                recipe=recipe,
                device=device,
            )
        )
        groups: dict[str, list[int]] = {}
        for place in range(len(retrainer.val.rows)):
            groups.setdefault(retrainer.val.domain_of(place), []).append(place)
        return cls(part=part, retrainer=retrainer, groups=dict(sorted(groups.items())), out=out, progress=progress)

    @property
    def samples(self) -> int:
        """N."""
        return len(self.retrainer.shards.length)

    @property
    def ids(self) -> list[str]:
        """Of the val samples."""
        return [row.sample.id for row in self.retrainer.val.rows]

    @property
    def places_in_val(self) -> list[int]:
        """Of the val samples: their places in the val set, from 0."""
        return [row.sample.source_row for row in self.retrainer.val.rows]

    def plan(self, kept: Mapping[str, NDArray[np.bool_]]) -> Plan:
        """Trainings on the samples ``kept``, by name, and what their results are of."""
        manifest, job = self.part.manifest, self.retrainer.job
        identity = {
            "corpus": manifest["corpus"]["fingerprint"],
            "tokenizer": manifest["tokenizer"]["fingerprint"],
            "val": self.retrainer.val.fingerprint,
            "architecture": (Path(job.model_folder) / "config.json").read_text(),
        }
        return Plan(job=job, identity=identity, kept=kept)

    def methods(
        self, base: Question, several: Mapping[str, Any], methods: Sequence[str], damping: float | None, run: Run | None
    ) -> dict[str, Callable[[], Scored]]:
        """By method, what computes its scores. ``several`` are the parts, and their weights, of ``checkpoints-…``.

        UsageError for a method that the part cannot have.
        """

        def gradients(**settings: Any) -> Callable[[], Scored]:
            if "precondition" in settings:
                settings["damping"] = damping
            question = replace(base, **settings)
            return lambda: self._of_samples(of_gradients(question, self.places_in_val, self.samples, self.progress))

        found = {method: gradients(**GRADIENTS[method]) for method in methods if method in GRADIENTS}
        if len(several["part"]) > 1:
            found |= {f"checkpoints-{metric}": gradients(**several, metric=metric) for metric in ("dot", "cosine")}
        found |= self._exact(base, [method for method in methods if method in EXACT])
        texts = [row.sample.preview() for row in self.retrainer.val.rows]
        seed = self.retrainer.job.recipe.seed
        baselines: dict[str, Callable[[], Scored]] = {
            "tf-idf": lambda: self._of_samples(of_words(corpus_behind(self.part), texts, self.samples)),
            "random": lambda: self._of_samples(of_chance(len(texts), self.samples, seed)),
        }
        found |= {method: baselines[method] for method in BASELINES if method in methods}
        return found if run is None else {**found, f"training-time ({run.name})": lambda: self._of_run(run)}

    def _exact(self, base: Question, methods: Sequence[str]) -> dict[str, Callable[[], Scored]]:
        scores = ExactScores(
            part=self.part,
            question=base,
            ids=self.ids,
            places=self.places_in_val,
            val_fingerprint=self.retrainer.val.fingerprint,
            samples=self.samples,
            folder=self.out / "exact",
            progress=self.progress,
        )

        def exact(method: str) -> Callable[[], Scored]:
            scores.refuse(method)
            return lambda: self._of_samples(scores.of(method))

        return {method: exact(method) for method in methods}

    def _of_samples(self, scores_VN: NDArray[np.float64]) -> Scored:
        by_group = grouped(scores_VN, self.groups)
        return Scored(
            whole_N=scores_VN.mean(0), groups=dict(zip(self.groups, by_group, strict=True)), samples_VN=scores_VN
        )

    def _of_run(self, run: Run) -> Scored:
        """Σ η·score of a training run: by val group where it keeps them for ours, else for the whole val set.

        Groups of the same names are ours only where the run's val set is; one of another is evaluated whole, and noted.
        """

        def values(group: str | None) -> NDArray[np.float64]:
            of_rows = values_of_rows(self.part, run, self.progress, group).value
            return np.asarray(by_sample(of_rows[None], self.part, self.samples)[0])

        whole_N = values(None)
        same_val = run.manifest["val"].get("fingerprint") == self.retrainer.val.fingerprint
        if not same_val:
            self.progress.note(
                f"run {run.name!r} was scored against another val set than the one that is evaluated: its values are "
                "taken for the whole of it"
            )
        if same_val and set(self.groups) <= set(run.layout.groups):
            return Scored(whole_N=whole_N, groups={name: values(name) for name in self.groups}, samples_VN=None)
        return Scored(whole_N=whole_N, groups={WHOLE: whole_N}, samples_VN=None, by_group=False)

    def places(self, scored: Scored) -> dict[str, list[int]]:
        """The val samples of each group of ``scored``."""
        if scored.by_group:
            return self.groups
        (name,) = scored.groups  # it may be called as one of the groups is
        return {name: list(range(len(self.retrainer.val.rows)))}
