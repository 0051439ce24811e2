"""``ghoststore.demo``: training, building and querying on a corpus whose answers are known.

The corpus is small, has several domains and planted facts. A small GPT-2 is trained on it, and each sample is scored
live against held-out samples of every domain. Then a store is built, and three questions are answered: Which training
samples helped each domain most? Are the rows nearest to the mean gradient of a domain's held-out samples of that
domain? Is the row nearest to the gradient of a question about a fact the one training row that states the fact?
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
from ghoststore.settings.shared import WeightOption
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
"""Content of the marker until the demo is finished; then it holds the report."""
MAX_LENGTH = 128
RUN, PART = "training", "demo"
VAL_REFRESH = 20
"""Number of steps that use the same val gradient."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of the questions whose source row is the nearest row (``at_1``) or among the ten nearest (``at_10``)."""

    questions: int
    at_1: float
    at_10: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What ``ghoststore.demo`` returns. All its files are in ``folder``."""

    folder: str
    rows: int
    planted: int
    final_loss: float
    """Mean training loss of the last 20 steps, nats a token."""
    val_loss: float
    scored: dict[str, Any]
    """About the training-time scores: ``negative_share``, ``share_of_time``, ``val_refresh_interval``, ``run``, and the
    ``weight`` of a step in ``values``.
    """
    values: dict[str, dict[str, float]]
    """For each val domain, the mean cumulative score Σ weight·s of a training sample of each domain."""
    domains: dict[str, dict[str, int]]
    """For each val domain, how many of the ten nearest rows are of each domain."""
    recall: dict[str, Recall]
    """Recall by ``<question set>/<method>``: see QUESTIONS and METHODS. The last method is TF-IDF."""
    chance_at_10: float
    """Recall at 10 of a random ranking."""
    examples: list[dict[str, Any]]
    """A few questions, each with its nearest row."""
    seconds: dict[str, float]
    plot: str
    scores_plot: str

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore demo --json`` prints."""
        return asdict(self)


@takes(DemoOptions)
def demo(options: DemoOptions) -> DemoReport:
    """Write the corpus, train a model and build a store in the folder ``out``; then answer the questions and plot them.

    Nothing is downloaded. It takes less than three minutes on two cores with the default ``rows`` and ``steps``.
    ``rows`` is how many of the 2,400 ordinary rows of the corpus to use; the 40 planted facts are always used. ``seed``
    is that of the training.

    Raises UsageError if ``out`` exists (with ``overwrite``, only if it is not a demo's folder), and for more ``rows``
    than the corpus has.
    """
    progress = options.progress or Silent()
    folder = Path(options.out)
    corpus = read_corpus(options.rows)
    with storage_errors(str(folder)):
        _claim(folder, options.overwrite)
    with exclusive(folder, f"the demo in {folder}", "out"):
        _clear(folder)
        return _run(folder, corpus, options, progress)


def _run(folder: Path, corpus: DemoCorpus, options: DemoOptions, progress: Progress) -> DemoReport:
    """Run the demo in the empty ``folder``."""
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
            recall[f"{name}/{method}"] = _recall(
                questions, [[hit.id for hit in ranking.hits] for ranking in result.results]
            )
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
            "weight": WeightOption.weight,
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
    """Make ``folder`` with the marker of a demo, or use the existing folder of a demo: an unfinished one, or any with
    ``overwrite``. UsageError for any other folder.
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
    """Remove all files but the marker, after setting it to unfinished."""
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
    """Write the corpus as jsonl files, one for each set and one for each val domain. Returns their paths by name."""
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
    """Train a tokenizer and a small GPT-2. Each training sample is scored against every val domain."""
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
    """For each val domain the mean Σ weight·s of the training samples of each domain."""
    means = {}
    for group in sorted({row["domain"] for row in corpus.val_domains}):
        result = scores(store=store, run=RUN, by="domain", group=group)
        means[group] = {str(entry.domain): float(entry.value_per_row or 0.0) for entry in result.domains or []}
    return means


def _ask_domains(store: Path, files: Mapping[str, Path], corpus: DemoCorpus) -> dict[str, dict[str, int]]:
    """For each val domain, how many of the ten rows nearest to its mean gradient are of each domain."""
    counts: dict[str, dict[str, int]] = {}
    for domain in sorted({row["domain"] for row in corpus.val_domains}):
        result = query(store=store, part=PART, val_set=files[f"val_{domain}"], top_k=10, text=False)
        nearest = [str(hit.domain) for hit in result.results[0].hits]
        counts[domain] = {name: nearest.count(name) for name in sorted({row["domain"] for row in corpus.train})}
    return counts


def _recall(questions: Sequence[Mapping[str, str]], nearest_ids: Sequence[Sequence[str]]) -> Recall:
    hits = [
        (ids[0] == question["source_id"], question["source_id"] in ids[:10])
        for question, ids in zip(questions, nearest_ids, strict=True)
    ]
    first, ten = np.mean(np.array(hits, dtype=np.float64), axis=0)
    return Recall(questions=len(hits), at_1=float(first), at_10=float(ten))


def _examples(questions: Sequence[Mapping[str, str]], results: Sequence[Any], count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "question": question["prompt"] + question["completion"],
            "nearest": result.hits[0].text,
            "score": result.hits[0].score,
            "nats": result.hits[0].nats,
            "is_source": result.hits[0].id == question["source_id"],
        }
        for question, result in list(zip(questions, results, strict=True))[:count]
    ]


def _plot(report: DemoReport, path: Path) -> None:
    """Draw three panels: the values of training samples for each val domain, the domains of the ten nearest rows, and
    the recall of the planted facts beside that of TF-IDF and of chance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 4.6), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    shares = {val: _shares(values) for val, values in report.values.items()}
    _draw_heat_map(first, shares, "{:.2f}", (0.0, 1.0))
    first.set_title("While training: cumulative score of a sample,\nas a share of the highest")
    first.set(xlabel="domain of the sample", ylabel="scored against the val domain")
    _draw_heat_map(second, report.domains, "{:.0f}", (0, 10))
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
    """``values`` divided by the largest; all 0 if no value is positive."""
    largest = max(values.values())
    return {name: value / largest if largest > 0 else 0.0 for name, value in values.items()}


def _draw_heat_map(axes: Any, grid: Mapping[str, Mapping[str, float]], form: str, limits: tuple[float, float]) -> None:
    """Draw ``grid`` as a heat map in shades of blue, with its numbers. Its keys are the rows."""
    names = sorted({name for row in grid.values() for name in row})
    numbers = np.array([[row[name] for name in names] for row in grid.values()])
    axes.imshow(numbers, cmap="Blues", vmin=limits[0], vmax=limits[1])
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(grid)), list(grid))
    for (y, x), value in np.ndenumerate(numbers):
        color = "white" if value > sum(limits) / 2 else "black"
        axes.text(x, y, form.format(value), ha="center", va="center", color=color)
