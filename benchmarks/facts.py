"""Does the gradient of a question find the one training row that states the answer? By every kind of score, beside
TF-IDF: asked in the row's words, in other words, and in words of which none stands in the row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Results, Table, machine_facts

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import GhostStoreError
from query.demo.demo import MAX_LENGTH, QUESTIONS
from query.evaluate.tf_idf import TfIdf

CUTS = (1, 10)
COLUMNS = {"facts": "its words", "facts_paraphrased": "other words", "facts_inflected": "no shared word"}
SCORES: dict[str, dict[str, Any]] = {
    "dot": {"metric": "dot"},
    "cosine": {"metric": "cosine"},
    **{
        f"preconditioned {metric}, damping {damping:g}": {
            "metric": metric,
            "precondition": "second-moment",
            "damping": damping,
        }
        for metric in ("dot", "cosine")
        for damping in (1.0, 0.1, 0.01)
    },
}

RAW = "none"
PLAIN = ProjectionConfig(rank_total=256, precondition=RAW)
FLOAT32 = {"proj_dtype": "float32"}

STORE = "facts-store"

Rows = list[dict[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One part: how its vectors are made."""

    label: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    adam: bool = False


BUILDS = (
    Build(label="default: preconditioned, sketched, 2,048 bits a layer", name="default"),
    Build(label="the same, 256 numbers of int8", name="default-int8", settings={"proj_dtype": "int8"}),
    Build(label="the same, 64 numbers of float32", name="default-float32", settings=FLOAT32),
    Build(
        label="preconditioned, plain blocks, 256 a layer, int8",
        name="kronecker256-int8",
        settings={"projection": ProjectionConfig(rank_total=256), "proj_dtype": "int8"},
    ),
    Build(
        label="principal directions, 64 a layer",
        name="pca",
        settings={"projection": ProjectionConfig(kind="pca", precondition=RAW), **FLOAT32},
    ),
    Build(
        label="sketched together, 64 a layer",
        name="sketched",
        settings={"projection": ProjectionConfig(precondition=RAW), **FLOAT32},
    ),
    Build(
        label="plain blocks, 64 a layer",
        name="plain64",
        settings={"projection": ProjectionConfig(rank_total=64, precondition=RAW), **FLOAT32},
    ),
    Build(label="plain blocks, 256 a layer", name="plain256", settings={"projection": PLAIN, **FLOAT32}),
    Build(
        label="plain blocks, 256 a layer, int8",
        name="plain256-int8",
        settings={"projection": PLAIN, "proj_dtype": "int8"},
    ),
    Build(label="sketched together, with Adam's state", name="sketched-adam", settings=FLOAT32, adam=True),
    Build(
        label="plain blocks, 256, with Adam's state",
        name="plain256-adam",
        settings={"projection": PLAIN, **FLOAT32},
        adam=True,
    ),
)


ByCut = dict[int, float]


def recall(questions: Rows, found: list[list[str]]) -> ByCut:
    """By cut: the share of questions whose source is among so many nearest."""
    return {
        cut: float(np.mean([q["source_id"] in ids[:cut] for q, ids in zip(questions, found, strict=True)]))
        for cut in CUTS
    }


def cells(label: str, score: str, size: str, by_model: list[dict[str, ByCut]]) -> dict[str, str]:
    """One row of the table: means over models, and of recall at 1 the least and the largest."""

    def shown(name: str) -> str:
        of_cut = [[by_set[name][cut] for by_set in by_model] for cut in CUTS]
        means = " / ".join(f"{np.mean(shares):.2f}" for shares in of_cut)
        return means if len(by_model) == 1 else f"{means} ({min(of_cut[0]):.2f} to {max(of_cut[0]):.2f})"

    return {
        "part": label,
        "ranked by": score,
        "bytes a row": size,
        **{COLUMNS[name]: shown(name) for name in QUESTIONS},
    }


@dataclass(slots=True)
class Lines:
    """What was found of each part and score, model by model."""

    sizes: dict[tuple[str, str], str] = field(default_factory=dict)
    """Bytes a row by (part, score)."""
    found: dict[tuple[str, str], list[dict[str, ByCut]]] = field(default_factory=dict)

    def add(self, label: str, score: str, size: str, by_set: dict[str, ByCut]) -> None:
        self.sizes[label, score] = size
        self.found.setdefault((label, score), []).append(by_set)


def ask(demo: Path, part: str, settings: dict[str, Any]) -> dict[str, ByCut]:
    """Recall by set of questions of a part of the demo's store."""
    found = {}
    for name in QUESTIONS:
        answer = ghoststore.query(
            store=demo / STORE, part=part, val_set=demo / f"{name}.jsonl", each=True, top_k=max(CUTS), text=False,
            **settings,
        )  # fmt: skip
        found[name] = recall(rows_of(demo, name), [[hit.id for hit in one.hits] for one in answer.results])
    return found


def rows_of(demo: Path, name: str) -> Rows:
    return [json.loads(line) for line in (demo / f"{name}.jsonl").read_text().splitlines()]


def add_parts(lines: Lines, demo: Path) -> None:
    """Every part, ranked by every score that it can be ranked by."""
    (checkpoint,) = sorted((demo / "training").glob("checkpoint-*"))[-1:]
    for built in BUILDS:
        ghoststore.build(
            checkpoint=checkpoint,
            data=demo / "train.jsonl",
            store=demo / STORE,
            name=built.name,
            max_length=MAX_LENGTH,
            batch_tokens=4096,
            optimizer_state=checkpoint if built.adam else None,
            **built.settings,
        )
        (described,) = ghoststore.info(demo / STORE, part=built.name).parts
        for score, settings in SCORES.items():
            try:
                lines.add(built.label, score, f"{described.row_bytes:,}", ask(demo, built.name, settings))
            except GhostStoreError as error:
                click.echo(f"{built.label}, {score}: {error}", err=True)


def by_words(demo: Path) -> dict[str, ByCut]:
    """Recall by set of questions of TF-IDF."""
    train = rows_of(demo, "train")
    words, found = TfIdf([row["text"] for row in train]), {}
    for name in QUESTIONS:
        asked = rows_of(demo, name)
        nearest = words.nearest(words.vectors(q["prompt"] + q["completion"] for q in asked), max(CUTS))
        found[name] = recall(asked, [[train[row]["id"] for row in rows] for rows in nearest])
    return found


@click.command()
@click.argument("demos", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results", show_default="results/"
)
def main(demos: tuple[Path, ...], out: Path) -> None:
    """DEMOS are folders of `ghoststore demo --seed N`: corpus, models and questions are theirs."""
    lines = Lines()
    for demo in demos:
        add_parts(lines, demo)
    lines.add("–", "TF-IDF, words alone", "", by_words(demos[0]))
    results = Results(
        name="facts",
        title="Finding the row that states a fact",
        settings={
            "rows": len(rows_of(demos[0], "train")),
            "facts": len(rows_of(demos[0], "facts")),
            "models": len(demos),
        },
        facts=machine_facts(),
    )
    note = (
        "Recall at 1 / at 10, means over the models, which differ in the seed of their training (recall at 1 of the "
        "worst to the best). The standard error of a share near 0.5 of 40 facts is 0.08."
    )
    rows = [cells(*line, lines.sizes[line], found) for line, found in lines.found.items()]
    numbers = {" / ".join(line): found for line, found in lines.found.items()}
    results.add(Table("Recall of the source row", rows, note), **numbers)
    results.write(out)


if __name__ == "__main__":
    main()
