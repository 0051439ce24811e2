"""``ghoststore.demo``: the whole story on a corpus whose answers are known.

A small multi-domain corpus with planted facts; a small GPT-2 trained on it, each sample scored live against held-out
samples of every domain; a store built; and three questions asked of it: which training samples helped each domain
most, does the mean gradient of held-out samples of a domain point at that domain, and does the gradient of a question
about a fact point at the one training row that states it?
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.hidden_errors import own_errors
from ghoststore.progress import Progress, Silent
from ghoststore.settings.keywords import takes
from ghoststore.settings.measure import DemoOptions
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.store import Store
from ghoststore.store.base.disk import create_whole, exclusive, replace, storage_errors
from ghoststore.store.base.writers import FOLDER as WRITERS
from indexer.build.build import build
from indexer.build.report import BuildReport
from indexer.training.train import TrainReport, train
from query.answer.query import query
from query.common.output import save_picture
from query.demo.corpus import DemoCorpus, read_corpus, write_jsonl
from query.demo.tokenizer import train_tokenizer
from query.evaluate.tf_idf import TfIdf
from query.training_scores.plots import plot_scores
from query.training_scores.scores import scores

MARKER = "demo.json"
UNFINISHED = b"{}\n"
"""What the marker holds until the demo has its report."""
MAX_LENGTH = 128
RUN, PART = "training", "demo"
VAL_REFRESH = 20
"""Steps for which a val gradient is used."""
QUESTIONS = {
    "facts": "in nearly the source's words",
    "facts_paraphrased": "in other words",
    "facts_inflected": "in other words, names inflected",
}
METHODS: dict[str, dict[str, Any]] = {
    "cosine": {"metric": "cosine"},
    "dot": {"metric": "dot"},
}
WORDS = "TF-IDF, words alone"
PROJECTION = ProjectionConfig(compress=4096)
"""256 numbers a layer, four times the default: single facts are told apart better, and the corpus is small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of questions whose one true source row is among the k nearest rows."""

    questions: int
    at_1: float
    at_10: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What the demo measured. Every file it made is under ``folder``."""

    folder: str
    rows: int
    planted: int
    final_loss: float
    """Mean training loss of the last 20 steps, nats a token."""
    val_loss: float
    scored: dict[str, Any]
    """Of the training-time scores: ``negative_share``, ``share_of_time``, ``val_refresh_interval``, ``run``."""
    values: dict[str, dict[str, float]]
    """For each val domain, the mean cumulative score Σ η·s of a training sample of each domain."""
    domains: dict[str, dict[str, int]]
    """For each val domain, how many of the ten nearest rows are of each domain."""
    recall: dict[str, Recall]
    """By ``<question set>/<method>``, see QUESTIONS and METHODS; the last method is TF-IDF."""
    chance_at_10: float
    """Recall at 10 of a random ranking."""
    examples: list[dict[str, Any]]
    """A few questions with the row that came first."""
    seconds: dict[str, float]
    plot: str
    scores_plot: str

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore demo --json`` prints."""
        return asdict(self)


@takes(DemoOptions)
def demo(options: DemoOptions) -> DemoReport:
    """Write the corpus, train a model and build a store under ``out``, ask the questions, plot the answers.

    Nothing is downloaded. Under three minutes on two cores with the default ``rows`` and ``steps``. ``rows`` is how
    many of the corpus's 2400 ordinary rows are used; its 40 planted facts always are. ``seed`` is the training's.
    Raises UsageError if ``out`` exists, unless ``overwrite`` is given and a demo made it, and for ``rows`` that the
    corpus does not have.
    """
    progress = options.progress or Silent()
    folder = Path(options.out)
    corpus = read_corpus(options.rows)
    with storage_errors(str(folder)):
        _claim(folder, options.overwrite)
    with exclusive(folder, f"the demo in {folder}", "out"):
        _clear(folder)
        return _tell_story(folder, corpus, options, progress)


def _tell_story(folder: Path, corpus: DemoCorpus, options: DemoOptions, progress: Progress) -> DemoReport:
    """Everything, into the ``folder``, which is empty."""
    with storage_errors(str(folder)):
        files = _write_corpus(folder, corpus)
    clock = time.perf_counter()
    store = folder / "store"
    trained = _train(folder, files, corpus, options.steps, options.seed, progress)
    assert trained.checkpoint is not None
    seconds = {"training with scores": time.perf_counter() - clock}
    clock = time.perf_counter()
    built: BuildReport = build(
        checkpoint=trained.checkpoint,
        data=files["train"],
        store=store,
        name=PART,
        max_length=MAX_LENGTH,
        batch_tokens=4096,
        projection=PROJECTION,
        proj_dtype="int8",
        progress=progress,
    )
    seconds["build"] = time.perf_counter() - clock
    clock = time.perf_counter()
    values = _values(store, corpus)
    plot_scores(Store.open(store).run(RUN), folder / "scores.png")
    domains = _ask_domains(store, files, corpus)
    recall: dict[str, Recall] = {}
    examples: list[dict[str, Any]] = []
    words = TfIdf([row["text"] for row in corpus.train])
    for name in QUESTIONS:
        questions = getattr(corpus, f"val_{name}")
        for method, settings in METHODS.items():
            result = query(store=store, part=PART, val_set=files[name], each=True, top_k=10, **settings)
            recall[f"{name}/{method}"] = _recall(questions, [[hit.id for hit in one.hits] for one in result.results])
        by_words = words.nearest(words.vectors(q["prompt"] + q["completion"] for q in questions), 10)
        recall[f"{name}/{WORDS}"] = _recall(questions, [[corpus.train[row]["id"] for row in rows] for rows in by_words])
        examples += _examples(questions, result.results) if name == "facts_paraphrased" else []
    seconds["queries"] = time.perf_counter() - clock
    report = DemoReport(
        folder=str(folder),
        rows=built.rows,
        planted=len(corpus.val_facts),
        domains=domains,
        final_loss=float(trained.train_loss or np.nan),
        val_loss=float(trained.val_loss or np.nan),
        scored={
            "run": RUN,
            "negative_share": trained.negative_share,
            "share_of_time": trained.score_share,
            "val_refresh_interval": VAL_REFRESH,
        },
        values=values,
        recall=recall,
        chance_at_10=10 / built.rows,
        examples=examples,
        seconds=seconds,
        plot=str(folder / "demo.png"),
        scores_plot=str(folder / "scores.png"),
    )
    _plot(report, folder / "demo.png")
    with storage_errors(str(folder)):
        replace(folder / MARKER, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    return report


def _claim(folder: Path, overwrite: bool) -> None:
    """Make ``folder``, new and marked as a demo's, or take that of a demo: one that was interrupted, or any with
    ``overwrite``. UsageError if that would touch anything else.
    """
    if folder.exists():
        marker = folder / MARKER
        if not marker.is_file():
            raise UsageError(f"{folder} was not made by the demo (it has no {MARKER}); it is left alone")
        if not overwrite and marker.read_bytes() != UNFINISHED:
            raise UsageError(f"{folder} exists; give `out` another path, or `overwrite` to make that demo again")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    create_whole(folder, lambda begun: replace(begun / MARKER, UNFINISHED))


def _clear(folder: Path) -> None:
    """Remove all but the marker, which says from now on that the demo is not finished."""
    with storage_errors(str(folder)):
        replace(folder / MARKER, UNFINISHED)
        for entry in folder.iterdir():
            if entry.name in (MARKER, WRITERS):
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _write_corpus(folder: Path, corpus: DemoCorpus) -> dict[str, Path]:
    """The corpus as jsonl files, by name; each val domain has one of its own."""
    sets = {"train": corpus.train, **{name: getattr(corpus, f"val_{name}") for name in QUESTIONS}}
    sets["val"] = corpus.val_domains
    for row in corpus.val_domains:
        sets.setdefault(f"val_{row['domain']}", []).append(row)
    paths = {name: folder / f"{name}.jsonl" for name in sets}
    for name, rows in sets.items():
        write_jsonl(paths[name], rows)
    return paths


def _train(
    folder: Path, files: Mapping[str, Path], corpus: DemoCorpus, steps: int, seed: int, progress: Progress
) -> TrainReport:
    """A tokenizer, and a small GPT-2 whose samples are scored against every val domain while it trains."""
    with storage_errors(str(folder)), own_errors():
        train_tokenizer(row["text"] for row in corpus.train).save_pretrained(folder / "tokenizer")
    return train(
        data=files["train"],
        val_set=files["val"],
        store=folder / "store",
        name=RUN,
        output_dir=folder / "training",
        tokenizer=folder / "tokenizer",
        architecture="GPT2-Tiny",
        max_length=MAX_LENGTH,
        batch_size=16,
        max_steps=steps,
        learning_rate=3e-3,
        adam_beta2=0.99,
        weight_decay=0.01,
        eval_interval=steps,
        val_batch_size=32,
        val_refresh_interval=VAL_REFRESH,
        val_groups=True,
        keep_checkpoints=1,
        seed=seed,
        progress=progress,
    )


def _values(store: Path, corpus: DemoCorpus) -> dict[str, dict[str, float]]:
    """For each val domain, the mean Σ η·s of the training samples of each domain."""
    found = {}
    for group in sorted({row["domain"] for row in corpus.val_domains}):
        result = scores(store=store, run=RUN, by="domain", group=group)
        found[group] = {str(entry.domain): float(entry.value_per_row or 0.0) for entry in result.domains or []}
    return found


def _ask_domains(store: Path, files: Mapping[str, Path], corpus: DemoCorpus) -> dict[str, dict[str, int]]:
    """For each val domain, the domains of the ten rows nearest to its mean gradient."""
    counts: dict[str, dict[str, int]] = {}
    for domain in sorted({row["domain"] for row in corpus.val_domains}):
        result = query(store=store, part=PART, val_set=files[f"val_{domain}"], top_k=10, text=False)
        found = [str(hit.domain) for hit in result.results[0].hits]
        counts[domain] = {name: found.count(name) for name in sorted({row["domain"] for row in corpus.train})}
    return counts


def _recall(questions: Sequence[Mapping[str, str]], found: Sequence[Sequence[str]]) -> Recall:
    hits = [
        (ids[0] == question["source_id"], question["source_id"] in ids[:10])
        for question, ids in zip(questions, found, strict=True)
    ]
    first, ten = np.mean(np.array(hits, dtype=np.float64), axis=0)
    return Recall(questions=len(hits), at_1=float(first), at_10=float(ten))


def _examples(questions: Sequence[Mapping[str, str]], results: Sequence[Any], count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "question": question["prompt"] + question["completion"],
            "nearest": result.hits[0].text,
            "score": result.hits[0].score,
            "is_source": result.hits[0].id == question["source_id"],
        }
        for question, result in list(zip(questions, results, strict=True))[:count]
    ]


def _plot(report: DemoReport, path: Path) -> None:
    """Three panels: what training samples did for each val domain, domains of the ten nearest rows, and recall of the
    planted facts beside words and chance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4.6), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    shares = {val: _shares(values) for val, values in report.values.items()}
    _heat(first, shares, "{:.2f}", (0.0, 1.0))
    first.set_title("While training: cumulative score of a sample,\nas a share of the highest")
    first.set(xlabel="domain of the sample", ylabel="scored against the val domain")
    _heat(second, report.domains, "{:.0f}", (0, 10))
    second.set_title("After training: the ten rows nearest to\na val domain's mean gradient")
    second.set(xlabel="domain of the row", ylabel="val domain")
    labels = [f"{words}\nat {k}" for words in ("same words,", "other words,", "no shared words,") for k in (1, 10)]
    places = np.arange(len(labels))
    shown = (("cosine", "#9ec1e6"), ("dot", "#1f5fa8"), (WORDS, "#b8b8b8"))
    for place, (method, color) in enumerate(shown):
        values = [getattr(report.recall[f"{name}/{method}"], at) for name in QUESTIONS for at in ("at_1", "at_10")]
        bars = third.bar(places + 0.28 * (place - 1), values, 0.27, label=method, color=color)
        third.bar_label(bars, fmt="%.2f", fontsize=7)
    chance = report.chance_at_10
    third.axhline(chance, color="black", linewidth=0.8, linestyle=":", label=f"chance at 10 ({chance:.3f})")
    third.set_xticks(places, labels, fontsize=8)
    third.set(ylim=(0, 1.3), title=f"The source rows of {report.planted} planted facts", ylabel="recall")
    third.legend(loc="upper center", ncols=4, fontsize=8, frameon=False)
    save_picture(figure, path, dpi=120, over=True)


def _shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each value divided by the largest."""
    largest = max(values.values())
    return {name: value / largest if largest > 0 else 0.0 for name, value in values.items()}


def _heat(axes: Any, grid: Mapping[str, Mapping[str, float]], form: str, limits: tuple[float, float]) -> None:
    """Numbers of ``grid``, rows by its keys, on shades of blue."""
    names = sorted({name for row in grid.values() for name in row})
    numbers = np.array([[row[name] for name in names] for row in grid.values()])
    axes.imshow(numbers, cmap="Blues", vmin=limits[0], vmax=limits[1])
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(grid)), list(grid))
    for (y, x), value in np.ndenumerate(numbers):
        color = "white" if value > sum(limits) / 2 else "black"
        axes.text(x, y, form.format(value), ha="center", va="center", color=color)
