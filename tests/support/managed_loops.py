"""Training loops with the calls of GhostEngineManager, or without any: what the tests of the manager share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore import GhostConfig, GhostEngineManager
from tests.support.loops import (
    ROWS,
    VAL,
    VAL_BATCH,
    Plan,
    batch_of,
    close_to,
    exact_scores,
    run_of,
    steps_of,
)
from tests.support.models import gpt2
from tests.support.scoring import val_batch

METHODS = ("GradDotProd", "GradProjLora", "Regular")


def config_of(store: Path | None, steps: int = 7, **settings: Any) -> GhostConfig:
    given = {"max_steps": steps, "batch_size": 4, "samples": len(ROWS), "dot_prod_save_interval": 3, **settings}
    return GhostConfig(store=store, **given)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@dataclass
class Loop:
    """A training loop with the manager's calls, or without any."""

    steps: Plan
    manager: GhostEngineManager | None = None
    clip: float | None = None
    autocast: torch.dtype | None = None
    scaler: Any = None
    seen: Callable[[Any, int], None] = lambda model, step: None

    def run(self, model: Any, optimizer: torch.optim.Optimizer, first: int = 0, last: int | None = None) -> None:
        for iteration in range(first, len(self.steps) if last is None else last):
            self.seen(model, iteration)
            self.step(model, optimizer, iteration)

    def step(self, model: Any, optimizer: torch.optim.Optimizer, iteration: int) -> None:
        manager, micro_batches = self.manager, self.steps[iteration]
        for places in micro_batches:
            X, Y, batch_idx = batch_of(places)
            with torch.autocast("cpu", dtype=self.autocast) if self.autocast else nullcontext():
                if manager:
                    manager.attach_train_batch(X, Y, iteration, batch_idx)
                    X, Y = manager.prepare_forward_input(X, Y)
                loss = model(input_ids=X, labels=Y).loss
            loss = loss / len(micro_batches)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            if manager:
                manager.prepare_gradients()
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if self.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        if manager:
            manager.aggregate_and_log()
            manager.clear_gradients()
        optimizer.zero_grad(set_to_none=True)


def oracle(steps: Plan) -> tuple[dict[int, Tensor], Callable[[Any, int], None]]:
    """Exact scores by step, and what a loop calls before each step to fill them in."""
    found: dict[int, Tensor] = {}

    def seen(model: Any, step: int) -> None:
        found[step] = exact_scores(model, [place for places in steps[step] for place in places])

    return found, seen


def train(
    steps: Plan, config: Any, *, val: Any = VAL_BATCH, fresh: Callable[[], Any] = gpt2, **settings: Any
) -> tuple[Any, dict[int, Tensor]]:
    """A whole training with the manager; the model and the exact scores."""
    model = fresh()
    optimizer = sgd(model)
    expected, seen = oracle(steps)
    scaler = settings.get("scaler")
    with GhostEngineManager(config, model, optimizer, val_data=val, scaler=scaler) as manager:
        Loop(steps, manager, seen=seen, **settings).run(model, optimizer)
    return model, expected


def plain(steps: Plan, *, fresh: Callable[[], Any] = gpt2, **settings: Any) -> Any:
    model = fresh()
    Loop(steps, **settings).run(model, sgd(model))
    return model


def check_scores(store: Path, steps: Plan, expected: dict[int, Tensor], tolerance: float = 1e-5) -> None:
    found = list(steps_of(run_of(store)))
    assert [step for step, _, _ in found] == list(range(len(steps)))
    for step, places, scores in found:
        assert places.tolist() == [place for micro in steps[step] for place in micro]
        close_to(scores, expected[step], tolerance)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulation": 4, "batch": 2},
    "clipping": {"clip": 0.1},
    "autocast": {"autocast": torch.bfloat16},
    "scaler": {"scaled": True, "accumulation": 2},
}


VAL_FORMS: dict[str, Any] = {
    "tuple": (VAL_BATCH["input_ids"], VAL_BATCH["labels"], VAL_BATCH["attention_mask"]),
    "dict": VAL_BATCH,
    "batches": [val_batch(VAL[:1]), val_batch(VAL[1:])],
}


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Bench:
    """A manager half way: what a test does to it must be an error that says what to do."""

    def __init__(self, store: Path) -> None:
        self.model = gpt2()
        self.optimizer = sgd(self.model)
        self.manager = GhostEngineManager(
            config_of(store, gradient_accumulation_steps=2), self.model, self.optimizer, val_data=VAL_BATCH
        )
        self.X, self.Y, self.batch_idx = batch_of([0, 1, 2, 3])

    def attach(self, step: int = 0, places: Any = None) -> None:
        self.manager.attach_train_batch(self.X, self.Y, step, self.batch_idx if places is None else places)

    def prepare(self) -> None:
        self.manager.prepare_forward_input(self.X, self.Y)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.X, labels=self.Y).loss

    def score(self, step: int = 0) -> None:
        self.attach(step)
        self.prepare()
        self.forward().backward()
        self.manager.prepare_gradients()

    def whole(self, step: int = 0) -> None:
        self.score(step)
        self.optimizer.step()
        self.manager.aggregate_and_log()
        self.optimizer.zero_grad()
