"""The training loop: one optimizer step, and the run of them. Readable in one sitting.

Legend: B samples of a micro-batch, or candidates of a rank; A micro-batches of a step on one rank, R ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ghoststore.errors import DivergedError
from ghoststore.progress import Task
from ghoststore.settings.train import OptimizationConfig, TrainConfig
from indexer.dotprod import Scores
from indexer.dotprod.scoring_batch import ScoringBatch
from indexer.encode.losses import IGNORED, own_losses, training_loss
from indexer.encode.modes import devices_of, reseed
from indexer.projection import draws
from indexer.session.chooser import Chooser, Scored
from indexer.session.ranks import Ranks
from indexer.session.session import ScoredStep, ScoringSession
from indexer.training.data import Batch, Order, TrainingRows
from indexer.training.scoring import ValSchedule
from indexer.training.share import Part, Share, even


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One finished optimizer step."""

    step: int
    """From 0."""
    learning_rate: float
    """0 where a loss scaler left the step out: it moved nothing."""
    train_loss: float
    """Mean over all targets of the step, nats a token."""
    grad_norm: float
    """Before clipping; infinite or NaN where a loss scaler left the step out."""
    tokens: int
    """Tokens that all ranks trained on, without padding."""
    seconds: float
    scored: ScoredStep
    """This rank's part of it: sample, loss, score, …, each (A·B, …), and the time that scoring took."""

    def shared(self, val_loss: float | None) -> dict[str, float]:
        """Numbers that are the same for every rank, with the val loss after it where there is one."""
        shared = {
            "learning_rate": self.learning_rate,
            "train_loss": self.train_loss,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        return shared if val_loss is None else {**shared, "val_loss": val_loss}


REHEARSALS = 2
"""How often :meth:`Trainer.rehearse` makes the passes of a step: the first ones do what later ones need not."""


class ScoredBatch(NamedTuple):
    """A micro-batch of candidates."""

    losses: NDArray[np.float32]
    """(B,)."""
    scores: Scores
    held: ScoringBatch
    """What gradients are formed from, where one pass is all."""


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


def autocast(config: TrainConfig, device: str) -> AbstractContextManager[Any]:
    """The arithmetic of a forward pass under ``config``."""
    if not config.autocast:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, config.arithmetic))


