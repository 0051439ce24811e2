"""The training loop: one optimizer step, and the run of them. Readable in one sitting.

Legend: B samples of a micro-batch, A micro-batches of a step on one rank, R ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ghoststore.errors import CaptureError
from indexer import draws
from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.parameters import devices_of
from indexer.losses import training_loss
from indexer.training.config import OptimizationConfig, ScoringConfig, TrainConfig
from indexer.training.data import Batch, Order, TrainingRows
from indexer.training.ranks import Ranks
from indexer.training.validation import ValSet


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One finished optimizer step."""

    step: int
    """From 0."""
    learning_rate: float
    train_loss: float
    """Mean over all targets of the step, nats a token."""
    grad_norm: float
    """Before clipping; NaN where it is not computed."""
    tokens: int
    """Tokens of all ranks, without padding."""
    seconds: float
    score_seconds: float
    """Of these, spent on scoring (host time)."""
    own: dict[str, NDArray[Any]]
    """This rank's arrays for the store: sample, loss, score, …, each (A·B, …)."""


def learning_rate(step: int, steps: int, warmup: int, config: OptimizationConfig) -> float:
    """η of ``step`` (from 0): linear to the peak over ``warmup`` steps, then half a cosine down to the floor."""
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def default_warmup(steps: int) -> int:
    """A twentieth of the steps, at most 2,000."""
    return min(2000, max(1, steps // 20))


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2))


@dataclass(slots=True)
class Trainer:
    """Everything that a step needs. ``model`` may be wrapped in DistributedDataParallel."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rows: TrainingRows
    order: Order
    config: TrainConfig
    ranks: Ranks
    device: str
    steps: int
    scorer: Scorer | None
    scaler: torch.amp.GradScaler | None

    def step(self, step: int) -> StepResult:
        """One optimizer step. The same for the same step number, weights and optimizer state, on every machine run."""
        begun = time.perf_counter()
        asked = self.config.optimization
        warmup = default_warmup(self.steps) if asked.warmup_steps is None else asked.warmup_steps
        eta = learning_rate(step, self.steps, warmup, asked)
        for group in self.optimizer.param_groups:
            group["lr"] = eta
        rows_of_step = self.order.rows_of(step)
        # Gradients are averaged over ranks: each rank divides by the targets of all, over the number of ranks.
        total_targets = float(self.rows.targets[rows_of_step].sum()) / self.ranks.count
        mine = np.split(rows_of_step, self.ranks.count)[self.ranks.rank]
        micro_batches = np.split(mine, asked.gradient_accumulation_steps)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        parts: list[dict[str, NDArray[Any]]] = []
        for place, rows in enumerate(micro_batches):
            last = place == len(micro_batches) - 1
            self._seed(step, place)
            batch = self.rows.batch(rows).to(self.device)
            with nullcontext() if last else self._no_sync():
                loss, part = self._micro_step(batch, total_targets, step)
            loss_sum += loss
            parts.append(part)
        grad_norm = self._clip_and_update(asked.max_grad_norm)
        if self.scorer is not None:
            self.scorer.engine.stepped()
        train_loss = float(self.ranks.sum(loss_sum)) / self.ranks.count
        own = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return StepResult(
            step=step, learning_rate=eta, train_loss=train_loss, grad_norm=grad_norm,
            tokens=int(self.rows.length[rows_of_step].sum()), seconds=time.perf_counter() - begun,
            score_seconds=self.scorer.take_seconds() if self.scorer else 0.0, own=own,
        )  # fmt: skip

    def _micro_step(
        self, batch: Batch, total_targets: float, step: int
    ) -> tuple[torch.Tensor, dict[str, NDArray[Any]]]:
        """Forward and backward of one micro-batch; (its share of the loss, its arrays for the store)."""
        if self.scorer is not None:
            with self.autocast():
                self.scorer.prepare(batch, step, self._scale())
        with self.autocast():
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            loss, losses_B = training_loss(logits, batch.labels, total_targets)
            del logits
        if self.scorer is not None:
            self.scorer.watch(loss, batch, total_targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        part: dict[str, NDArray[Any]] = {"sample": batch.rows, "loss": losses_B.float().cpu().numpy()}
        if self.scorer is not None:
            part |= self.scorer.collect()
        return loss.detach().double(), part

    def _clip_and_update(self, max_norm: float) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm) if max_norm > 0 else torch.tensor(math.nan)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the forward pass."""
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=getattr(torch, self.config.arithmetic))

    def _no_sync(self) -> AbstractContextManager[Any]:
        model = self.model
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _seed(self, step: int, micro_batch: int) -> None:
        """The random state of a micro-batch (dropout, a checkpoint's own too) follows from seed, step, rank and place:
        there is nothing to save.
        """
        key = f"ghoststore/1|dropout|seed={self.config.seed}|step={step}|rank={self.ranks.rank}|micro={micro_batch}"
        torch.manual_seed(int(draws.bits(key, 1)[0] >> np.uint64(1)))


class Scorer:
    """The engine, fed with val samples as the configuration says. One a rank."""

    def __init__(
        self,
        engine: GradDotProdEngine,
        val: ValSet,
        config: ScoringConfig,
        *,
        checkpoint_interval: int,
        groups: list[str],
        blocks: list[str],
        vectors: bool = False,
    ) -> None:
        self.engine = engine
        self.val = val
        self.config = config
        self.groups = groups
        """Names of the val groups of the run; empty without groups."""
        self.blocks = blocks
        """Names of the blocks whose scores are kept; empty where none are."""
        self.vectors = vectors
        self._step: int | None = None
        self._checkpoint_interval = checkpoint_interval
        self._seconds = 0.0
        self._rows: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def prepare(self, batch: Batch, step: int, loss_scale: float) -> None:
        """Open the engine for ``batch``; if the val gradient is due, choose its val samples first.

        It is due at multiples of the refresh interval, and after a checkpoint, where a resumed run has none.
        """
        interval = self.config.val_refresh_interval
        if step != self._step and (self._step is None or not step % interval or not step % self._checkpoint_interval):
            chosen = self.val.chosen(step // interval, self.config.val_batch_size, self.config.val_sampling)
            batches, places = self.val.batches(chosen.tolist())
            names = [self.val.domain_of(place) for place in places]
            self.engine.set_validation(batches, names if self.groups else None)
        self._step = step
        self.engine.prepare(len(batch.rows), tokens=batch.input_ids.numel(), loss_scale=loss_scale)

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
        if self.vectors:
            if scores.vectors is None:
                raise CaptureError("the exact score has no vectors; only the sketched one has")
            found["vector"] = scores.vectors.cpu().numpy()
        return found

    def take_seconds(self) -> float:
        """Time spent on scoring since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _stored(values: torch.Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


def run_steps(
    trainer: Trainer,
    first: int,
    *,
    on_step: Callable[[StepResult], None],
) -> None:
    """Steps ``first`` to the last, the engine attached and the model in training mode. The caller's random state is
    put back.
    """
    trainer.model.train()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices_of(trainer.model)))
        if trainer.scorer is not None:
            stack.enter_context(trainer.scorer.engine)
        for step in range(first, trainer.steps):
            on_step(trainer.step(step))
