"""Do samples whose gradients point the same way come from the same domain? Beside chance and TF-IDF."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, folders, machine_facts, scratch_folder, write_jsonl
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import GPT2Config
from transformers.utils.logging import disable_progress_bar

import ghoststore
from ghoststore import Corpus, ProjectionConfig
from indexer.training.architectures import Shape, new_model
from query.demo.tokenizer import train_tokenizer

VOCABULARY = 4096
SHAPE = Shape(layers=4, width=192, heads=6)
BATCH = 16
TIMED_STEPS = 30
CUTS = (10, 100)

Rows = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the rows that one way ranks highest for one domain, the share that are of that domain."""

    mean: dict[int, float]
    """By number of rows; the query is the mean of the domain's val samples."""
    each: float
    """The mean over the val samples of the share in their own ten nearest."""


def read_rows(path: Path) -> Rows:
    """Samples with a text and a domain."""
    samples = Corpus.open(str(path)).samples()
    rows = [
        {"id": s.id, "text": " ".join(s.texts()), "domain": s.domain} for s in samples if s.domain and any(s.texts())
    ]
    if not rows:
        raise click.UsageError(f"{path} has no sample with a text and a domain")
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def train(
    rows: Rows, folder: Path, *, minutes: float, steps: int | None, max_length: int, shape: Shape = SHAPE
) -> dict[str, Any]:
    """Train a small GPT-2 for about ``minutes`` (or ``steps``) into ``folder``; what was trained."""
    tokenizer = train_tokenizer([row["text"] for row in rows], VOCABULARY)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=max_length,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name)
        corpus = write_jsonl(scratch / "rows.jsonl", rows)
        new_model(config, seed=0).save_pretrained(scratch / "new")
        tokenizer.save_pretrained(scratch / "new")

        def run(count: int) -> Any:
            return ghoststore.train(
                data=corpus,
                checkpoint=scratch / "new",
                output_dir=scratch / f"{count}",
                method="Regular",
                batch_size=BATCH,
                max_steps=count,
                max_length=max_length,
                overlong="truncate",
                learning_rate=3e-3,
                adam_beta2=0.99,
                weight_decay=0.01,
                eval_interval=count,
            )

        if steps is None:
            began = time.perf_counter()
            run(TIMED_STEPS)
            steps = max(TIMED_STEPS + 1, round(minutes * 60 / (time.perf_counter() - began) * TIMED_STEPS))
        report = run(steps)
        shutil.copytree(report.checkpoint, folder)
    return {
        "steps": steps,
        "seconds": report.seconds,
        "loss": report.train_loss,
        "parameters": report.parameters,
    }


def build(folder: Path, name: str, data: Path, max_length: int, projection: ProjectionConfig) -> int:
    """Build a part called ``name``; its numbers a row."""
    report = ghoststore.build(
        checkpoint=folder / "checkpoint",
        data=data,
        store=folder / "store",
        name=name,
        max_length=max_length,
        projection=projection,
        proj_dtype="float32",
    )
    return report.dimension


def shares_of_gradients(folder: Path, part: str, val_sets: dict[str, Path]) -> dict[str, Shares]:
    """By domain, from ``ghoststore.query``."""

    def nearest(domain: str, top_k: int, each: bool) -> list[list[bool]]:
        """For each query, for each of its hits, whether it is of ``domain``."""
        found = ghoststore.query(
            store=folder / "store", part=part, val_set=val_sets[domain], top_k=top_k, each=each, text=False
        )
        return [[hit.domain == domain for hit in result.hits] for result in found.results]

    shares = {}
    for domain in val_sets:
        (whole,) = nearest(domain, max(CUTS), False)
        each = nearest(domain, CUTS[0], True)
        shares[domain] = Shares({cut: float(np.mean(whole[:cut])) for cut in CUTS}, float(np.mean(each)))
    return shares


def shares_of_words(train_rows: Rows, val_rows: Rows) -> dict[str, Shares]:
    """By domain, from the cosine of TF-IDF vectors of words and pairs of words."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    pool = vectorizer.fit_transform([row["text"] for row in train_rows])
    domains = np.array([row["domain"] for row in train_rows])
    shares = {}
    for domain in domains_of(val_rows):
        vectors = vectorizer.transform([row["text"] for row in val_rows if row["domain"] == domain])
        same = domains == domain
        whole = same[best(pool @ np.asarray(vectors.mean(axis=0)).ravel(), max(CUTS))]
        each = [same[best(scores, CUTS[0])].mean() for scores in (vectors @ pool.T).toarray()]
        shares[domain] = Shares({cut: float(whole[:cut].mean()) for cut in CUTS}, float(np.mean(each)))
    return shares


def best(scores: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Places of the largest scores, largest first, equal ones by place."""
    return np.argsort(-scores, kind="stable")[:count]


