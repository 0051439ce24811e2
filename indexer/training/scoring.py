"""Scores of ``ghoststore train``: the engine of its options, and the val samples that each step is scored against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import nn

from ghoststore.errors import CaptureError, DivergedError, UsageError
from ghoststore.progress import Late, Progress
from ghoststore.settings.projection import ProjectionConfig
from ghoststore.settings.train import TrainConfig
from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.scoring_batch import ScoringBatch
from indexer.dotprod.val_data import ValLossError
from indexer.session.session import ScoringSession
from indexer.training.data import Batch
from indexer.training.validation import ValSet

SHOWN_AFTER = 1.0
"""Seconds that the first val gradient may take without a bar."""
SHOWN_LATER_AFTER = 10.0
"""The same of later ones."""


def scoring_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: TrainConfig, projection: ProjectionConfig | None
) -> GradDotProdEngine:
    """The engine that ``training`` asks for, without val samples yet. LayerError or UsageError if this model cannot be
    scored so.
    """
    config = training.scoring
    sketched = training.score == "sketched"
    projects = sketched or config.keep_gradients is not None
    own = (projection or ProjectionConfig()) if projects else None
    engine = GradDotProdEngine(
        model,
        None,
        optimizer=optimizer,
        val_refresh_interval=training.val_refresh_interval,
        exclude_layers=config.exclude_layers,
        score_layers=training.score_layers,
        score_metric=config.score_metric,
        route=config.route,
        pairs=training.choosing.policy == "greats" or (training.contrast and not sketched),
        projection=own if sketched else None,
        keep=None if sketched else own,
        hold_losses=False,  # Trainer computes them from the logits
    )
    if config.per_layer and not engine.method.blocks:
        raise UsageError("`per_layer`: a global sketch has no scores by layer; add `compress=none`")
    return engine


class ValSchedule:
    """Which val samples the engine holds at which step: others whenever the val gradient is due.

    It is due at multiples of the refresh interval, and after a checkpoint, where a resumed run has none.
    """

    def __init__(
        self,
        engine: GradDotProdEngine,
        val: ValSet,
        training: TrainConfig,
        checkpoint_interval: int,
        progress: Progress,
    ) -> None:
        self.engine, self.val, self.config = engine, val, training.scoring
        self._progress, self._shown_after = progress, SHOWN_AFTER
        self._interval = training.val_refresh_interval
        self._checkpoint_interval = checkpoint_interval
        self._places: list[int] = []
        """Of the engine's val samples, among the rows of the val set."""
        self._step: int | None = None
        """The step of the newest batch."""

    def examine(self, step: int) -> None:
        """Before the run is made: CaptureError for layers that mix the samples of a batch."""
        self._choose(step)
        self.engine.examine()

    def forget(self) -> None:
        """Forget every step: the next one takes a val gradient of its own."""
        self._step = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """A val pass within has a bar, if it takes a while. Later ones only if they take long: the first has said it,
        and a log has a line for each.
        """
        total = min(self.config.val_batch_size, len(self.val.rows))
        before = [0]
        with closing(Late(self._progress, "val gradient", total, self._shown_after)) as task:

            def batch(size: int) -> None:
                task.advance(before.pop())
                before.append(size)
                self._shown_after = SHOWN_LATER_AFTER

            self.engine.on_val_batch = batch
            try:
                yield
                task.advance(before.pop())
            finally:
                self.engine.on_val_batch = lambda size: None

    def prepare(self, session: ScoringSession, batch: Batch, step: int, loss_scale: float) -> None:
        """Open the session for ``batch``; if the val gradient is due, choose its val samples first.

        DivergedError if it is not finite any more.
        """
        with self._at(step):
            session.prepare(len(batch.rows), rows=batch.rows, tokens=batch.input_ids.numel(), loss_scale=loss_scale)

    @contextmanager
    def scoring(
        self, session: ScoringSession, batch: Batch, step: int, loss_scale: float, *, hold: bool
    ) -> Iterator[ScoringBatch]:
        """Open the engine for candidates, which are scored and not trained on (or with ``hold`` afterwards); else as
        :meth:`prepare`.
        """
        with ExitStack() as stack:
            with self._at(step):
                opening = session.scoring(
                    len(batch.rows), tokens=batch.input_ids.numel(), loss_scale=loss_scale, hold=hold
                )
                opened = stack.enter_context(opening)
            yield opened

    @contextmanager
    def _at(self, step: int) -> Iterator[None]:
        """Where the engine is opened at ``step``: with other val samples, if they are due."""
        first, interval = self._step is None, self._interval
        if step != self._step and (first or not step % interval or not step % self._checkpoint_interval):
            self._choose(step)
        self._step = step
        try:
            with self.shown():
                yield
        except (UsageError, CaptureError) as error:
            if isinstance(error, ValLossError):
                ids = [self.val.rows[self._places[index]].sample.id for index in error.indexes]
                error = ValLossError(error.indexes, [repr(name) for name in ids])
            if first:
                raise error  # the model cannot be scored at all
            raise DivergedError.at(
                step + 1, f"the val loss, or its gradient, cannot be used any more: {error}"
            ) from error

    def _choose(self, step: int) -> None:
        refresh = step // self._interval
        chosen = self.val.chosen(refresh, self.config.val_batch_size, self.config.val_sampling)
        batches, self._places = self.val.batches(chosen.tolist())
        names = [self.val.domain_of(place) for place in self._places]
        self.engine.set_validation(batches, names if self.config.val_groups else None)
