"""``ghoststore.evaluate``: do the scores of a store predict the effect of training with or without some samples?"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghoststore.checkpoint.find import find_folder
from ghoststore.checkpoint.in_memory import as_folders
from ghoststore.checkpoint.load import load_model, resolve_device
from ghoststore.corpus import Fields, source_name, source_of
from ghoststore.errors import UsageError
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import part_of, takes
from ghoststore.settings.measure import LEXICAL, METHODS, EvaluateOptions
from ghoststore.settings.option import check_at_least
from ghoststore.settings.shared import Data
from ghoststore.store import Part, Store
from ghoststore.store.part.metric import default_metric
from indexer.training.patch import Patch
from indexer.training.retrain import Recipe
from query.ask.question import Question
from query.evaluate.lds import Lds, half, lds, lds_difference
from query.evaluate.predictors import EXACT, WITH_WORDS, grouped
from query.evaluate.removal import Removal, removal_of, without_best
from query.evaluate.tail_patch import TailPatch, TailPatches
from query.evaluate.task import Scored, Task
from query.evaluate.trainings import By, losses_of
from query.search.parts import note_repeated, open_parts
from query.search.unions import refuse_united

TESTS = ("lds", "removal", "tail-patch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The LDS of one method: for the losses of single val samples, and for the mean losses of groups of them."""

    method: str
    samples: Lds | None
    """None for a method that scores only the whole val set, or only its groups."""
    groups: Lds
    """Over the domains of the val set, or over the whole val set if it has no domains."""
    words_add: Lds | None = None
    """Of a method with words: ``samples`` less those of the method without, an interval by the same resamples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReport:
    """What ``ghoststore.evaluate`` returns: for each of ``tests`` one entry for each method."""

    store: str
    out: str
    settings: dict[str, Any]
    lds: list[Evaluated]
    removal: list[Removal]
    tail_patch: list[TailPatch]

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore evaluate --json`` prints."""
        return asdict(self)


@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> EvaluateReport:
    """Test the scores of each of ``methods`` by training models. `docs/evaluate.md` explains the tests.

    ``tests`` are any of three. ``lds`` trains ``halves`` models on random halves of the corpus and correlates sums of
    scores with their losses. ``removal`` trains without the share ``drop`` of the samples, those that each method ranks
    highest, and ``repeats`` times without as many random ones. ``tail-patch`` takes one step from the part's checkpoint
    on the ``top_k`` best samples of each val group, and ``repeats`` times on random ones.

    The models have the architecture of the part's checkpoint and new weights. They are trained on the part's corpus for
    ``max_steps`` steps of ``batch_size`` samples, by ``workers`` processes at once (default: one for each processor, at
    most 4; 1 on a GPU). Results are kept in ``out``: an interrupted call continues there, and a call with other methods
    uses the same trainings.

    ``exact-dot`` and ``exact-cosine`` score by the exact gradients of all parameters; ``exact-layers-dot`` and
    ``exact-layers-cosine`` by those of the part's layers. They take one backward pass a sample, together for all four,
    and are computed only if ``methods`` names one of them.

    ``lexical`` adds each method of the part's vectors once more, blended with BM25 at this weight: ``dot+bm25``, ….
    Without it that is done for the method by which ``ghoststore.query`` ranks, at 0.1; with 0 for none.

    If ``part`` names several parts, the methods are those of the first one. ``checkpoints-dot`` and
    ``checkpoints-cosine`` then are the sums over all, weighted by ``part_weights`` as in ``ghoststore.query``. ``run``
    names a training run of the store, whose values (Σ ``weight`` × score) are evaluated, too.

    Raises UsageError for unknown names and numbers out of range, MismatchError if the corpus has changed or ``out``
    holds another evaluation, and what ``ghoststore.query`` raises.
    """
    _refuse(options)
    with as_folders(options.checkpoint, options.tokenizer, options.progress) as (checkpoint, tokenizer):
        return _evaluate(replace(options, checkpoint=checkpoint, tokenizer=tokenizer))