def domains_of(rows: Iterable[dict[str, str]]) -> list[str]:
    return sorted({row["domain"] for row in rows})


def mean_of(shares: dict[str, Shares]) -> Shares:
    """The mean over domains."""
    mean = {cut: float(np.mean([share.mean[cut] for share in shares.values()])) for cut in CUTS}
    return Shares(mean, float(np.mean([share.each for share in shares.values()])))


def cells(ways: dict[str, dict[str, Shares]], chance: dict[str, float]) -> list[dict[str, str]]:
    """A row for each domain and their mean, a column for each way and each kind of query."""
    domains = list(chance)
    rows = []
    for domain in [*domains, "mean"]:
        row = {"domain": domain}
        for way, by_domain in ways.items():
            share = mean_of(by_domain) if domain == "mean" else by_domain[domain]
            row |= {f"{way}: top {cut}": f"{share.mean[cut]:.2f}" for cut in CUTS}
            row[f"{way}: each, top {CUTS[0]}"] = f"{share.each:.2f}"
        row["chance"] = f"{np.mean(list(chance.values())) if domain == 'mean' else chance[domain]:.2f}"
        rows.append(row)
    return rows


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), required=True, help="Training corpus, with domains."
)
@click.option(
    "--val-set", type=click.Path(exists=True, path_type=Path), required=True, help="Val corpus, with domains."
)
@click.option("--minutes", type=float, default=4.0, show_default=True, help="How long to train.")
@click.option("--steps", type=int, help="Train so many steps instead.")
@click.option("--max-length", type=int, default=256, show_default=True, help="Tokens of a sample.")
@click.option("--proj-rank-total", type=int, help="Also a part of plain blocks of so many numbers, such as 256.")
@click.option("--max-samples", type=int, help="Only the first samples of the training corpus.")
@folders
def main(
    data: Path,
    val_set: Path,
    minutes: float,
    steps: int | None,
    max_length: int,
    proj_rank_total: int | None,
    max_samples: int | None,
    scratch: Path | None,
    out: Path,
) -> None:
    """Train a small GPT-2, build its store, and ask for each domain which training samples are nearest."""
    disable_progress_bar()
    torch.manual_seed(0)
    facts = machine_facts()
    train_rows, val_rows = read_rows(data)[:max_samples], read_rows(val_set)
    domains = domains_of(val_rows)
    with scratch_folder(scratch) as folder:
        trained = train(train_rows, folder / "checkpoint", minutes=minutes, steps=steps, max_length=max_length)
        corpus = write_jsonl(folder / "train.jsonl", train_rows)
        val_sets = {
            domain: write_jsonl(folder / f"val-{domain}.jsonl", [row for row in val_rows if row["domain"] == domain])
            for domain in domains
        }
        projections = {"gradients": ProjectionConfig()}
        if proj_rank_total:
            projections[f"plain {proj_rank_total}"] = ProjectionConfig(rank_total=proj_rank_total)
        ways, dimensions = {}, {}
        for place, (label, projection) in enumerate(projections.items()):
            dimensions[label] = build(folder, f"part-{place}", corpus, max_length, projection)
            ways[label] = shares_of_gradients(folder, f"part-{place}", val_sets)
        ways["TF-IDF"] = shares_of_words(train_rows, val_rows)
    results = Results(
        name="domains" if steps is None else f"domains-{steps}-steps",
        title="Nearest training samples by domain",
        settings={
            "data": data.name,
            "val set": val_set.name,
            "train rows": len(train_rows),
            "val rows": len(val_rows),
            "max length": max_length,
            **{f"training {key}": round(value, 3) for key, value in trained.items()},
            **{f"numbers a row, {label}": dimension for label, dimension in dimensions.items()},
        },
        facts=facts,
    )
    chance = {domain: float(np.mean([row["domain"] == domain for row in train_rows])) for domain in domains}
    note = (
        "Share of the nearest training samples that are of the query's own domain. `top`: the query is the mean of the "
        "domain's val samples; `each`: the mean over its val samples, each a query. Gradients: a 4-layer, d=192 GPT-2, "
        "cosine. TF-IDF: words and pairs of words, cosine. Chance: the domain's share of the training samples."
    )
    results.add(
        Table("Share in the same domain", cells(ways, chance), note),
        chance=chance,
        shares={way: {d: {"mean": s.mean, "each": s.each} for d, s in found.items()} for way, found in ways.items()},
    )
    results.write(out)


if __name__ == "__main__":
    main()
