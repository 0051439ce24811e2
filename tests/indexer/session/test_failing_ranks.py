"""What fails on one of two ranks alone ends both, with words that say what failed, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ghoststore import Choosing, GhostConfig, GhostEngineManager
from ghoststore.errors import GhostStoreError, UsageError, WorkerError
from indexer.dotprod.val_data import language_model_losses
from indexer.session.chooser import Chooser, Scored
from indexer.session.policies import Candidates
from indexer.session.ranks import Ranks
from tests.support.loops import VAL_BATCH, batch_of, in_ranks
from tests.support.managed_loops import sgd
from tests.support.models import gpt2
from tests.support.trainers import callback_of, trainer_of

pytestmark = pytest.mark.ddp


def bad_on_rank_1(candidates: Candidates) -> Any:
    """A policy that has read a file of its machine's, say."""
    if dist.get_rank() == 1:
        raise FileNotFoundError("quality.txt")
    return np.ones(len(candidates))


def uneven_on_rank_1(candidates: Candidates) -> Any:
    return np.arange(len(candidates)) + 1.0 if dist.get_rank() == 1 else np.ones(len(candidates))


def no_losses_on_rank_1(model: nn.Module, batch: Any) -> torch.Tensor:
    if dist.get_rank() == 1:
        raise KeyError("labels")
    return language_model_losses(model, batch)


def managed(choosing: Choosing | None, val_losses: Any = None) -> None:
    """Steps of a loop under DDP; after an error the step is made again with what works on both ranks."""
    inner = gpt2().train()
    model, optimizer = nn.parallel.DistributedDataParallel(inner), sgd(inner)
    config = GhostConfig(choosing=choosing)
    with GhostEngineManager(config, model, optimizer, val_data=VAL_BATCH, val_losses=val_losses) as manager:
        X, Y, _ = batch_of([0, 1, 2, 3])
        manager.attach_train_batch(X, Y, 0)
        manager.prepare_forward_input(X, Y)
        model(input_ids=X, labels=Y).loss.backward()
        manager.prepare_gradients()


def of_train(policy: Any) -> None:
    """A step's decision in ``ghoststore train``; each rank has candidates of its own."""
    ranks = Ranks.here()
    own = np.arange(3) + 3 * ranks.rank
    numbers = own.astype(np.float32)
    chooser = Chooser(policy, 2, 0, 0, ranks, "all")
    chooser.weights(5, Scored(own, numbers, numbers, own + 1))


def trained(folder: Path) -> None:
    """transformers' Trainer: the callback's policy fails."""
    callback = callback_of(folder / "store", choosing=Choosing(policy=bad_on_rank_1), name="run")
    trainer_of(folder, [callback], max_steps=2, per_device_train_batch_size=7, ddp_backend="gloo").train()


NAMED = rf"`policy={__name__}\.bad_on_rank_1` failed on rank 1 in step \d: FileNotFoundError: quality\.txt"
FAILING: dict[str, tuple[Callable[[Path], None], type[GhostStoreError] | type[KeyError], str]] = {
    # What is done, the error of the rank that fails, and words of both ranks' errors.
    "train": (lambda folder: of_train(bad_on_rank_1), UsageError, NAMED),
    "manager": (lambda folder: managed(Choosing(policy=bad_on_rank_1)), UsageError, NAMED),
    "unequal": (lambda folder: managed(Choosing(policy=uneven_on_rank_1)), UsageError, "weighs its samples alike"),
    "val-losses": (lambda folder: managed(None, no_losses_on_rank_1), KeyError, "labels"),
    "callback": (trained, UsageError, NAMED),
}
FAST = ("train", "manager")


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAILING])
def test_both_ranks_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, own_error, words = FAILING[name]

    def on(rank: int) -> None:
        for variable, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(variable, str(value))
        with pytest.raises(own_error if rank == 1 else WorkerError, match=words) as caught:
            work(tmp_path)
        if rank == 0:
            assert str(caught.value).startswith("rank 1 could not go on: ")
            assert caught.value.exit_code == getattr(own_error, "exit_code", 1)
        assert int(Ranks.here().sum(torch.tensor(rank))) == 1  # no rank waits for the other

    in_ranks(2, on, tmp_path)


def test_ranks_that_do_not_agree(tmp_path: Path) -> None:
    def on(rank: int) -> None:
        with pytest.raises(UsageError, match=rf"gave other weights on rank {1 - rank} than on rank {rank} in step 5"):
            of_train(uneven_on_rank_1)

    in_ranks(2, on, tmp_path)


@pytest.mark.slow
def test_a_val_gradient_that_failed_on_one_rank_is_due_on_both(tmp_path: Path) -> None:
    """The step may be made again: no rank has a val gradient that the other lacks."""
    calls = []

    def once(model: nn.Module, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if dist.get_rank() == 1 and len(calls) == 1:
            raise KeyError("labels")
        return language_model_losses(model, batch)

    def on(rank: int) -> None:
        inner = gpt2().train()
        model, optimizer = nn.parallel.DistributedDataParallel(inner), sgd(inner)
        with GhostEngineManager(GhostConfig(), model, optimizer, val_data=VAL_BATCH, val_losses=once) as manager:
            X, Y, _ = batch_of([0, 1, 2, 3])
            for attempt in range(2):
                manager.attach_train_batch(X, Y, 0)
                if not attempt:
                    with pytest.raises((KeyError, WorkerError)):
                        manager.prepare_forward_input(X, Y)
                    manager.clear_gradients()
                    continue
                manager.prepare_forward_input(X, Y)
                model(input_ids=X, labels=Y).loss.backward()
                manager.prepare_gradients()

    in_ranks(2, on, tmp_path)
