"""Models of nanoGPT's form, which take their targets and return (logits, loss), against autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indexer.dotprod import GradDotProdEngine
from tests.support.models import settle
from tests.support.scoring import check, exact_of


class LayerNorm(nn.Module):
    """Without a name for its epsilon."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.norm, self.mlp, self.lm_head = LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        logits = self.lm_head(self.norm(x.cumsum(1) + torch.tanh(self.mlp(x))))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def drawn(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(20, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:].clone()


def test_scores_are_autograds_without_a_word_about_the_loss() -> None:
    for batch, val in ((drawn(4, 7, 0), drawn(3, 5, 1)), (drawn(5, 5, 2), drawn(2, 9, 3))):
        model = settle(NanoGPT())
        (x, y), (val_x, val_y) = batch, val
        val_y[0, :2] = -1

        def alone(model: Any, i: int, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss: Tensor = model(x[i : i + 1], y[i : i + 1])[1]
            return loss

        def val_alone(model: Any, i: int, x: Tensor = val_x, y: Tensor = val_y) -> Tensor:
            loss: Tensor = model(x[i : i + 1], y[i : i + 1])[1]
            return loss

        exact = exact_of(model, len(x), alone, len(val_x), val_alone)
        with GradDotProdEngine(model, val) as engine:
            engine.prepare(len(x))
            _, loss = model(x, y)
            engine.watch(loss, batch=batch)
            loss.backward()
            check(engine.collect(), exact)
