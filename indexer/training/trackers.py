"""Optional logging to TensorBoard and Weights & Biases. Neither is installed with ghoststore."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.settings.train import TrainConfig
from indexer.session.ranks import Ranks
from indexer.training.loop import StepResult
from indexer.training.validation import ValLoss


class _Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...


@dataclass(slots=True)
class Trackers:
    """Whoever is told of each step."""

    trackers: list[_Tracker] = field(default_factory=list)

    @classmethod
    @contextmanager
    def open(
        cls, tensorboard: str | Path | None, wandb: str | None, config: TrainConfig, ranks: Ranks
    ) -> Iterator[Trackers]:
        """Trackers for a TensorBoard folder and a Weights & Biases project; nothing on ranks that do not lead.

        Weights & Biases works offline unless WANDB_MODE says otherwise. UsageError that says what to install.
        """
        opened = cls()
        with ExitStack() as stack:

            def begin() -> None:
                if tensorboard is not None:
                    opened.trackers.append(stack.enter_context(closing(_TensorBoard(tensorboard))))
                if wandb is not None:
                    run = _wandb(wandb, config)
                    stack.callback(run.finish)
                    opened.trackers.append(run)

            ranks.led(begin)
            yield opened

    def step(self, result: StepResult, val_loss: ValLoss | None) -> None:
        """Tell of one step."""
        if not self.trackers:
            return
        values = {
            "train/loss": result.train_loss,
            "train/learning_rate": result.learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/tokens_per_second": result.tokens / result.seconds,
        }
        if val_loss is not None:
            values["val/loss"] = val_loss.loss
            values |= {f"val/loss/{name}": loss for name, loss in val_loss.by_domain.items()}
        score = result.scored.arrays.get("score")
        if score is not None and np.isfinite(score).any():
            finite = score[np.isfinite(score)]
            values["scores/mean"] = float(finite.mean())
            values["scores/negative_share"] = float((finite < 0).mean())
            values["scores/share_of_time"] = result.scored.seconds / result.seconds
        for tracker in self.trackers:
            tracker.log(values, step=result.step + 1)


class _TensorBoard:
    """An event file in ``folder``, begun at the first step: what an interrupted run logged from there on is void."""

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("`tensorboard` needs TensorBoard: pip install tensorboard") from error
        self._open: Any = SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None

    def log(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = self._open(self._folder, purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _wandb(project: str, config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError("`wandb` needs Weights & Biases: pip install wandb") from error
    return wandb.init(project=project, config=asdict(config), mode=os.environ.get("WANDB_MODE", "offline"))
