"""The manager in several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore import GhostEngineManager
from ghoststore.errors import MismatchError, UsageError, WorkerError
from tests.support.loops import (
    VAL_BATCH,
    batch_of,
    close_to,
    exact_scores,
    identical,
    in_ranks,
    plan,
    run_of,
    weights_of,
)
from tests.support.managed_loops import (
    Loop,
    config_of,
    sgd,
)
from tests.support.models import gpt2


@pytest.mark.parametrize("info", [{"rank": 0, "world_size": 1}, {"ddp_rank": 0, "ddp_world_size": 1}, {"ddp": False}])
def test_forms_of_ddp_info(info: dict[str, Any]) -> None:
    model = gpt2()
    with GhostEngineManager({"method": "GradDotProd"}, model, sgd(model), VAL_BATCH, ddp_info=info) as manager:
        assert manager.ranks.leads


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({}, "needs rank and world_size"),
        ({"rank": 0}, "needs rank and world_size.*'rank'"),
        ({"rank": 1, "world_size": 2}, "rank 1 of 2; torch.distributed says rank 0 of 1"),
    ],
)
def test_ddp_info_that_cannot_be(info: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GhostEngineManager({"method": "GradDotProd"}, gpt2(), sgd(gpt2()), VAL_BATCH, ddp_info=info)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_and_a_model_in_ddp(tmp_path: Path) -> None:
    steps = plan(8, 3)
    config = config_of(tmp_path / "store", 4, batch_size=3)
    states = tmp_path / "states"

    def rank_loop(rank: int, first: int, last: int, *, scored: bool, resume: bool = False) -> dict[str, Tensor]:
        inner = gpt2()
        if resume:
            inner.load_state_dict(torch.load(f"{states}-model"))
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        mine = [steps[2 * step + rank] for step in range(4)]
        if not scored:
            Loop(mine).run(model, optimizer, first, last)
            return weights_of(inner)
        info = {"rank": rank, "world_size": 2}
        manager = GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH, ddp_info=info)
        if resume:
            manager.load_state_dict(torch.load(f"{states}-ghosts"))
        Loop(mine, manager).run(model, optimizer, first, last)
        if last == 2:
            found = manager.state_dict()
            if rank == 0:
                torch.save(found, f"{states}-ghosts")
                torch.save(inner.state_dict(), f"{states}-model")
        manager.cleanup()
        return weights_of(inner)

    def work(rank: int) -> None:
        rank_loop(rank, 0, 2, scored=True)
        torch.distributed.barrier()
        found = rank_loop(rank, 2, 4, scored=True, resume=True)
        assert identical(found, rank_loop(rank, 0, 4, scored=False))
        # What the first rank cannot do is an error on both.
        other = replace(config, val_refresh_interval=2)
        with pytest.raises(MismatchError if rank == 0 else WorkerError):
            GhostEngineManager(other, gpt2(), sgd(gpt2()), val_data=VAL_BATCH)
        # Data in another order: both hear of it.
        model = gpt2()
        optimizer = sgd(model)
        with (
            pytest.raises(MismatchError, match="has step 0 already"),
            GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH) as manager,
        ):
            Loop([steps[2 * step + 1 - rank] for step in range(4)], manager).run(model, optimizer)

    in_ranks(2, work, tmp_path)
    run = run_of(tmp_path / "store")
    assert run.complete
    sample, score = run.read_committed("sample"), run.read_committed("score")
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        for rank in range(2):
            places = steps[2 * step + rank][0]
            assert sample[step, rank][: len(places)].tolist() == places
            close_to(score[step, rank][: len(places)], exact_scores(model, places))
        for rank in range(2):  # gradients of DDP are the mean over ranks
            X, Y, _ = batch_of(steps[2 * step + rank][0])
            (model(input_ids=X, labels=Y).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (run.read_committed("tokens") > 0).all()
