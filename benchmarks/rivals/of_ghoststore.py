"""ghoststore: its default, exact gradients in the default's metric, its second stage, and the lexical baseline."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from exchange import Job, Phases, run

DEFAULT = "default"


def start(job: Job) -> None:
    import ghoststore
    from ghoststore.checkpoint.load import find_checkpoint, load_model

    assert ghoststore.build
    load_model(find_checkpoint(str(job.checkpoint)), dtype="float32", device="cpu")


def build(job: Job, *, options: dict[str, Any]) -> None:
    """A part by its defaults: the rows' length is that of all ways."""
    import ghoststore

    ghoststore.build(
        checkpoint=job.checkpoint, data=job.data, store=job.work / "store", name=DEFAULT,
        max_length=job.settings["max_length"], **options,
    )  # fmt: skip
    (described,) = ghoststore.info(job.work / "store", part=DEFAULT).parts
    job.keep(described.row_bytes)


def query(job: Job, *, options: dict[str, Any]) -> None:
    """A ranking for each val row. Its seconds are told before the scores of all rows are computed, too."""
    import ghoststore

    question: dict[str, Any] = {"store": job.work / "store", "val_set": job.val_set, "each": True, **options}
    ghoststore.query(**question)
    job.seconds(query=time.process_time())
    job.answer(all_scores(question))


def all_scores(question: dict[str, Any]) -> Any:
    """(val rows, rows)."""
    from ghoststore import Store
    from ghoststore.corpus import Fields, open_corpus
    from ghoststore.progress import Silent
    from query.ask.question import Question
    from query.ask.scorer import open_scorer

    asked, part = Question(**question, device="cpu"), Store.open(question["store"]).part(DEFAULT)
    with open_corpus(str(question["val_set"]), Fields()) as val_set:
        scorer = open_scorer(asked, [part], [1.0], val_set, Silent())
        return scorer.scores(Silent())


def query_exact(job: Job) -> None:
    """Exact gradients of the part's layers in its metric, of every row and val row."""
    from ghoststore import Store
    from ghoststore.corpus import Fields, open_corpus
    from ghoststore.progress import Silent
    from query.ask.encoder import PartEncoder
    from query.evaluate.exact import ExactScores

    encoder = PartEncoder(Store.open(job.work / "store").part(DEFAULT), device="cpu")
    with open_corpus(str(job.val_set), Fields()) as val_set:
        vals = list(encoder.rows(val_set.samples()))
    exact = ExactScores(
        encoder=encoder, vals=vals, val_fingerprint=job.val_set.name, samples=job.count(job.rows),
        folder=job.work / "exact", progress=Silent(),
    )  # fmt: skip
    job.keep(None)
    job.answer(exact.of("exact-layers-dot"))


def query_second_stage(job: Job) -> None:
    """Conjugate gradients by their defaults, every row a candidate."""
    from ghoststore import Store
    from ghoststore.corpus import Fields, open_corpus
    from ghoststore.progress import Silent
    from query.ask.question import Question
    from query.ask.scorer import open_scorer
    from query.ask.second_stage import Reranking, exact_scores

    part = Store.open(job.work / "store").part(DEFAULT)
    rows = part.row_numbers[part.usable()]
    assert len(rows) == part.layout.rows
    asked = Question(store=job.work / "store", val_set=job.val_set, each=True, metric="dot", device="cpu")
    with open_corpus(str(job.val_set), Fields()) as val_set:
        scorer = open_scorer(asked, [part], [1.0], val_set, Silent(), keep_model=True)
        job.keep(None)
        job.answer(exact_scores(scorer, Reranking(rerank=len(rows), rerank_with="cg"), rows, Silent()))


def texts(job: Job, path: Path) -> list[str]:
    return [row["text"] for row in job.read(path)]


def no_start(job: Job) -> None:
    import query.evaluate.tf_idf  # noqa: F401


def build_words(job: Job) -> None:
    """Nothing is kept: the corpus is counted again for every question, as ``evaluate`` does."""
    job.keep(None)


def query_words(job: Job) -> None:
    from query.evaluate.tf_idf import TfIdf

    words = TfIdf(texts(job, job.rows))
    job.answer(words.vectors(texts(job, job.val)) @ words.rows.T)


WAYS = {
    "default": Phases(start, partial(build, options={}), partial(query, options={})),
    "lexical": Phases(start, partial(build, options={}), partial(query, options={"lexical": 0.1})),
    "exact": Phases(start, partial(build, options={}), query_exact),
    "cg": Phases(start, partial(build, options={}), query_second_stage),
    "tf-idf": Phases(no_start, build_words, query_words),
}

if __name__ == "__main__":
    run(WAYS)
