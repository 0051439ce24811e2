"""Trainings that choose among candidates, and plain ones that are given the rows that were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ghoststore.checkpoint.load import find_checkpoint, load_model
from ghoststore.settings.train import TrainConfig
from ghoststore.tokens.shards import TokenShards
from indexer.session.ranks import Ranks
from indexer.session.session import ScoringSession
from indexer.training.data import TrainingRows
from indexer.training.loop import Trainer, make_optimizer, make_scaler

if TYPE_CHECKING:
    from tests.support.trainings import Trained

Rows = NDArray[np.int64]


@dataclass
class Given:
    """An order that is written down."""

    rows: Sequence[Rows]

    def rows_of(self, step: int) -> Rows:
        return self.rows[step]


def chosen_of(arrays: Mapping[str, NDArray[Any]]) -> list[Rows]:
    """The rows that each step trained on, in the order of ranks and places."""
    return [sample[weight > 0] for sample, weight in zip(arrays["sample"], arrays["weight"], strict=True)]


def trained_plainly(
    checkpoint: Path, trained: Trained, rows: Sequence[Rows], micro_batches: int = 1, **options: Any
) -> dict[str, torch.Tensor]:
    """The weights after plain steps on ``rows``, without scores; ``options`` are those of ``trained``."""
    shards = TokenShards.open(trained.output / "tokens")
    config = TrainConfig.of(method="Regular", gradient_accumulation_steps=micro_batches, **options)
    table = TrainingRows.cut(shards, trained.run.manifest["training"]["max_length"], config.overlong)
    model = load_model(find_checkpoint(checkpoint), dtype=config.model_dtype, device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trainer = Trainer(
        model=model,
        optimizer=make_optimizer(model, config.optimization),
        rows=table,
        order=Given(rows),
        config=config,
        ranks=Ranks(),
        device="cpu",
        steps=len(rows),
        session=ScoringSession(),
        val_schedule=None,
        scaler=make_scaler(config, "cpu", {}),
    )
    with trainer.running():
        for step in range(len(rows)):
            trainer.step(step)
    names = trained.weights().keys()
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}
