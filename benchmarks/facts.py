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


def recall(questions: Rows, found: list[list[str]]) -> dict[int, float]:
    """By cut: the share of questions whose source is among so many nearest."""
    return {
        cut: float(np.mean([q["source_id"] in ids[:cut] for q, ids in zip(questions, found, strict=True)]))
        for cut in CUTS
    }


def cells(label: str, score: str, size: str, by_set: dict[str, dict[int, float]]) -> dict[str, str]:
    """One row of the table."""
    shown = {COLUMNS[name]: " / ".join(f"{by_set[name][cut]:.2f}" for cut in CUTS) for name in QUESTIONS}
    return {"part": label, "ranked by": score, "bytes a row": size, **shown}


@click.command()
@click.argument("demo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results", show_default="results/"
)
def main(demo: Path, out: Path) -> None:
    """DEMO is the folder of a `ghoststore demo`: its corpus, its model and its questions are used."""
    train = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]
    questions = {name: [json.loads(line) for line in (demo / f"{name}.jsonl").open()] for name in QUESTIONS}
    (checkpoint,) = sorted((demo / "training").glob("checkpoint-*"))[-1:]
    store, rows = demo / "facts-store", []
    numbers: dict[str, Any] = {}

    def ask(part: str, settings: dict[str, Any]) -> dict[str, dict[int, float]]:
        found = {}
        for name, asked in questions.items():
            answer = ghoststore.query(
                store=store,
                part=part,
                val_set=demo / f"{name}.jsonl",
                each=True,
                top_k=max(CUTS),
                text=False,
                **settings,
            )
            found[name] = recall(asked, [[hit.id for hit in one.hits] for one in answer.results])
        return found

    for built in BUILDS:
        ghoststore.build(
            checkpoint=checkpoint,
            data=demo / "train.jsonl",
            store=store,
            name=built.name,
            max_length=MAX_LENGTH,
            batch_tokens=4096,
            optimizer_state=checkpoint if built.adam else None,
            **built.settings,
        )
        (described,) = ghoststore.info(store, part=built.name).parts
        for score, settings in SCORES.items():
            try:
                found = ask(built.name, settings)
            except GhostStoreError as error:
                click.echo(f"{built.label}, {score}: {error}", err=True)
                continue
            rows.append(cells(built.label, score, f"{described.row_bytes:,}", found))
            numbers[f"{built.name}/{score}"] = found
    words = TfIdf([row["text"] for row in train])
    by_words = {
        name: recall(
            asked,
            [
                [train[row]["id"] for row in nearest]
                for nearest in words.nearest(words.vectors(q["prompt"] + q["completion"] for q in asked), max(CUTS))
            ],
        )
        for name, asked in questions.items()
    }
    rows.append(cells("–", "TF-IDF, words alone", "", by_words))
    results = Results(
        name="facts",
        title="Finding the row that states a fact",
        settings={"rows": len(train), "facts": len(questions["facts"])},
        facts=machine_facts(),
    )
    note = "Recall at 1 / at 10. One model, one seed: the standard error of a share near 0.5 is 0.08."
    results.add(Table("Recall of the source row", rows, note), **numbers, words=by_words)
    results.write(out)


if __name__ == "__main__":
    main()
