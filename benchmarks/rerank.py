"""What does a second stage of whole gradients add? LDS of all rows, scored by each way of ``query --rerank-with``.

On the trainings of ``benchmarks/frontier.py``; and how much of the best rows a second stage of few candidates finds.
With ``--choose`` also: what steps, damping and rows of conjugate gradients would be chosen on other val samples.

Legend: V val samples, N rows, U rows with a vector, M halves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from common import Results, Table, machine_facts
from frontier import Case, Judge
from lds import shown
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from ghoststore.corpus import Fields, open_corpus
from ghoststore.progress import Silent, Task
from query.ask import second_stage
from query.ask.question import Question
from query.ask.scorer import Scorer, open_scorer
from query.ask.second_stage import DAMPING, SAMPLES, STEPS, Reranking, exact_scores
from query.evaluate.lds import Lds, lds_difference
from query.exact.gauss_newton import Blocks, GaussNewton

PART = "onebit (default)"
TOP = 10
SHARES = (0.02, 0.1, 0.3)
"""Candidates, as a share of the rows."""
ALONE, EXACT = "the part alone (onebit)", "exact gradients, K-FAC, damping 0.1"
CG = {"rerank_with": "cg"}
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {"rerank_damping": 0.1},
    "exact gradients, K-FAC, damping 0.01 (default)": {},
    "exact gradients, K-FAC, damping 0.001": {"rerank_damping": 0.001},
    f"conjugate gradients, {STEPS} steps (default)": CG,
    f"conjugate gradients, {STEPS // 2} steps": {**CG, "cg_steps": STEPS // 2},
    "EK-FAC, damping 0.1": {"rerank_with": "ekfac", "rerank_damping": 0.1},
    "EK-FAC, damping 0.01 (default)": {"rerank_with": "ekfac"},
    f"conjugate gradients, {2 * STEPS} steps": {**CG, "cg_steps": 2 * STEPS},
}
"""The second stages; what is not given is by default."""
TRIED = (1, 2, 4, 8, 16)
"""Steps of conjugate gradients to choose from."""
GRID = ((128, 0.1, 16), (128, 0.01, 16), (128, 1.0, 8), (32, 0.1, 8), (64, 0.1, 8), (256, 0.1, 8))
"""(rows, damping, most steps) to choose from."""


def evenly(count: int, among: NDArray[np.int64]) -> NDArray[np.int64]:
    count = min(count, len(among))
    return among[np.arange(count) * len(among) // count]


def best(scores_VN: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.argsort(-np.nan_to_num(scores_VN, nan=-np.inf), axis=1, kind="stable")[:, :count]


def found(coarse_VN: NDArray[np.float64], fine_VN: NDArray[np.float64], share: float) -> float:
    """The share of the best rows by all fine scores that are among the candidates by coarse ones."""
    candidates = best(coarse_VN, max(TOP, round(share * coarse_VN.shape[1])))
    wanted = best(fine_VN, TOP)
    return float(np.mean([np.isin(want, rows).mean() for want, rows in zip(wanted, candidates, strict=True)]))


@dataclass(frozen=True, slots=True)
class Asked:
    """Some val samples, asked of all rows."""

    scorer: Scorer
    judge: Judge
    rows_U: NDArray[np.int64]

    @classmethod
    @contextmanager
    def of(cls, case: Case, places: NDArray[np.int64], name: str) -> Iterator[Asked]:
        lines, losses = case.val_set.read_text().splitlines(), np.load(case.folder / "halved.npz")
        val_set = case.folder / f"val-{name}.jsonl"
        val_set.write_text("".join(lines[place] + "\n" for place in places))
        part = case.built(PART)
        question = Question(
            store=part.path.parent.parent, val_set=val_set, part=part.name, each=True, metric="dot", device="cpu"
        )
        with open_corpus(str(val_set), Fields()) as corpus:
            scorer = open_scorer(question, [part], [1.0], corpus, Silent(), keep_model=True)
            judge = Judge(losses["kept"], losses["losses"][places])
            yield cls(scorer, judge, part.row_numbers[part.usable()])

    def alone(self) -> NDArray[np.float64]:
        """(V, N): by the stored vectors."""
        return self._filled(self.scorer.scores(Silent())[:, self.rows_U])

    def by(self, **options: Any) -> NDArray[np.float64]:
        """(V, N): by a second stage."""
        how = Reranking(rerank=len(self.rows_U), **options)
        return self._filled(exact_scores(self.scorer, how, self.rows_U, Silent()))

    def less(self, one_VN: NDArray[np.float64], other_VN: NDArray[np.float64]) -> Lds:
        return lds_difference(one_VN, other_VN, self.judge.kept_MN, self.judge.losses_VM)

    def _filled(self, scores_VU: NDArray[np.float64]) -> NDArray[np.float64]:
        """(V, N): 0 for rows without a vector."""
        scores_VN = np.zeros((len(scores_VU), self.scorer.part.layout.rows))
        scores_VN[:, self.rows_U] = scores_VU
        return scores_VN


class Kept:
    """``with Kept() as kept:`` conjugate gradients of the same queries, rows and damping make a product once, however
    many steps are asked for. ``seconds`` is the CPU time of those that were not made again.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._products: list[tuple[Blocks, float]] = []

    def __enter__(self) -> Kept:
        kept = self

        class Newton(GaussNewton):
            calls = 0

            def times(self, vectors: Blocks, task: Task | None = None) -> Blocks:
                if self.calls == len(kept._products):
                    begun = time.process_time()
                    kept._products.append((super().times(vectors, task), time.process_time() - begun))
                else:
                    kept.seconds += kept._products[self.calls][1]
                self.calls += 1
                return [matrix.clone() for matrix in kept._products[self.calls - 1][0]]

        self._patch = mock.patch.object(second_stage, "GaussNewton", Newton)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


