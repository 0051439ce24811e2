"""What the manager's training loss is of: the model's own, one that the loop watches, one that is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore import GhostEngineManager
from ghoststore.errors import UsageError
from indexer.encode.losses import next_token_losses
from indexer.session.own_loss import own_loss
from tests.support.loops import (
    VAL_BATCH,
    batch_of,
    close_to,
    exact_scores,
    run_of,
    steps_of,
)
from tests.support.managed_loops import (
    VAL_FORMS,
    class_losses,
    config_of,
    sgd,
)
from tests.support.models import gpt2, perceptron
from tests.support.scoring import agree, exact_of


def test_train_loss_of_uneven_micro_batches_is_the_mean_over_targets(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    micro_batches = [[0], [1, 4, 7, 13]]  # 24 tokens, and four short rows
    total, losses = 0, 0.0
    with GhostEngineManager(
        config_of(tmp_path / "store", 1, gradient_accumulation_steps=2), model, optimizer, VAL_BATCH
    ) as manager:
        for places in micro_batches:
            X, Y, batch_idx = batch_of(places)
            manager.attach_train_batch(X, Y, 0, batch_idx)
            manager.prepare_forward_input(X, Y)
            items = int((Y[:, 1:] != -100).sum())
            loss = model(input_ids=X, labels=Y).loss
            loss.backward()
            manager.prepare_gradients()
            total, losses = total + items, losses + loss.item() * items
        optimizer.step()
        manager.aggregate_and_log()
    assert run_of(tmp_path / "store").read_committed("train_loss")[0] == pytest.approx(losses / total, rel=1e-6)


def test_batches_that_are_mappings(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    exact = exact_scores(model, [0, 1, 2])
    X, Y, batch_idx = batch_of([0, 1, 2])
    mask = torch.arange(X.shape[1]) < torch.tensor([[24], [3], [11]])
    batch = {"input_ids": X, "attention_mask": mask.long(), "labels": Y}
    with GhostEngineManager(config_of(tmp_path / "store", 1), model, optimizer, val_data=VAL_BATCH) as manager:
        manager.attach_train_batch(batch, None, 0, batch_idx)
        forward, _ = manager.prepare_forward_input(batch, None)
        assert forward is batch
        model(**forward).loss.backward()  # the mean over targets, of which each row has another number
        manager.prepare_gradients()
        optimizer.step()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact)
    assert run_of(tmp_path / "store").read_committed("tokens").tolist() == [24 + 3 + 11]


def classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randint(5, (count,), generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_perceptron_with_losses_of_its_own(weighted: bool, tmp_path: Path) -> None:
    x, y = classes(12, 0)
    val = classes(4, 1)
    model = perceptron()
    optimizer = sgd(model)
    config = config_of(tmp_path / "store", 3, samples=12, per_layer=True)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5]) if weighted else None
    expected, blocks, losses = [], [], []
    with GhostEngineManager(config, model, optimizer, val_data=val, val_losses=class_losses) as manager:
        for step in range(3):
            places = torch.arange(4 * step, 4 * step + 4)
            twin = perceptron()
            twin.load_state_dict(model.state_dict())
            exact = exact_of(
                twin,
                4,
                lambda m, i, p=places: class_losses(m, (x[p[i : i + 1]], y[p[i : i + 1]])).sum(),
                4,
                lambda m, i: class_losses(m, (val[0][i : i + 1], val[1][i : i + 1])).sum(),
            )
            expected.append(exact.total().mean(1))
            blocks.append(exact.only(lambda name: name.startswith("2.")).total().mean(1))
            X, Y = x[places], y[places]
            manager.attach_train_batch(X, Y, step, places)
            X, Y = manager.prepare_forward_input(X, Y)
            each = class_losses(model, (X, Y))
            loss = each.mean() if weights is None else each @ weights
            manager.watch(loss, weights=weights)
            losses.append(loss.item() / (1.0 if weights is None else float(weights.sum())))
            loss.backward()
            manager.prepare_gradients()
            optimizer.step()
            manager.aggregate_and_log()
            optimizer.zero_grad()
            assert set(manager.last_scores[0].parameters) == {name for name, _ in model.named_parameters()}
    run = run_of(tmp_path / "store")
    for step, _, scores in steps_of(run):
        close_to(scores, expected[step])
    of_block = run.read_committed("block_score")[:, 0, :, run.layout.blocks.index("2")]
    np.testing.assert_allclose(of_block, torch.stack(blocks).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(run.read_committed("train_loss"), losses, rtol=1e-6)


def test_a_loss_of_ones_own_for_a_language_model(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = sgd(model)
    exact = exact_scores(model, [0, 1, 2, 3])
    with GhostEngineManager(config_of(None), model, optimizer, val_data=VAL_BATCH) as manager:
        X, Y, batch_idx = batch_of([0, 1, 2, 3])
        manager.attach_train_batch(X, Y, 0, batch_idx)
        X, Y = manager.prepare_forward_input(X, Y)
        logits = model(input_ids=X).logits
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), Y[:, 1:], ignore_index=-100)
        manager.watch(loss, labels=Y)
        loss.backward()
        manager.prepare_gradients()
        optimizer.step()
        manager.aggregate_and_log()
        agree(manager.last_scores[0].total, exact)


class Scaled(nn.Module):
    """A model whose loss is not what its labels say."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = gpt2()
        self.change = change

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        output = self.inner(input_ids=input_ids, labels=labels)
        if labels is not None:
            output["loss"] = self.change(output["loss"])
        return output


@pytest.mark.parametrize("change", [lambda loss: loss * 1.5, lambda loss: loss + 0.3], ids=["scaled", "regularised"])
def test_a_loss_that_is_not_the_mean_over_targets_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = Scaled(change)
    X, Y, _ = batch_of([0, 1])

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return next_token_losses(model(batch[0]).logits, batch[1])[0]

    manager = GhostEngineManager({"method": "GradDotProd"}, model, sgd(model), VAL_FORMS["tuple"], val_losses=losses)
    manager.attach_train_batch(X, Y, 0)
    manager.prepare_forward_input(X, Y)
    with pytest.raises(UsageError, match="not the mean next-token loss"):
        model(input_ids=X, labels=Y)
    manager.cleanup()


def test_what_a_model_s_own_loss_is_of() -> None:
    model = gpt2()
    X, Y, _ = batch_of([0, 1])
    items = model(input_ids=X, labels=Y, num_items_in_batch=torch.tensor(77))
    own = own_loss(items, Y, torch.tensor(77))
    assert own is not None
    assert own.divisor == 77
    assert float(own.weights.sum()) == pytest.approx(int((Y[:, 1:] != -100).sum()) / 77)