def _evaluate(options: EvaluateOptions) -> EvaluateReport:
    progress = options.progress or Silent()
    device = resolve_device(options.device)
    parts, weights = open_parts(options.store, options.part, options.part_weights, progress)
    refuse_united(parts, "an evaluation")
    task = _task(options, parts[0], device, progress)
    workers = options.workers
    if workers is None and options.engine is None:
        workers = 1 if device.startswith("cuda") else min(4, os.cpu_count() or 1)
    note_repeated(task.part, progress)
    score_of = task.methods(
        _question(options, task, device),
        parts,
        weights,
        options.methods,
        options.damping,
        None if options.run is None else Store.open(options.store).run(options.run),
        _with_words(options, task.part),
        options.weight,
    )
    trainings = _Trainings(
        task,
        Path(options.out) / "trainings",
        By(workers=workers, ray=options.engine == "ray", ray_address=options.ray_address),
    )
    masks = {f"half-{number:05d}": half(options.seed, number, task.samples) for number in range(options.halves)}
    halved = trainings.losses(masks) if "lds" in options.tests else {}
    scored: dict[str, Scored] = {}
    correlations = []
    last: Scored | None = None
    """Before a method with words: the one without."""
    for method, compute in score_of.items():
        scores = compute()
        if "lds" in options.tests:
            correlations.append(_lds_of(task, method, scores, np.stack(list(masks.values())), halved, last))
        last = scores if method + WITH_WORDS in score_of else None
        scored[method] = replace(scores, samples_VN=None)  # (V, N) is large
    settings = {
        "tests": list(options.tests),
        "halves": options.halves,
        "drop": options.drop,
        "top_k": options.top_k,
        "repeats": options.repeats,
        "lexical": _lexical(options) if any(method.endswith(WITH_WORDS) for method in score_of) else None,
        "weight": None if options.run is None else options.weight,
    }
    return EvaluateReport(
        store=str(options.store),
        out=str(options.out),
        settings={**_facts(task, options.val_set), **settings, **asdict(task.retrainer.job.recipe)},
        lds=correlations,
        removal=_removals(trainings, scored, options.drop, options.repeats) if "removal" in options.tests else [],
        tail_patch=_tail_patches(task, scored, options.top_k, options.repeats) if "tail-patch" in options.tests else [],
    )


def _task(options: EvaluateOptions, part: Part, device: str, progress: Progress) -> Task:
    """The task with which the scores of ``part`` are tested."""
    return Task.of(
        part,
        source_of(options.val_set),
        Path(options.out),
        fields=options.fields or Fields(),
        max_val_samples=options.max_val_samples,
        recipe=part_of(Recipe, options),
        behind=options,
        device=device,
        progress=progress,
    )


def _question(options: EvaluateOptions, task: Task, device: str) -> Question:
    """The question that the methods vary: a score for each val sample."""
    return Question(
        store=options.store,
        val_set=options.val_set,
        part=task.part.name,
        each=True,
        fields=options.fields,
        max_samples=options.max_val_samples,
        lexical=_lexical(options),
        device=device,
    )


def _lexical(options: EvaluateOptions) -> float | None:
    """The weight of words; None for none."""
    return (LEXICAL if options.lexical is None else options.lexical) or None


def _with_words(options: EvaluateOptions, part: Part) -> Sequence[str]:
    """The methods that are blended with words, too: all if a weight was given, else that by which a query ranks."""
    if options.lexical is not None:
        return options.methods if options.lexical else ()
    return [default_metric(part.manifest["projection"])]


def _facts(task: Task, val_set: Data) -> dict[str, Any]:
    """The settings of the report that describe the part and the val set."""
    return {
        "part": task.part.name,
        "repeated_ids": task.part.repeated_ids,
        "val_set": source_name(val_set),
        "val_samples": len(task.ids),
        "samples": task.samples,
        "groups": {name: len(places) for name, places in task.groups.items()},
    }


