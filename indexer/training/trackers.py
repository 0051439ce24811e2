"""Optional logging to TensorBoard and Weights & Biases. Neither is installed with ghoststore."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ghoststore.errors import UsageError
from ghoststore.settings.train import TrainConfig
from ghoststore.store.run.run import Run
from indexer.session.ranks import Ranks
from indexer.training.data import TrainingRows
from indexer.training.loop import StepResult
from indexer.training.score_summary import COLUMNS, Logged, RankedSamples, ScoreSummary
from indexer.training.validation import ValLoss


class _Tracker(Protocol):
    def log(self, values: dict[str, Logged], step: int) -> None: ...


@dataclass(slots=True)
class Trackers:
    """The loggers that get the numbers of each step."""

    trackers: list[_Tracker] = field(default_factory=list)
    summary: ScoreSummary | None = None
    """Of the scores at save intervals; None without a run."""

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
                    opened.trackers.append(stack.enter_context(closing(_Wandb(wandb, config))))

            ranks.led(begin)
            yield opened

    def summarize(self, rows: TrainingRows, run: Run | None) -> None:
        """From the next step on, sum up scores wherever the save interval of ``run`` ends."""
        if self.trackers and run is not None:
            self.summary = ScoreSummary(rows, run.layout)

    def step(self, result: StepResult, val_loss: ValLoss | None) -> None:
        """Log one step."""
        if not self.trackers:
            return
        values: dict[str, Logged] = {
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
        weight = result.scored.arrays.get("weight")
        if weight is not None:
            values["scores/kept_share"] = float((weight > 0).mean())
        if self.summary is not None:
            values |= self.summary.add(result)
        for tracker in self.trackers:
            tracker.log(values, step=result.step + 1)


class _TensorBoard:
    """An event file in ``folder``. It begins at the first step of this call: what an interrupted run logged of later
    steps no longer counts.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("`tensorboard` needs TensorBoard: pip install tensorboard") from error
        self._open: Any = SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None

    def log(self, values: dict[str, Logged], step: int) -> None:
        if self._writer is None:
            self._writer = self._open(self._folder, purge_step=step)
        for name, value in values.items():
            if isinstance(value, RankedSamples):
                self._writer.add_text(name, _markdown(value), step)
            elif isinstance(value, np.ndarray):
                self._writer.add_histogram(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _markdown(samples: RankedSamples) -> str:
    """A table of ``samples``, whose texts are escaped: they have no markup."""
    rows = [(f"{score:.4g}", *map(_plain, words)) for score, *words in samples.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ("---",) * len(COLUMNS), *rows))


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~&])", r"\\\1", text)


class _Wandb:
    """A run of a Weights & Biases project."""

    def __init__(self, project: str, config: TrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError("`wandb` needs Weights & Biases: pip install wandb") from error
        self._wandb: Any = wandb
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(project=project, config=asdict(config), mode=mode)

    def log(self, values: dict[str, Logged], step: int) -> None:
        shown: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, RankedSamples):
                shown[name] = self._wandb.Table(columns=list(COLUMNS), data=[list(row) for row in value.rows])
            else:
                shown[name] = self._wandb.Histogram(value) if isinstance(value, np.ndarray) else value
        self._run.log(shown, step=step)

    def close(self) -> None:
        self._run.finish()
