"""Do val losses change as scores in nats say? The true change on the predicted one, over models trained on halves.

With half of the rows left out and the others counting twice, the predicted val loss is that of all rows less
2 · Σ nats of the rows that are kept, up to a constant.

Legend: N samples of the corpus, V val samples, M halves.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from common import Results, Table, machine_facts
from frontier import BUILT, Case
from numpy.typing import NDArray
from transformers.utils.logging import disable_progress_bar

from ghoststore.progress import Silent
from query.ask.question import Question
from query.ask.scorer import open_scorer
from query.ask.unit import Unit

DRAWS = 400
Float64 = NDArray[np.float64]


def slope(predicted_VM: Float64, true_VM: Float64) -> tuple[float, float]:
    """(slope, correlation) of the changes over halves, each val sample about its own mean."""
    x, y = (numbers - numbers.mean(1, keepdims=True) for numbers in (predicted_VM, true_VM))
    product = float((x * y).sum())
    return product / float((x * x).sum()), product / float((x * x).sum() * (y * y).sum()) ** 0.5


def shown(predicted_VM: Float64, true_VM: Float64) -> tuple[str, str]:
    """The slope with an interval (95 %) that resamples the trainings, and the correlation."""
    random, halves = np.random.default_rng(0), true_VM.shape[1]
    draws = [random.integers(0, halves, halves) for _ in range(DRAWS)]
    low, high = np.quantile([slope(predicted_VM[:, draw], true_VM[:, draw])[0] for draw in draws], (0.025, 0.975))
    value, correlation = slope(predicted_VM, true_VM)
    return f"{value:.2f} ({low:.2f} to {high:.2f})", f"{correlation:.2f}"


def nats_of(case: Case, label: str) -> tuple[Float64, Unit]:
    """(V, N) of a part."""
    part = case.built(label)
    question = Question(store=part.path.parent.parent, val_set=case.val_set, part=part.name, each=True, device="cpu")
    with question.opened_val_set(Silent()) as val_set:
        scores_VN = open_scorer(question, [part], [1.0], val_set, Silent()).scores(Silent())
    unit = Unit.of(part)
    assert unit is not None
    return np.nan_to_num(scores_VN) * unit.factor, unit


@click.command()
@click.option("--work", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of frontier.py.")
@click.option("--name", default="demo", show_default=True, help="Of the results.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(work: Path, name: str, out: Path) -> None:
    """Regress true changes of val losses on predicted ones, for each preconditioned part of frontier.py."""
    disable_progress_bar()
    case, trained = Case(work, 0, 1), np.load(work / "halved.npz")
    kept_MN, losses_VM = trained["kept"].astype(np.float64), trained["losses"]
    rows, units = [], {}
    for label in (label for label in BUILT if "plain" not in label):
        nats_VN, unit = nats_of(case, label)
        predicted_VM = -2 * nats_VN @ kept_MN.T
        each, correlation = shown(predicted_VM, losses_VM)
        mean, of_mean = shown(predicted_VM.mean(0, keepdims=True), losses_VM.mean(0, keepdims=True))
        units[label] = unit.to_json()
        rows.append({
            "part": label, "T": f"{unit.tokens:.1f}", "N": f"{unit.rows:,}", "d": f"{unit.directions:,.0f}",
            "slope, each val sample": each, "correlation": correlation, "slope, their mean": mean,
            "its correlation": of_mean, "highest score": f"{nats_VN.max():.3f}",
        })  # fmt: skip
        click.echo(str(rows[-1]), err=True)
    results = Results(
        name=f"nats-{name}",
        title="Scores in nats and what trainings do",
        settings={"corpus": name, "val samples": len(losses_VM), "halves": len(kept_MN)},
        facts=machine_facts(),
    )
    note = "Slope 1: val losses change as predicted. Above 1: by more. Intervals (95 %) resample the trainings."
    results.add(Table("True change of the val loss on the predicted one", rows, note), units=units)
    results.write(out)


if __name__ == "__main__":
    main()
