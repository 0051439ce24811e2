"""What does a second stage of whole gradients add? LDS of all rows, scored by each way of ``query --rerank-with``.

On the trainings of ``benchmarks/frontier.py``; and how much of the best rows a second stage of few candidates finds.

Legend: V val samples, N rows, M halves.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, machine_facts
from frontier import Case, Judge
from lds import shown
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent
from query.ask.question import Question
from query.ask.scorer import Scorer, open_scorer
from query.ask.second_stage import Reranking, exact_scores

PART = "onebit (default)"
TOP = 10
SHARES = (0.02, 0.1, 0.3)
"""Candidates, as a share of the rows."""


def ways(steps: int, samples: int, damping: float) -> dict[str, dict[str, Any]]:
    """The second stages, by label."""
    cg = {"rerank_with": "cg", "rerank_samples": samples, "rerank_damping": damping}
    return {
        "exact gradients, K-FAC": {},
        "EK-FAC": {"rerank_with": "ekfac"},
        f"conjugate gradients, {steps // 2} steps": {**cg, "cg_steps": steps // 2},
        f"conjugate gradients, {steps} steps": {**cg, "cg_steps": steps},
    }


def spread(folder: Path, source: Path, count: int) -> tuple[Path, NDArray[np.int64]]:
    """(a val set of ``count`` samples of ``source``, evenly spaced, their places)."""
    lines = source.read_text().splitlines()
    places = np.arange(min(count, len(lines))) * len(lines) // min(count, len(lines))
    path = folder / "val-rerank.jsonl"
    path.write_text("".join(lines[place] + "\n" for place in places))
    return path, places


def best(scores_VN: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.argsort(-np.nan_to_num(scores_VN, nan=-np.inf), axis=1, kind="stable")[:, :count]


def found(coarse_VN: NDArray[np.float64], fine_VN: NDArray[np.float64], share: float) -> float:
    """The share of the best rows by all fine scores that are among the candidates by coarse ones."""
    candidates = best(coarse_VN, max(TOP, round(share * coarse_VN.shape[1])))
    wanted = best(fine_VN, TOP)
    return float(np.mean([np.isin(want, rows).mean() for want, rows in zip(wanted, candidates, strict=True)]))


def filled(scorer: Scorer, rows: NDArray[np.int64], scores_VU: NDArray[np.float64]) -> NDArray[np.float64]:
    """(V, N): 0 for rows without a vector."""
    scores_VN = np.zeros((len(scores_VU), scorer.part.layout.rows))
    scores_VN[:, rows] = scores_VU
    return scores_VN


@click.command()
@click.option("--work", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the frontier's.")
@click.option("--name", default="demo", show_default=True, help="Of the results.")
@click.option("--val-samples", type=int, default=20, show_default=True, help="Val samples, evenly spaced.")
@click.option("--steps", type=int, default=8, show_default=True, help="Of conjugate gradients.")
@click.option("--samples", type=int, default=64, show_default=True, help="Rows of conjugate gradients.")
@click.option("--damping", type=float, default=0.1, show_default=True, help="Of conjugate gradients.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(work: Path, name: str, val_samples: int, steps: int, samples: int, damping: float, out: Path) -> None:
    """Compare second stages by what they predict."""
    disable_progress_bar()
    case = Case(work, 0, 1)
    part = case.built(PART)
    losses = np.load(work / "halved.npz")
    val_set, places = spread(work, case.val_set, val_samples)
    judge = Judge(losses["kept"], losses["losses"][places])
    question = Question(
        store=part.path.parent.parent, val_set=val_set, part=part.name, each=True, metric="dot", device="cpu"
    )
    rows, table, numbers = part.row_numbers[part.usable()], [], {}
    with open_corpus(str(val_set), Fields()) as corpus:
        scorer = open_scorer(question, [part], [1.0], corpus, Silent(), keep_model=True)
        coarse = filled(scorer, rows, scorer.scores(Silent())[:, rows])
        exact = None
        for label, options in {"the part alone (onebit)": None, **ways(steps, samples, damping)}.items():
            begun, scores = time.process_time(), coarse
            if options is not None:
                how = Reranking(rerank=len(rows), **options)
                scores = filled(scorer, rows, exact_scores(scorer, how, rows, Silent()))
            measured = judge.of(scores)
            exact = measured.value if options == {} else exact
            shares = {f"best {TOP} among {share:.0%}": f"{found(coarse, scores, share):.2f}" for share in SHARES}
            seconds = f"{time.process_time() - begun:.0f}"
            table.append({"second stage": label, "LDS": shown(measured), "CPU seconds": seconds, **shares})
            numbers[label] = asdict(measured)
            click.echo(f"{label}: {shown(measured)}, {seconds} s", err=True)
    assert exact is not None
    for line in table:
        line["÷ exact"] = f"{numbers[line['second stage']]['value'] / exact:.2f}"
    results = Results(
        name=f"rerank-{name}",
        title="What a second stage adds",
        settings={
            "corpus": name,
            "samples": judge.kept_MN.shape[1],
            "val samples": len(places),
            "halves": len(judge.kept_MN),
            "rows of conjugate gradients": samples,
            "damping of conjugate gradients": damping,
        },
        facts=machine_facts(),
    )
    note = (
        "All rows scored by each second stage. Best among: of the ten best rows by that stage, the share among the "
        "candidates of the first stage, so many of the rows. CPU seconds: for all rows and val samples."
    )
    results.add(Table("Second stages", table, note), lds=numbers)
    out.mkdir(parents=True, exist_ok=True)
    results.write(out)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
