"""How near are scores from the leading directions of a val gradient to those from the whole of it? By directions,
metric and layers, for a model in its training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import Results, Table, machine_facts
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ghoststore import GradDotProdEngine
from indexer.dotprod import exact, low_rank
from query.common.rank_correlation import spearman

STEPS = 12
"""Steps of a learning rate of 0 before scores in Adam's metric, so that its second moment is that of these weights."""


def batch_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids}


class Case:
    """A model, samples, and a val set."""

    def __init__(self, checkpoint: Path, data: Path, length: int, samples: int, val: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint).train()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
        ids = torch.tensor(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
        rows = ids[: len(ids) // length * length].view(-1, length)
        rows = rows[torch.linspace(0, len(rows) - 1, samples + val).long()]
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        self.samples, self.val = rows[chosen[:samples]], rows[chosen[samples:]]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def loss(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(**batch_of(ids), use_cache=False).loss
        return loss

    def warm_up(self) -> None:
        for place in range(STEPS):
            self.loss(self.samples[place % len(self.samples)].unsqueeze(0)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def scores(self, route: str, metric: str, layers: str) -> NDArray[np.float64]:
        """One for each sample."""
        totals = []
        with GradDotProdEngine(
            self.model, batch_of(self.val), optimizer=self.optimizer, route=route, score_metric=metric,  # type: ignore[arg-type]
            score_layers=layers, check=False, val_refresh_interval=1 << 20,  # type: ignore[arg-type]
        ) as engine:  # fmt: skip
            for ids in self.samples.split(8):
                engine.prepare(len(ids), tokens=ids.numel())
                loss = self.loss(ids)
                engine.watch(loss)
                loss.backward()
                totals.append(engine.collect().total)
                self.model.zero_grad()
        return torch.cat(totals).numpy()


def row_of(case: Case, directions: int, metric: str, layers: str, whole: NDArray[np.float64]) -> dict[str, Any]:
    """One line of the table: the route is forced, whatever it leaves out."""
    shares: list[float] = []
    shorten = low_rank.low_rank

    def watched(gradients: list[Tensor]) -> list[low_rank.LowRank | None]:
        found = shorten(gradients)
        for gradient, short in zip(gradients, found, strict=True):
            assert short is not None
            shares.append(float((gradient - short.dense()).square().sum() / gradient.square().sum()))
        return found

    before = low_rank.DIRECTIONS, low_rank.LEFT_OUT
    low_rank.DIRECTIONS = exact.DIRECTIONS = directions  # type: ignore[attr-defined]
    low_rank.LEFT_OUT, exact.low_rank = 2.0, watched  # type: ignore[attr-defined]
    try:
        scores = case.scores("low-rank", metric, layers)
    finally:
        low_rank.DIRECTIONS, low_rank.LEFT_OUT = before
        exact.DIRECTIONS, exact.low_rank = before[0], shorten  # type: ignore[attr-defined]
    median, ninth, most = np.quantile(shares, [0.5, 0.9, 1.0])
    return {
        "metric": metric,
        "layers": layers,
        "directions": str(directions),
        "Spearman": f"{float(spearman(whole[None], scores[None])[0]):.5f}",
        "error ÷ standard deviation": f"{np.std(scores - whole) / np.std(whole):.1e}",
        "left out: median": f"{median:.1e}",
        "of nine in ten": f"{ninth:.1e}",
        "most": f"{most:.1e}",
        "whole gradient": f"{np.mean(np.array(shares) > before[1]):.0%}",
    }


@click.command()
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Texts (jsonl).")
@click.option("--length", type=int, default=128, show_default=True)
@click.option("--samples", type=int, default=24, show_default=True)
@click.option("--val", type=int, default=8, show_default=True, help="Val samples.")
@click.option("--directions", type=int, multiple=True, default=(16, 64), show_default=True)
@click.option("--metric", "metrics", multiple=True, default=("sgd", "adam"), show_default=True)
@click.option("--layers", "scopes", multiple=True, default=("all", "blocks"), show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results"), show_default=True)
def main(
    checkpoint: Path,
    data: Path,
    length: int,
    samples: int,
    val: int,
    directions: tuple[int, ...],
    metrics: tuple[str, ...],
    scopes: tuple[str, ...],
    threads: int,
    out: Path,
) -> None:
    """Scores from the leading directions of a val gradient beside those from the whole of it."""
    torch.set_num_threads(threads)
    case = Case(checkpoint, data, length, samples, val)
    rows = []
    for metric in metrics:
        if metric == "adam":
            case.warm_up()
        for layers in scopes:
            whole = case.scores("direct", metric, layers)
            for count in directions:
                rows.append(row_of(case, count, metric, layers, whole))
                print(rows[-1], flush=True)
    parameters = sum(p.numel() for p in case.model.parameters())
    results = Results(
        name="low-rank",
        title="Scores from the leading directions of a val gradient",
        settings={"parameters": parameters, "samples": samples, "length": length, "val samples": val},
        facts=machine_facts("cpu"),
    )
    note = (
        f"Left out: share of a matrix's val gradient, squared, outside the directions; above {low_rank.LEFT_OUT:.0%} "
        "the route takes the whole gradient (last column: how many), here it does not. "
        f"Training takes {low_rank.DIRECTIONS}."
    )
    results.add(Table("Against scores from the whole val gradient", rows, note), rows=rows)
    results.write(out)


if __name__ == "__main__":
    main()
