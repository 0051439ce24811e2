"""What do words add to gradients? LDS and recall of planted facts of the default part's scores blended with BM25, by
weight and by fusion: z-scores, reciprocal ranks, shares of ranks; on two corpora, the same trainings for all.

Legend: V val samples, N samples of the corpus, M halves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Results, Table, machine_facts
from frontier import Case, Judge
from lds import MAX_LENGTH, shown
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, Store
from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent
from query.ask.hybrid import Hybrid
from query.ask.lexical import WordIndex, words_of
from query.ask.question import Question
from query.ask.scorer import open_scorer
from query.common.rank_correlation import mean_ranks, spearman
from query.demo.corpus import read_corpus
from query.demo.demo import QUESTIONS
from query.demo.tokenizer import train_tokenizer
from query.evaluate.lds import LEVEL, RESAMPLES
from query.evaluate.tf_idf import TfIdf
from query.search.vectors import PartVectors

Scores = NDArray[np.float64]
DEFAULT = "onebit (default)"
WEIGHTS = tuple(place / 10 for place in range(11))
METRICS = ("dot", "cosine")
WORDINGS = {"facts": "its words", "facts_paraphrased": "other words", "facts_inflected": "no shared word"}
TRAINING = {"batch_size": 16, "max_steps": 700, "learning_rate": 3e-3, "adam_beta2": 0.99, "weight_decay": 0.01}
"""The demo's."""


def by_z(similarity_VN: Scores, words_VN: Scores, weight: float) -> Scores:
    return Hybrid.of(similarity_VN, words_VN, weight).scores


def by_reciprocal_ranks(similarity_VN: Scores, words_VN: Scores, weight: float) -> Scores:
    """Ties have the mean of their ranks."""
    return (1 - weight) / (60 + ranks(similarity_VN)) + weight / (60 + ranks(words_VN))


def by_shares(similarity_VN: Scores, words_VN: Scores, weight: float) -> Scores:
    return -((1 - weight) * ranks(similarity_VN) + weight * ranks(words_VN))


def ranks(scores_VN: Scores) -> Scores:
    """From 1, the best."""
    return mean_ranks(-scores_VN)


FUSIONS: dict[str, Callable[[Scores, Scores, float], Scores]] = {
    "z-scores": by_z,
    "reciprocal ranks": by_reciprocal_ranks,
    "shares of ranks": by_shares,
}


def scores_of(part: Any, val_set: Path) -> dict[str, Scores]:
    """(V, N) for each metric; those of a val sample up to a factor."""
    question = Question(
        store=part.path.parent.parent, val_set=val_set, part=part.name, each=True, metric="dot", device="cpu"
    )
    with open_corpus(str(val_set), Fields()) as corpus:
        queries_VD = open_scorer(question, [part], [1.0], corpus, Silent()).terms[0].queries_QD
    rows_ND = PartVectors(part).gather(np.arange(part.layout.rows))
    dot_VN = (queries_VD.float() @ rows_ND.t()).double().numpy()
    return {"dot": dot_VN, "cosine": dot_VN / rows_ND.norm(dim=1).double().clamp_min(1e-30).numpy()}


def texts_of(path: Path) -> list[str]:
    return [sample.preview() for sample in Corpus.open(str(path)).samples()]


def value(judge: Judge, scores_VN: Scores) -> float:
    return float(spearman(scores_VN @ judge.kept_MN.T.astype(np.float64), -judge.losses_VM).mean())