def choice(asked: Asked) -> tuple[Table, dict[str, Any]]:
    """LDS by steps, damping and rows of conjugate gradients."""
    table, numbers = [], {}
    for samples, damping, most in GRID:
        columns = {steps: f"{steps} step{'s' * (steps > 1)}" for steps in TRIED}
        cells = {"rows": str(samples), "damping": f"{damping:g}", **dict.fromkeys(columns.values(), "")}
        with Kept():
            for steps in (steps for steps in reversed(TRIED) if steps <= most):
                scores = asked.by(**CG, cg_steps=steps, rerank_samples=samples, rerank_damping=damping)
                measured = asked.judge.of(scores)
                cells[columns[steps]] = f"{measured.value:.3f}"
                numbers[f"{samples} rows, damping {damping:g}, {steps} steps"] = asdict(measured)
        click.echo(str(cells), err=True)
        table.append(cells)
    note = (
        f"LDS on {len(asked.judge.losses_VM)} val samples that are not among those above. One step is exact gradients."
    )
    return Table("Conjugate gradients by rows, damping and steps", table, note), numbers


def stages(asked: Asked) -> tuple[Table, dict[str, Any], dict[str, Any]]:
    """Every second stage."""
    table, numbers, differences = [], {}, {}
    scores_of, seconds_of = {ALONE: asked.alone()}, {ALONE: "–"}
    kept = Kept()
    for label, options in WAYS.items():
        begun = time.process_time() + kept.seconds
        with kept:
            scores_of[label] = asked.by(**options)
        seconds_of[label] = f"{time.process_time() + kept.seconds - begun:.0f}"
        click.echo(f"{label}: {shown(asked.judge.of(scores_of[label]))}, {seconds_of[label]} s", err=True)
    coarse, exact = scores_of[ALONE], scores_of[EXACT]
    exact_lds = asked.judge.of(exact)
    for label, scores in scores_of.items():
        measured, difference = asked.judge.of(scores), asked.less(scores, exact)
        numbers[label], differences[label] = asdict(measured), asdict(difference)
        table.append({
            "second stage": label, "LDS": shown(measured), "÷ exact": f"{measured.value / exact_lds.value:.2f}",
            "− exact": "" if label == EXACT else shown(difference), "CPU seconds": seconds_of[label],
            **{f"best {TOP} among {share:.0%}": f"{found(coarse, scores, share):.2f}" for share in SHARES},
        })  # fmt: skip
    note = (
        "All rows scored by each second stage; 95 % intervals by resampling the trainings, of a difference for both at "
        "once. Best among: of the ten best rows by that stage, the share among the candidates of the first stage, so "
        "many of the rows. CPU seconds: for all rows and val samples."
    )
    return Table("Second stages", table, note), numbers, differences


@click.command()
@click.option("--work", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the frontier's.")
@click.option("--name", default="demo", show_default=True, help="Of the results.")
@click.option("--val-samples", type=int, default=20, show_default=True, help="Val samples, evenly spaced.")
@click.option("--choose", type=int, default=0, show_default=True, help="Other val samples, to compare settings of cg.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(work: Path, name: str, val_samples: int, choose: int, out: Path) -> None:
    """Compare second stages by what they predict."""
    disable_progress_bar()
    case = Case(work, 0, 1)
    everything = np.arange(len(case.val_set.read_text().splitlines()))
    places = evenly(val_samples, everything)
    with Asked.of(case, places, "rerank") as asked:
        halves, samples = asked.judge.kept_MN.shape
        results = Results(
            name=f"rerank-{name}",
            title="What a second stage adds",
            settings={
                "corpus": name,
                "samples": samples,
                "val samples": len(places),
                "halves": halves,
                "rows of conjugate gradients": SAMPLES["cg"],
                "damping of conjugate gradients": DAMPING,
                "rows of EK-FAC": SAMPLES["ekfac"],
            },
            facts=machine_facts(),
        )
        table, numbers, differences = stages(asked)
        results.add(table, lds=numbers, less_exact=differences)
    if choose:
        with Asked.of(case, evenly(choose, np.setdiff1d(everything, places)), "choice") as asked:
            table, numbers = choice(asked)
            results.add(table, choice=numbers)
    out.mkdir(parents=True, exist_ok=True)
    results.write(out)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
