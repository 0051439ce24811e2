"""Does what predicts best depend on the val set? LDS by domain of the val rows: of the default part by damping and by
the size of its blocks, of exact gradients by metric, of words, of both, and with each row's targets as its weight.

On the trainings of ``benchmarks/frontier.py``, whose val set has domains here.

Legend: V val samples, N samples of the corpus, D numbers, M halves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, machine_facts
from frontier import Case, Judge, dense, in_metrics, loaded
from hybrid import scores_of, texts_of
from lds import shown
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent
from query.ask.hybrid import Hybrid
from query.ask.lexical import WordIndex
from query.ask.question import Question
from query.ask.scorer import open_scorer
from query.ask.second_stage import Reranking, exact_scores
from query.evaluate.lds import lds_difference
from query.evaluate.tf_idf import TfIdf

Scores = NDArray[np.float64]
DEFAULT = "default"
LARGER = "blocks of 128 × 128"
WHOLE: dict[str, Any] = {"rank_total": "full", "precondition": "kronecker"}
PARTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    **{f"damping {damping:g}": {"damping": damping} for damping in (0.03, 0.01, 0.003)},
    **{
        f"{LARGER}, damping {damping:g}": {"rank_total": 128 * 128, "damping": damping} for damping in (0.1, 0.03, 0.01)
    },
    **{f"whole blocks, damping {damping:g}": WHOLE | {"damping": damping} for damping in (0.1, 0.03)},
    f"{LARGER}, all their signs, damping 0.01": {"rank_total": 128 * 128, "compress": "none", "damping": 0.01},
}
"""By the options of a projection. Blocks are sketched to the bytes of the default, unless all signs are kept."""
METRICS = dict.fromkeys(("K-FAC", "EK-FAC"), (0.1, 0.01, 0.001))
STAGES = (0.1, 0.01)
SAMPLES = 256
"""That the metric of exact gradients is learned from, as that of a part is."""
BLENDED = (DEFAULT, "damping 0.03")
WEIGHTS = (0.1, 0.2, 0.3)
"""Of words."""


def built(case: Case, label: str) -> Any:
    options = dict(PARTS[label])
    if "rank_total" in options and "compress" not in options:
        options |= {"compress": built(case, DEFAULT).layout.dimension, "compress_by": "layer"}
    return case.built(f"by-domain-{label}", {"projection": ProjectionConfig(**options)})


def of_parts(case: Case) -> Iterator[tuple[str, Scores]]:
    """Each part's, and those of words beside two of them."""
    index, val = WordIndex(texts_of(case.data)), texts_of(case.val_set)
    words_VN = np.stack([index.scores(text) for text in val])
    for label in PARTS:
        part = built(case, label)
        scores = scores_of(part, case.val_set)
        yield label, scores["dot"]
        if label in BLENDED:
            yield f"{label}, cosine", scores["cosine"]
            targets_N = np.maximum(part.read("n_tokens", 0, part.layout.rows).astype(np.float64) - 1, 0)
            for power, name in ((0.5, "the root of its targets"), (1.0, "its targets")):
                yield f"{label}, a row times {name}", scores["dot"] * targets_N**power
            for weight in WEIGHTS:
                yield f"{label}, `--lexical {weight:g}`", Hybrid.of(scores["dot"], words_VN, weight).scores
    yield "BM25", words_VN
    words = TfIdf(texts_of(case.data))
    yield "TF-IDF", (words.vectors(val) @ words.rows.T).astype(np.float64)


def of_second_stage(case: Case) -> Iterator[tuple[str, Scores]]:
    """Those of ``query --rerank`` with every row as a candidate: the part's own factors."""
    part = built(case, DEFAULT)
    rows = part.row_numbers[part.usable()]
    asked = Question(store=case.folder / "parts-store", val_set=case.val_set, part=part.name, each=True, device="cpu")
    with open_corpus(str(case.val_set), Fields()) as val_set:
        scorer = open_scorer(asked, [part], [1.0], val_set, Silent(), keep_model=True)
        for damping in STAGES:
            of_rows = exact_scores(scorer, Reranking(rerank=len(rows), rerank_damping=damping), rows, Silent())
            scores = np.zeros((len(of_rows), part.layout.rows))
            scores[:, rows] = of_rows
            yield f"`--rerank` of all rows, damping {damping:g}", scores


