"""Data parallel: each rank's scores are those of one process, and the gradients are averaged as without the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from indexer.dotprod import GradDotProdEngine
from tests.support.models import settle
from tests.support.scoring import agree, exact_plain, sum_of_squares

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

STEPS, RANKS = 3, 2
ALL_OF_ONE_RANK = torch.tensor([0.0, 0.0, 0.25, 0.75])


class Tied(nn.Module):
    """Two uses of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.linear, self.norm, self.head = (
            nn.Embedding(8, 6),
            nn.Linear(6, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 8),
        )
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.linear(self.emb(ids)))))


def data(seed: int, count: int) -> Tensor:
    return torch.randint(8, (count, 5), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, batches: list[Tensor], *, scored: bool) -> dict[str, Any]:
    """Scores of each step; weights after the last; gradients of the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine = GradDotProdEngine(model, data(99, 3), val_losses=sum_of_squares, optimizer=optimizer, pairs=True)
    found: dict[str, Any] = {"totals": [], "gradients": [], "scored before": []}
    if scored:
        engine.attach()
    for ids in batches:
        if scored:
            with engine.scoring(len(ids)) as scoring:
                found["scored before"].append(scoring.scores(sum_of_squares(engine.model, ids)).total)
            assert all(p.grad is None for p in model.parameters())
            engine.prepare(len(ids))
        loss = sum_of_squares(model, ids).mean()
        if scored:
            engine.watch(loss)
        loss.backward()
        if scored:
            found["totals"].append(engine.collect().total)
        found["gradients"] = found["gradients"] or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    engine.detach()
    found["weights"] = [p.detach() for p in model.parameters()]
    return found


def in_one_pass(model: nn.Module, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """Gradients of Σ w_i ℓ_i from a scoring pass, summed over ranks where there are several."""
    with GradDotProdEngine(model, data(99, 3), val_losses=sum_of_squares) as engine:
        with engine.scoring(len(ids), hold=True) as scoring:
            scoring.scores(sum_of_squares(engine.model, ids))
        scoring.add_gradients(weights)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient in gradients if torch.distributed.is_initialized() else []:
        torch.distributed.all_reduce(gradient)
    return gradients


MAIN = """
import os
import sys
import torch
sys.path.insert(0, {root!r})
from tests.indexer.dotprod.test_dotprod_ddp import rank_main

torch.set_num_threads(1)
child = os.fork()  # everything imported once
rank_main(0 if child else 1, {folder!r})
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def rank_main(rank: int, folder: str) -> None:
    """What each of the two processes does: the same training with the engine and without."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    batches = [data(step, 2 * RANKS)[2 * rank : 2 * rank + 2] for step in range(STEPS)]
    found = {}
    for scored in (True, False):
        model = torch.nn.parallel.DistributedDataParallel(settle(Tied()))
        found[scored] = train(model, batches, scored=scored)
    model = torch.nn.parallel.DistributedDataParallel(settle(Tied()))
    own = slice(2 * rank, 2 * rank + 2)
    found[True]["in one pass"] = in_one_pass(model, data(0, 2 * RANKS)[own], ALL_OF_ONE_RANK[own])
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[bool, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    code = MAIN.format(root=str(Path(__file__).parents[2]), folder=str(folder))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_scores_of_the_ranks_are_those_of_one_process(ranks: list[dict[bool, Any]]) -> None:
    batches = [data(step, 2 * RANKS) for step in range(STEPS)]
    exact = exact_plain(settle(Tied()), batches[0], data(99, 3))
    whole = train(settle(Tied()), batches, scored=True)
    agree(whole["totals"][0], exact.total().mean(1))
    for step in range(STEPS):
        together = torch.cat([rank[True]["totals"][step] for rank in ranks])
        torch.testing.assert_close(together, whole["totals"][step], rtol=1e-5, atol=0)
    for one, other in zip(ranks[0][True]["weights"], whole["weights"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_scoring_pass_of_the_inner_module_has_the_scores_of_the_step(ranks: list[dict[bool, Any]]) -> None:
    for rank in ranks:
        for before, in_step in zip(rank[True]["scored before"], rank[True]["totals"], strict=True):
            torch.testing.assert_close(before, in_step, rtol=1e-5, atol=0)


def test_one_pass_gives_the_gradients_of_one_process_though_a_rank_chose_nothing(ranks: list[dict[bool, Any]]) -> None:
    model = settle(Tied())
    (sum_of_squares(model, data(0, 2 * RANKS)) @ ALL_OF_ONE_RANK).backward()
    for rank in ranks:
        for found, parameter in zip(rank[True]["in one pass"], model.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)


def test_gradients_are_averaged_and_the_ranks_stay_together(ranks: list[dict[bool, Any]]) -> None:
    for what in ("weights", "gradients"):
        for scored in (True, False):
            pairs = zip(ranks[0][scored][what], ranks[1][scored][what], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), "the replicas drift"
        pairs = zip(ranks[0][True][what], ranks[0][False][what], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), "the engine changes the training"