def _refuse(options: EvaluateOptions) -> None:
    """UsageError for unknown names and for numbers out of range."""
    for parameter, names, choices in (
        ("tests", options.tests, TESTS),
        ("methods", options.methods, (*METHODS, *EXACT)),
    ):
        unknown = [name for name in names if name not in choices]
        if unknown:
            raise UsageError(f"`{parameter}` {unknown[0]!r} is unknown; known: {', '.join(choices)}")
    if not options.tests:
        raise UsageError(f"`tests` is empty: give at least one of {', '.join(TESTS)}")
    if options.weight != EvaluateOptions.weight and options.run is None:
        raise UsageError(f"`weight={options.weight}` is what a step of a training run counts with: give `run`")
    if not 0 < options.drop < 1:
        raise UsageError(f"`drop` must be above 0 and below 1, not {options.drop}")
    check_at_least(3, halves=options.halves)
    check_at_least(
        1, top_k=options.top_k, repeats=options.repeats, max_steps=options.max_steps, workers=options.workers
    )


@dataclass(frozen=True, slots=True)
class _Trainings:
    """Trains models, or reads the losses of earlier trainings from ``folder``."""

    task: Task
    folder: Path
    by: By

    def losses(self, kept: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.float64]]:
        """(V,) for each name: the val losses after training on the samples ``kept[name]``."""
        return losses_of(self.task.plan(kept), self.folder, self.by, self.task.progress)


def _lds_of(
    task: Task,
    method: str,
    scored: Scored,
    kept_MN: NDArray[np.bool_],
    halved: Mapping[str, NDArray[np.float64]],
    without_words: Scored | None,
) -> Evaluated:
    losses_VM = np.stack(list(halved.values()), axis=1)
    words_add = None
    if without_words is not None and without_words.samples_VN is not None and scored.samples_VN is not None:
        words_add = lds_difference(scored.samples_VN, without_words.samples_VN, kept_MN, losses_VM)
    return Evaluated(
        method=method,
        samples=None if scored.samples_VN is None else lds(scored.samples_VN, kept_MN, losses_VM),
        groups=lds(np.stack(list(scored.groups.values())), kept_MN, grouped(losses_VM, task.places(scored))),
        words_add=words_add,
    )


def _removals(trainings: _Trainings, scored: Mapping[str, Scored], drop: float, repeats: int) -> list[Removal]:
    """The removal test of each method, with one training each and ``repeats`` random ones."""
    task = trainings.task
    count = max(1, round(drop * task.samples))
    rng = np.random.default_rng(task.retrainer.job.recipe.seed)
    random = {
        f"without-random-{count}-{repeat}": without_best(rng.standard_normal(task.samples), count)
        for repeat in range(repeats)
    }
    best = {method: without_best(scores.whole_N, count) for method, scores in scored.items() if method != "random"}
    names = {method: f"without-{_file_name(method)}-{count}" for method in best}
    losses = trainings.losses({**random, **{names[method]: mask for method, mask in best.items()}})
    return [
        removal_of(method, losses[names[method]], [losses[name] for name in random], task.groups) for method in best
    ]


def _tail_patches(task: Task, scored: Mapping[str, Scored], top_k: int, repeats: int) -> list[TailPatch]:
    """The tail patch of each method, from the checkpoint of the part."""
    retrainer = task.retrainer
    model = load_model(find_folder(retrainer.job.model_folder, beside_adapter=True), device=retrainer.job.device)
    patch = Patch(model, retrainer.rows, retrainer.val)
    seed = retrainer.job.recipe.seed
    patches = {}
    results = []
    for method, scores in scored.items():
        if method == "random":
            continue
        places = task.places(scores)
        key = tuple(places)
        if key not in patches:
            patches[key] = TailPatches(patch, places, count=top_k, repeats=repeats, seed=seed)
        results.append(patches[key].of(method, np.stack(list(scores.groups.values()))))
    return results


def _file_name(method: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in method)
