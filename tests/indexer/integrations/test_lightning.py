"""Lightning's Trainer: scores in `training_step`, weights as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ghoststore import GradDotProdEngine
from tests.support.loops import VAL_BATCH, batch_of, close_to, exact_scores, identical, plan, weights_of
from tests.support.models import gpt2

lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed: pip install '.[dev]'")

STEPS = 5


def still() -> Any:
    return gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A language model whose engine is attached once Lightning has made the optimizer."""

    def __init__(self, *, scored: bool) -> None:
        super().__init__()
        self.model = still()
        self.scored = scored
        self.found: list[Tensor] = []
        self.expected: list[Tensor] = []
        self.engine: GradDotProdEngine | None = None

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def on_train_start(self) -> None:
        if self.scored:
            self.engine = GradDotProdEngine(self.model, VAL_BATCH, optimizer=self.optimizers()).attach()

    def training_step(self, batch: Any, index: int) -> Tensor:
        ids, labels, places = batch
        if self.engine is None:
            return self.model(input_ids=ids, labels=labels).loss
        self.expected.append(exact_scores(self.model, places.tolist(), still))
        self.engine.prepare(len(ids))
        loss = self.model(input_ids=ids, labels=labels).loss
        self.engine.watch(loss, labels=labels)
        return loss

    def on_after_backward(self) -> None:
        if self.engine is not None:
            self.found.append(self.engine.collect().total)

    def on_train_end(self) -> None:
        if self.engine is not None:
            self.engine.detach()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_stays_what_it_is_and_scores_are_exact(accumulation: int, tmp_path: Path) -> None:
    batches = [batch_of(places) for parts in plan(STEPS, accumulation=accumulation) for places in parts]
    weights = []
    for scored in (True, False):
        module = Module(scored=scored)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            accumulate_grad_batches=accumulation,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        weights.append(weights_of(module.model))
        assert len(module.found) == (len(batches) if scored else 0)
        for found, expected in zip(module.found, module.expected, strict=True):
            close_to(found.numpy(), expected, 2e-5)
    assert identical(*weights)
