"""Trainings that keep their gradients, and questions to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import ghoststore
from ghoststore import ProjectionConfig

if TYPE_CHECKING:
    from tests.conftest import Lab

PLAIN = ProjectionConfig(rank_total=256, precondition="none")
STILL: dict[str, Any] = {
    "learning_rate": 1e-9,
    "min_learning_rate_ratio": 1.0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_steps": 9,
    "batch_size": 3,
    "keep_gradients": 1,
}
"""A training that sees each of 27 rows once, at the same weights (to six digits)."""
K = 30


def kept_runs(lab: Lab, folder: Path) -> None:
    """``store`` with two runs: ``moving``, which keeps every other step, and ``still``; and ``val.jsonl``."""
    lab.write(folder / "val.jsonl", [row | {"id": f"v{i}"} for i, row in enumerate(lab.sample_rows(5, 5))])
    train(lab, folder, "moving", max_steps=12, learning_rate=5e-3, keep_gradients=2, eval_interval=6)
    train(lab, folder, "still", **STILL)


def train(lab: Lab, folder: Path, name: str, **options: Any) -> None:
    given = {"batch_size": 4, "val_batch_size": 3, "dot_prod_save_interval": 4, "projection": PLAIN, **options}
    ghoststore.train(
        data=lab.corpus,
        val_set=folder / "val.jsonl",
        store=folder / "store",
        output_dir=folder / name,
        name=name,
        checkpoint=lab.checkpoint,
        device="cpu",
        **given,
    )


def ask(folder: Path, run: str = "moving", **options: Any) -> Any:
    given = {"top_k": K, "text": False, "device": "cpu", **options}
    return ghoststore.query(store=folder / "store", run=run, **given)


def scores(result: Any, place: int = 0) -> dict[int, float]:
    """By source row."""
    return {hit.source_row: hit.score for hit in result.results[place].hits}


def at_checkpoint(folder: Path, run: str = "moving", step: int = 6) -> dict[str, Any]:
    return {"val_set": folder / "val.jsonl", "checkpoint": folder / run / f"checkpoint-{step}"}