def gain(judge: Judge, scores_VN: Scores, than_VN: Scores) -> str:
    """The difference of two LDS, with the interval of its resamples."""
    predicted, than = (scores @ judge.kept_MN.T.astype(np.float64) for scores in (scores_VN, than_VN))
    actual, rng = -judge.losses_VM, np.random.default_rng(0)
    differences = []
    for place in range(RESAMPLES + 1):
        chosen = rng.integers(0, len(judge.kept_MN), len(judge.kept_MN)) if place else np.arange(len(judge.kept_MN))
        values = [spearman(x[:, chosen], actual[:, chosen]).mean() for x in (predicted, than)]
        differences.append(float(values[0] - values[1]))
    low, high = np.quantile(differences[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return f"{differences[0]:+.3f} ({low:+.3f} to {high:+.3f})"


def prediction(case: Case, judge: Judge) -> tuple[list[dict[str, str]], dict[str, str], dict[str, Any]]:
    """(a row a weight, the baselines, numbers): LDS of one corpus."""
    similarity, index = scores_of(case.built(DEFAULT), case.val_set), WordIndex(texts_of(case.data))
    val = texts_of(case.val_set)
    words = np.stack([index.scores(text) for text in val])
    once = np.stack([index.scores(" ".join(dict.fromkeys(words_of(text)))) for text in val])
    tf_idf = TfIdf(texts_of(case.data))
    cosines = (tf_idf.vectors(val) @ tf_idf.rows.T).astype(np.float64)
    baselines = {
        "BM25": shown(judge.of(words)),
        "BM25, each word once": shown(judge.of(once)),
        "TF-IDF": shown(judge.of(cosines)),
    }
    rows, numbers = [], {}
    for weight in WEIGHTS:
        blends = {
            (name, metric): fusion(similarity[metric], words, weight)
            for name, fusion in FUSIONS.items()
            for metric in METRICS
        }
        values = {key: value(judge, scores) for key, scores in blends.items()}
        rows.append(
            {
                "weight": f"{weight:g}",
                "dot": shown(judge.of(blends["z-scores", "dot"])),
                "less that of gradients": gain(judge, blends["z-scores", "dot"], similarity["dot"]) if weight else "",
                "cosine": f"{values['z-scores', 'cosine']:.3f}",
                **{f"{name}, dot": f"{values[name, 'dot']:.3f}" for name in list(FUSIONS)[1:]},
            }
        )
        numbers[f"{weight:g}"] = {" ".join(key): number for key, number in values.items()}
    return rows, baselines, numbers


def planted(folder: Path, case: Case) -> Path:
    """A folder like the demo's: its facts among the rows of ``case``, a model trained on both; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    if not (folder / "training").exists():
        facts = [{"id": row["id"], "text": row["text"]} for row in corpus.train if row["id"].startswith("facts-")]
        rows = [json.loads(line) for line in case.data.read_text().splitlines()]
        rows = [{"id": row["id"], "text": row["text"]} for row in rows] + facts
        order = np.random.default_rng(0).permutation(len(rows))
        write(folder / "train.jsonl", [rows[place] for place in order])
        for name in QUESTIONS:
            write(folder / f"{name}.jsonl", getattr(corpus, f"val_{name}"))
        train_tokenizer(row["text"] for row in rows).save_pretrained(folder / "tokenizer")
        ghoststore.train(
            data=folder / "train.jsonl", val_set=folder / "facts.jsonl", output_dir=folder / "training",
            tokenizer=folder / "tokenizer", architecture="GPT2-Tiny", max_length=MAX_LENGTH, overlong="truncate",
            method="Regular", eval_interval=700, keep_checkpoints=1, device="cpu", progress=Silent(), **TRAINING,
        )  # fmt: skip
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recall(folder: Path, work: Path) -> list[dict[str, str]]:
    """A row a metric, fusion and weight: at 1 / at 10, of each wording."""
    (checkpoint,) = sorted((folder / "training").glob("checkpoint-*"))[-1:]
    ghoststore.build(
        checkpoint=checkpoint, data=folder / "train.jsonl", store=work, name=folder.name, max_length=MAX_LENGTH,
        device="cpu", progress=Silent(),
    )  # fmt: skip
    part = Store.open(work).part(folder.name)
    index = WordIndex(texts_of(folder / "train.jsonl"))
    ids = [json.loads(line)["id"] for line in (folder / "train.jsonl").read_text().splitlines()]
    cases = {}
    for name in WORDINGS:
        path = folder / f"{name}.jsonl"
        sources = [ids.index(json.loads(line)["source_id"]) for line in path.read_text().splitlines()]
        cases[name] = (scores_of(part, path), np.stack([index.scores(text) for text in texts_of(path)]), sources)
    rows = []
    for metric in METRICS:
        for fusion in list(FUSIONS)[:2]:
            for weight in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
                row = {"ranked by": metric, "fusion": fusion, "weight": f"{weight:g}"}
                for name, (similarity, words, sources) in cases.items():
                    scores_VN = FUSIONS[fusion](similarity[metric], words, weight)
                    place_V = ranks(scores_VN)[np.arange(len(sources)), sources]
                    row[WORDINGS[name]] = f"{(place_V <= 1).mean():.2f} / {(place_V <= 10).mean():.2f}"
                rows.append(row)
    return rows


@click.command()
@click.option(
    "--work", type=(str, click.Path(exists=True, path_type=Path)), multiple=True, required=True,
    help="Name of a corpus, and the folder that `frontier.py --work` made for it; repeated.",
)  # fmt: skip
@click.option(
    "--demo", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of a `ghoststore demo`."
)
@click.option("--facts", type=click.Path(path_type=Path), required=True, help="New folder for the facts in real text.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(work: tuple[tuple[str, Path], ...], demo: Path, facts: Path, out: Path) -> None:
    """Blend the default part's scores with BM25."""
    disable_progress_bar()
    results = Results(
        name="hybrid",
        title="Words beside gradients",
        settings={"part": "default", "corpora": [name for name, _ in work], "weights": list(WEIGHTS)},
        facts=machine_facts(),
    )
    for name, folder in work:
        case, losses = Case(folder, 0, 1), np.load(folder / "halved.npz")
        judge = Judge(losses["kept"], losses["losses"])
        rows, baselines, numbers = prediction(case, judge)
        note = "; ".join(f"{label} {value}" for label, value in baselines.items())
        sizes = f"{judge.kept_MN.shape[1]:,} samples, {len(judge.losses_VM)} val samples, {len(judge.kept_MN)} halves"
        results.add(
            Table(f"LDS by weight: {name}", rows, f"{sizes}. {note}."),
            **{f"lds {name}": numbers, f"words {name}": baselines},
        )
    mixed = planted(facts, Case(work[-1][1], 0, 1))
    for label, folder in (("the demo's corpus", demo), (f"the facts among the rows of {work[-1][0]}", mixed)):
        rows = recall(folder, facts / "store")
        results.add(
            Table(f"Recall of planted facts: {label}", rows, "At 1 / at 10, of 40 facts."), **{f"recall {label}": rows}
        )
    results.write(out)


if __name__ == "__main__":
    main()
