"""The numbers of a training run: those beside its progress bar, and its report at the end."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from indexer.training.dry_run import TrainPlan
from indexer.training.loop import StepResult
from indexer.training.validation import ValLoss

LAST_STEPS = 20
"""Steps over which the training loss is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a training run did. Losses are nats a token."""

    output_dir: str
    checkpoint: str | None = None
    """The last checkpoint; None after ``eval_only`` and ``dry_run``."""
    store: str | None = None
    run: str | None = None
    """None after ``eval_only`` and ``dry_run``, and without a store."""
    steps: int = 0
    resumed_from: int = 0
    """Steps that were finished before this call."""
    rows: int = 0
    """Training rows: samples, or windows of long ones."""
    parameters: int
    repeated_ids: dict[str, int] | None = None
    """``ids`` that occur more than once, and the ``samples`` that have them; None where every id is unique."""
    tokens: int
    """Tokens of the steps of this call, padding aside."""
    train_loss: float | None
    """Mean of the last (at most 20) steps of this call."""
    val_loss: float | None
    val_loss_by_domain: dict[str, float]
    tokens_per_second: float | None
    score_share: float | None
    """Share of the time of the steps that scoring took (host time); None where nothing was scored."""
    negative_share: float | None
    """Share of this call's scores of the first rank that are negative."""
    seconds: float
    plan: TrainPlan | None = None
    """What would be done; None but of ``dry_run``."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore train --json`` prints."""
        return asdict(self)


@dataclass(slots=True)
class StepTotals:
    """Sums over the steps of one call."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_STEPS))
    tokens: int = 0
    seconds: float = 0.0
    score_seconds: float = 0.0
    negative: int = 0
    scored: int = 0
    val: ValLoss | None = None

    def add(self, result: StepResult, val: ValLoss | None) -> None:
        """Count one step, and the val loss after it where there is one."""
        self.losses.append(result.train_loss)
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.score_seconds += result.scored.seconds
        self.val = val or self.val
        score = result.scored.arrays.get("score")
        if score is not None:
            finite = score[np.isfinite(score)]
            self.negative += int((finite < 0).sum())
            self.scored += len(finite)

    def words(self) -> str:
        """What stands beside the progress bar."""
        words = f"loss {self.train_loss:.3f}"
        if self.val is not None:
            words += f", val {self.val.loss:.3f}"
        if self.scored:
            words += f", scoring {self.score_share:.0%} of the time"
        return words

    @property
    def train_loss(self) -> float | None:
        """Mean of the last steps; None before the first."""
        return float(np.mean(self.losses)) if self.losses else None

    @property
    def score_share(self) -> float | None:
        """Share of the steps' time that scoring took; None where nothing was scored."""
        return self.score_seconds / self.seconds if self.scored else None

    def report(self, **rest: Any) -> TrainReport:
        """The report of these steps; ``rest`` are its other fields."""
        return TrainReport(
            tokens=self.tokens,
            train_loss=self.train_loss,
            val_loss=None if self.val is None else self.val.loss,
            val_loss_by_domain={} if self.val is None else self.val.by_domain,
            tokens_per_second=self.tokens / self.seconds if self.seconds else None,
            score_share=self.score_share,
            negative_share=self.negative / self.scored if self.scored else None,
            **rest,
        )