def of_exact(case: Case) -> Iterator[tuple[str, Scores]]:
    """Those of whole gradients of the default's layers, by metric."""
    model, train, val, layers = loaded(case)
    usable_N = np.array([row.status.usable for row in train])
    targets_N = np.array([max(len(row.tokens) - 1, 0) for row in train], dtype=np.float64)
    sums: dict[str, Scores] = {}
    for layer in layers:
        of_layer = partial(dense, model, layer=layer)
        rows_NOI, val_VOI = of_layer([row for row in train if row.status.usable]), of_layer(val)
        for name, x_NOI, y_VOI in in_metrics(rows_NOI, val_VOI, SAMPLES, METRICS):
            scores = np.zeros((len(val), len(train)))
            scores[:, usable_N] = (y_VOI.flatten(1) @ x_NOI.flatten(1).t()).numpy()
            sums[name] = sums.get(name, 0) + scores
    for name, scores in sums.items():
        yield f"exact, {name}", scores
        yield f"exact, {name}, a row times its targets", scores * targets_N


def sizes(case: Case) -> list[dict[str, str]]:
    """Of each part, as it lies on the disk."""
    described = [ghoststore.info(case.folder / "parts-store", part=built(case, label).name).parts[0] for label in PARTS]
    return [{"part": label, "bytes a row": f"{part.row_bytes:,}"} for label, part in zip(PARTS, described, strict=True)]


def domains_of(case: Case) -> dict[str, NDArray[np.int64]]:
    """The places of the val rows of each domain, all of them first; where each row is a group, by ``of``."""
    rows = [json.loads(line) for line in case.val_set.read_text().splitlines()]
    domains = [row.get("of") or row.get("domain") for row in rows]
    every = {"all": np.arange(len(domains))}
    return every | {
        str(name): np.array([place for place, domain in enumerate(domains) if domain == name])
        for name in sorted({name for name in domains if name})
    }


@click.command()
@click.option("--name", default="demo", show_default=True, help="Of the results.")
@click.option("--work", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the trainings.")
@click.option("--halves", type=int, default=48, show_default=True, help="Trainings on random halves.")
@click.option("--workers", type=int, default=2, show_default=True, help="Trainings at once.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(name: str, work: Path, halves: int, workers: int, out: Path) -> None:
    """Compare ways by domain of the val rows."""
    disable_progress_bar()
    torch.manual_seed(0)
    case = Case(work, halves, workers)
    case.prepare()
    trainings = np.load(work / "halved.npz")
    kept_MN, losses_VM = trainings["kept"], trainings["losses"]
    domains, first = domains_of(case), None
    values: list[dict[str, str]] = []
    differences: list[dict[str, str]] = []
    numbers: dict[str, dict[str, float]] = {}
    for label, scores_VN in (*of_parts(case), *of_second_stage(case), *of_exact(case)):
        first = scores_VN if first is None else first
        of = {domain: Judge(kept_MN, losses_VM[rows]).of(scores_VN[rows]) for domain, rows in domains.items()}
        less = {
            domain: lds_difference(scores_VN[rows], first[rows], kept_MN, losses_VM[rows])
            for domain, rows in domains.items()
        }
        values.append({"way": label} | {domain: shown(value) for domain, value in of.items()})
        if first is not scores_VN:
            differences.append({"way": label} | {domain: shown(value) for domain, value in less.items()})
        numbers[label] = {domain: value.value for domain, value in of.items()}
    results = Results(
        name=f"by-domain-{name}",
        title="What predicts best, by domain of the val rows",
        settings={
            "corpus": name,
            "samples": kept_MN.shape[1],
            "val samples": {domain: len(rows) for domain, rows in domains.items()},
            "halves": len(kept_MN),
        },
        facts=machine_facts(),
    )
    results.add(Table("LDS", values, "95 % intervals by resampling the trainings."), lds=numbers)
    results.add(Table("LDS less that of the default", differences, "By resampling the trainings for both at once."))
    results.add(Table("Bytes of a row", sizes(case), "Of all layers, with what else a row has."))
    results.write(out)


if __name__ == "__main__":
    main()
