"""Scores of the samples of each step: the engine, fed with val samples as the configuration says.

Legend: B samples of a micro-batch, G val groups, K blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ghoststore.errors import CaptureError, DivergedError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import ScoringConfig
from indexer.dotprod import GradDotProdEngine
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from indexer.projection.selection import select_blocks
from indexer.training.data import Batch
from indexer.training.validation import ValSet


class Scorer:
    """The engine of one rank, and which val samples it scores against when."""

    def __init__(
        self,
        engine: GradDotProdEngine,
        val: ValSet,
        config: ScoringConfig,
        *,
        checkpoint_interval: int,
        groups: list[str],
        blocks: list[str],
    ) -> None:
        self.engine = engine
        self.val = val
        self.config = config
        self.groups = groups
        """Names of the val groups of the run; empty without groups."""
        self.blocks = blocks
        """Names of the blocks whose scores are kept; empty where none are."""
        self._step: int | None = None
        self._checkpoint_interval = checkpoint_interval
        self._seconds = 0.0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        val: ValSet,
        config: ScoringConfig,
        projection: ProjectionConfig | None,
        checkpoint_interval: int,
    ) -> Scorer:
        """The scorer that ``config`` asks for. LayerError or UsageError if this model cannot be scored so."""
        drawn = None
        if config.score == "sketched":
            asked = projection or ProjectionConfig()
            selection = select_blocks(
                model, asked.layers, asked.exclude_layers, include_embeddings=asked.include_embeddings
            )
            drawn = Projection(ProjectionPlan.of(selection, asked))
        engine = GradDotProdEngine(
            model,
            None,
            val_refresh_interval=config.val_refresh_interval,
            exclude_layers=config.exclude_layers,
            route=config.route,
            projection=drawn,
            hold_losses=False,  # Trainer computes them from the logits
        )
        if config.per_layer and not engine.method.blocks:
            raise UsageError("--per-layer: a global sketch has no scores by layer; add --proj-compress none")
        return cls(
            engine,
            val,
            config,
            checkpoint_interval=checkpoint_interval,
            groups=val.domains if config.val_groups else [],
            blocks=list(engine.method.blocks) if config.per_layer else [],
        )

    def prepare(self, batch: Batch, step: int, loss_scale: float) -> None:
        """Open the engine for ``batch``; if the val gradient is due, choose its val samples first.

        It is due at multiples of the refresh interval, and after a checkpoint, where a resumed run has none.
        DivergedError if it is not finite any more.
        """
        interval = self.config.val_refresh_interval
        if step != self._step and (self._step is None or not step % interval or not step % self._checkpoint_interval):
            self._choose_val(step)
        begun, self._step = self._step is not None, step
        try:
            self.engine.prepare(len(batch.rows), tokens=batch.input_ids.numel(), loss_scale=loss_scale)
        except (UsageError, CaptureError) as error:
            if not begun:
                raise
            raise DivergedError.at(
                step + 1, f"the val loss, or its gradient, cannot be used any more: {error}"
            ) from error

    def _choose_val(self, step: int) -> None:
        refresh = step // self.config.val_refresh_interval
        chosen = self.val.chosen(refresh, self.config.val_batch_size, self.config.val_sampling)
        batches, places = self.val.batches(chosen.tolist())
        names = [self.val.domain_of(place) for place in places]
        self.engine.set_validation(batches, names if self.groups else None)

    def examine(self, step: int) -> None:
        """Before the run is made: CaptureError for layers that mix the samples of a batch."""
        self._choose_val(step)
        self.engine.examine()

    def stepped(self) -> None:
        """The optimizer has made a step."""
        self.engine.stepped()

    def watch(self, loss: torch.Tensor, batch: Batch, total_targets: float) -> None:
        """The loss is Σ over targets ÷ ``total_targets``."""
        targets_B = (batch.labels[:, 1:] != -100).sum(1)
        self.engine.watch(loss, weights=targets_B / total_targets)

    def collect(self) -> dict[str, NDArray[Any]]:
        """The scores of the batch, as the store keeps them."""
        scores = self.engine.collect()
        self._seconds += scores.seconds
        found = {"score": _stored(scores.total)}
        if self.groups:
            column = {name: place for place, name in enumerate(self.engine.group_names)}
            each = [_stored(scores.groups[:, column[name]]) if name in column else None for name in self.groups]
            absent = np.full(len(scores.total), np.nan, dtype=np.float32)
            found["group_score"] = np.stack([absent if values is None else values for values in each], axis=1)
        if self.blocks:
            found["block_score"] = np.stack([_stored(scores.blocks[name]) for name in self.blocks], axis=1)
        return found

    def take_seconds(self) -> float:
        """Time spent on scoring since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _stored(values: torch.Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()