def make_scaler(config: TrainConfig, device: str, state: Mapping[str, float]) -> torch.amp.GradScaler | None:
    """The loss scaler of float16, in ``state`` (empty: new); None for other arithmetic."""
    if config.arithmetic != "float16":
        return None
    scaler = torch.amp.GradScaler(torch.device(device).type)
    if state:
        counts = {name: int(state[name]) for name in ("growth_interval", "_growth_tracker")}
        scaler.load_state_dict({**scaler.state_dict(), **state, **counts})
    return scaler


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
    session: ScoringSession
    val_schedule: ValSchedule | None
    """None: samples are not scored."""
    scaler: torch.amp.GradScaler | None
    chooser: Chooser | None = None
    """None: a step trains on all that it draws."""

    def step(self, step: int) -> StepResult:
        """One optimizer step. The same for the same step number, weights and optimizer state, on every machine run."""
        begun = time.perf_counter()
        config = self.config.optimization
        warmup = default_warmup(self.steps) if config.warmup_steps is None else config.warmup_steps
        eta = learning_rate(step, self.steps, warmup, config)
        for group in self.optimizer.param_groups:
            group["lr"] = eta
        if self.chooser is None:
            share = Share.drawn(self.rows, self.order.rows_of(step), self.ranks, config.gradient_accumulation_steps)
            loss_sum = self._passes(share, step)
        else:
            share, loss_sum = self._choose_and_pass(self.chooser, step)
        train_loss = float(self.ranks.sum(loss_sum)) / self.ranks.count
        if not math.isfinite(train_loss):
            raise DivergedError.at(step + 1, f"the loss is {train_loss}")
        grad_norm = self._clip_and_update(step, config.max_grad_norm)
        return StepResult(
            step=step,
            learning_rate=eta if math.isfinite(grad_norm) else 0.0,
            train_loss=train_loss,
            grad_norm=grad_norm,
            tokens=share.tokens,
            seconds=time.perf_counter() - begun,
            scored=self.session.complete_step(),
        )

    def rehearse(self, step: int, task: Task) -> float:
        """About how many seconds each step takes from ``step`` on, measured before it is made: on its gradients and
        scores, and what a val gradient takes. The optimizer's part is not in it, which changes weights. ``task`` has
        REHEARSALS rounds.

        Nothing stays of it: weights, buffers, random state, scores are those of a training without it, bit for bit.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.inner.buffers()]
        # No gradient goes to other ranks: their sums would depend on the order in which these first came.
        with self._no_sync():
            self._rehearsed(step)
            task.advance(1)
            seconds_val = 0.0
            if self.val_schedule is not None:
                begun = time.perf_counter()
                with self.autocast(), self.val_schedule.shown():
                    self.val_schedule.engine.refresh(self._scale())
                self._synchronize()
                seconds_val = time.perf_counter() - begun
            seconds = self._rehearsed(step)
            task.advance(1)
        if self.val_schedule is not None:
            self.val_schedule.forget()  # its routes follow from the batch that it was taken for
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return seconds + seconds_val / self.config.val_refresh_interval

    def _rehearsed(self, step: int) -> float:
        """Seconds of the passes of ``step``, whose gradients and scores are dropped: of its micro-batches the first one
        stands for all, and where it chooses the first candidates are taken, for a policy may count its calls.
        """
        begun, times = time.perf_counter(), 1
        if self.chooser is None:
            accumulated = self.config.optimization.gradient_accumulation_steps
            share = Share.drawn(self.rows, self.order.rows_of(step), self.ranks, accumulated)
            times = len(share.parts)
            self._passes(replace(share, parts=share.parts[:1]), step)
        else:
            self._choose_and_pass(replace(self.chooser, begins_at=step + 1), step)
        self._synchronize()
        self.session.discard()
        self.optimizer.zero_grad(set_to_none=True)
        return (time.perf_counter() - begun) * times

    def _synchronize(self) -> None:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)

    def _passes(self, share: Share, step: int) -> Tensor:
        """Forward and backward of this rank's micro-batches; its share of the loss."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for place, part in enumerate(share.parts):
            last = place == len(share.parts) - 1
            self._seed(step, place)
            batch = self.rows.batch(part.rows).to(self.device)
            with nullcontext() if last else self._no_sync():
                loss_sum += self._micro_step(batch, part, share.targets, step)
        return loss_sum

    def _choose_and_pass(self, chooser: Chooser, step: int) -> tuple[Share, Tensor]:
        """Score this rank's candidates, choose among those of all, and form the gradients of the chosen."""
        drawn, ranks, size = self.order.rows_of(step), self.ranks, self.config.optimization.batch_size
        own = np.split(drawn, ranks.count)[ranks.rank]
        cuts = [own[start : start + size] for start in range(0, len(own), size)]
        scored = [self._score(rows, step, place) for place, rows in enumerate(cuts)]
        losses_B = np.concatenate([batch.losses for batch in scored])
        scores_B = torch.cat([batch.scores.total for batch in scored]).float().cpu().numpy()
        pairs, eta = scored[0].scores.pairs, float(self.optimizer.param_groups[0]["lr"])
        interactions = None if pairs is None else eta * pairs.cpu().numpy()
        common_B = chooser.common([batch.scores for batch in scored])
        weights_RB = chooser.weights(
            step, Scored(own, scores_B, losses_B, self.rows.length[own], common_B), interactions
        )
        ends = np.cumsum([len(rows) for rows in cuts])[:-1]
        for rows, batch, weights_B in zip(cuts, scored, np.split(weights_RB[ranks.rank], ends), strict=True):
            self.session.take(rows, batch.losses, batch.scores, weights_B)
        weights_RB = even(weights_RB)
        share = Share.chosen(self.rows, drawn, weights_RB, ranks, size, anew=chooser.over == "all")
        if self.config.choosing.choosing_passes == "two":
            return share, self._passes(share, step)
        counted_B = self.rows.target_counts(own) * weights_RB[ranks.rank].astype(np.float64) / share.targets
        chosen = counted_B > 0
        loss_sum = torch.tensor((counted_B * losses_B)[chosen].sum(), dtype=torch.float64, device=self.device)
        if bool(torch.isfinite(ranks.sum(loss_sum))):
            for batch, here_B in zip(scored, np.split(counted_B, ends), strict=True):
                # Summed over ranks, not averaged as by DistributedDataParallel.
                summed_B = torch.from_numpy(here_B / ranks.count).to(self.device)
                batch.held.add_gradients(summed_B if self.scaler is None else self._scaled(summed_B))
            ranks.add_up([p.grad for p in self.inner.parameters() if p.grad is not None])
        return share, loss_sum

    def _score(self, rows: NDArray[np.int64], step: int, place: int) -> ScoredBatch:
        """Some candidates, scored: no weight gradient is formed yet, and nothing goes to another rank."""
        assert self.val_schedule is not None
        begun, hold = time.perf_counter(), self.config.choosing.choosing_passes == "one"
        self._seed(step, place)
        batch = self.rows.batch(rows).to(self.device)
        with ExitStack() as stack:
            with self.autocast():
                opened = stack.enter_context(
                    self.val_schedule.scoring(self.session, batch, step, self._scale(), hold=hold)
                )
            with self.autocast():  # a block of its own, as below
                losses_B = own_losses(self._logits(self.inner, batch), batch.labels)
            scores = opened.scores(losses_B)
        losses = losses_B.detach().float().cpu().numpy()
        return ScoredBatch(losses, replace(scores, seconds=time.perf_counter() - begun), opened)

    @staticmethod
    def _logits(model: nn.Module, batch: Batch) -> Tensor:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits: Tensor = output.logits
        return logits

    def _micro_step(self, batch: Batch, part: Part, total_targets: float, step: int) -> torch.Tensor:
        """Forward and backward of one micro-batch; its share of the loss."""
        session, weights_B = self.session, None
        if self.chooser is None:
            with self.autocast():
                if self.val_schedule is not None:
                    self.val_schedule.prepare(session, batch, step, self._scale())
                else:
                    session.prepare(len(batch.rows), rows=batch.rows)
        elif part.weights is not None:
            weights_B = torch.from_numpy(part.weights).to(self.device)
        with self.autocast():  # a block of its own: autocast caches casts, and the val pass has made some
            logits = self._logits(self.model, batch)
            loss, losses_B = training_loss(logits, batch.labels, total_targets, weights_B)
            del logits
        if self.chooser is None and session.engine is not None:
            # The engine's own watch(): the session's would wait for the loss, which this loop leaves on the device.
            targets_B = (batch.labels[:, 1:] != IGNORED).sum(1)
            session.engine.watch(loss, weights=targets_B / total_targets)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        if self.chooser is None:
            session.collect(losses_B.float().cpu().numpy())
        return loss.detach().double()

    def _clip_and_update(self, step: int, max_norm: float) -> float:
        """The optimizer's step; the norm of the gradient before clipping. Under a loss scaler, a step whose gradient
        is out of range is left out, as long as a smaller scale may help.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        scale = self._scale()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(torch.isfinite(norm)) and (self.scaler is None or scale <= 1.0):
            raise DivergedError.at(step + 1, f"the norm of the gradient is {float(norm)}")
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While steps are made: the engine is attached, the model in training mode. The caller's random state is put
        back.
        """
        self.model.train()
        with torch.random.fork_rng(devices=devices_of(self.model)), self.session.engine or nullcontext():
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the forward pass."""
        return autocast(self.config, self.device)

    @property
    def inner(self) -> nn.Module:
        """The model itself."""
        wrapped = self.model
        inner = wrapped.module if isinstance(wrapped, nn.parallel.DistributedDataParallel) else wrapped
        assert isinstance(inner, nn.Module)
        return inner

    def _no_sync(self) -> AbstractContextManager[Any]:
        model = self.model
        return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _scaled(self, values: Tensor) -> Tensor:
        assert self.scaler is not None
        scaled = self.scaler.scale(values)
        assert isinstance(scaled, Tensor)
        return scaled

    def _seed(self, step: int, micro_batch: int) -> None:
        """The random state of a micro-batch (dropout, a checkpoint's own too) follows from seed, step, rank and place:
        there is nothing to save.
        """
        key = f"ghoststore/1|dropout|seed={self.config.seed}|step={step}|rank={self.ranks.rank}|micro={micro_batch}"
        reseed(int(draws.bits(key, 1)[0] >> np.uint64(1)), devices_of(self.model))
