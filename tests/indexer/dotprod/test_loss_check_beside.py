"""A term that goes backward beside the watched loss would enter the scores: it is refused in the batch that is held.

Legend: B samples, T tokens of the longest.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from indexer.dotprod import GradDotProdEngine, target_counts
from tests.support.models import gpt2, llama, pad
from tests.support.own_losses import Bare, Nano, losses_of_logits, mean_loss, smoothed_loss_of, smoothed_losses
from tests.support.scoring import BATCH, VAL, causal_engine, check, exact_causal, exact_of, val_batch

IDS, LABELS, MASK = pad(BATCH)
COUNTS = target_counts(LABELS)


def entropy(logits: Tensor) -> Tensor:
    p = logits.float().softmax(-1)
    return 0.01 * (p * p.clamp_min(1e-9).log()).sum(-1).mean()


def distillation(logits: Tensor) -> Tensor:
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).softmax(-1)
    return -0.5 * (teacher * logits.float().log_softmax(-1)).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    return 1e-3 * logits.float().logsumexp(-1).square().mean()


def far_from_zero(logits: Tensor) -> Tensor:
    return 1e-3 * logits.square().mean()


BESIDE = "of the output of .* beside the watched loss .*Another term.*`val_losses` with that term.*batch=batch"


@pytest.mark.thin(2)
@pytest.mark.parametrize("multiplied", [1.0, 0.25, 4096.0], ids=["plain", "accumulated", "scaled"])
@pytest.mark.parametrize("term", [entropy, distillation, z_loss, far_from_zero])
def test_a_term_of_the_logits_that_is_added_after_watching(term: Callable[[Tensor], Tensor], multiplied: float) -> None:
    for own in (True, False):
        model = gpt2()
        with causal_engine(model) as engine:
            for _ in range(2):  # and again, until it is gone
                engine.prepare(4)
                output = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
                loss = output.loss if own else mean_loss(output.logits, LABELS)
                engine.watch(loss, labels=LABELS)
                ((loss + term(output.logits)) * multiplied).backward()
                for _ in range(2):
                    with pytest.raises(UsageError, match=BESIDE):
                        engine.collect()
                engine.discard()
            engine.prepare(4)
            loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
            engine.watch(loss, labels=LABELS)
            (loss * multiplied).backward()
            check(engine.collect(), exact_causal(model, val=VAL[:3]))


def test_a_term_with_a_backward_pass_of_its_own() -> None:
    model = llama()
    with causal_engine(model) as engine:
        engine.prepare(4)
        output = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
        engine.watch(output.loss, labels=LABELS)
        entropy(output.logits).backward(retain_graph=True)
        output.loss.backward()
        with pytest.raises(UsageError, match=BESIDE):
            engine.collect()


@pytest.mark.parametrize("said", ["weights", "batch"])
def test_a_term_beside_a_loss_that_is_no_mean_over_targets(said: str) -> None:
    model = gpt2()
    weights, batch = COUNTS / COUNTS.sum(), {"input_ids": IDS, "labels": LABELS}
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=smoothed_losses(0.1)) as engine:
        for term in (entropy, None):
            engine.prepare(4)
            logits = model(input_ids=IDS).logits
            loss = mean_loss(logits, LABELS, label_smoothing=0.1)
            engine.watch(loss, weights=weights, batch=batch if said == "batch" else None)
            (loss if term is None else loss + term(logits)).backward()
            if term is not None:
                with pytest.raises(UsageError, match=BESIDE):
                    engine.collect()
                engine.discard()
        scores = engine.collect()
    check(scores, exact_of(model, 4, smoothed_loss_of(0.1, BATCH), 3, smoothed_loss_of(0.1, VAL[:3])))


class Halves(nn.Module):
    """Two outputs of one operation, both of a part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x).split(5, -1)


def halves_losses(model: Any, x: Tensor) -> Tensor:
    first, second = model(x)
    return first.square().mean(1) + second.exp().mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", [0, 1])
def test_a_term_of_one_of_two_outputs_of_an_operation(place: int) -> None:
    model = Halves()
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    with GradDotProdEngine(model, x[:3], val_losses=halves_losses) as engine:
        for term in (1.0, 0.0):
            engine.prepare(4)
            halves = model(x)
            loss = (halves[0].square().mean(1) + halves[1].exp().mean(1)).mean()
            engine.watch(loss)
            (loss + term * halves[place].abs().mean()).backward()
            if term:
                with pytest.raises(UsageError, match=rf"output\[{place}\] of the output of Halves"):
                    engine.collect()
                engine.discard()
            else:
                engine.collect()


class TwoHeads(nn.Module):
    """The second head's output is of no part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.value = gpt2(), nn.Linear(24, 1)

    def forward(self, ids: Tensor) -> Any:
        hidden = self.inner.transformer(input_ids=ids)[0]
        return SimpleNamespace(logits=self.inner.lm_head(hidden), values=self.value(hidden).squeeze(-1))


def test_a_term_of_another_head() -> None:
    model = TwoHeads()
    losses = losses_of_logits(lambda model, ids: model(ids).logits)
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        engine.prepare(4)
        output = model(IDS)
        loss = mean_loss(output.logits, LABELS)
        engine.watch(loss, labels=LABELS)
        (loss + 1e-4 * output.values.square().mean()).backward()
        with pytest.raises(UsageError, match="values of the output of TwoHeads"):
            engine.collect()


def test_a_penalty_on_the_weights_is_not_blamed_on_the_taps_alone() -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        engine.prepare(4)
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        engine.watch(loss, labels=LABELS)
        (loss + 1e-2 * sum(p.square().sum() for p in model.parameters())).backward()
        with pytest.raises(CaptureError, match=r"a second term went backward beside the watched loss .*weight_decay"):
            engine.collect()


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_that_are_scaled_are_no_second_term(dtype: torch.dtype) -> None:
    for factor in (1.0, 1 / 3, 1000.0):
        model = gpt2()
        with causal_engine(model) as engine:
            engine.prepare(4)
            with torch.autocast("cpu", dtype=dtype):
                loss = mean_loss(model(input_ids=IDS).logits, LABELS)
            engine.watch(loss, labels=LABELS)
            (loss * factor).backward()
            engine.collect()
        narrow = gpt2().to(dtype)
        with causal_engine(narrow) as engine:
            engine.prepare(4)
            loss = narrow(input_ids=IDS, labels=LABELS).loss
            engine.watch(loss, labels=LABELS)
            (loss * factor).backward()
            engine.collect()


def test_no_gradient_of_the_logits_is_kept() -> None:
    model = Bare()
    losses = losses_of_logits(lambda model, ids: model(ids))
    gc.collect()
    of_others = [x for x in gc.get_objects() if type(x) is Tensor]  # of tests before this one
    known = set(map(id, of_others))
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        engine.prepare(4)
        logits = model(IDS)
        kept = weakref.ref(logits)
        loss = mean_loss(logits, LABELS)
        engine.watch(loss, labels=LABELS)
        new = [x for x in gc.get_objects() if type(x) is Tensor and id(x) not in known]
        tensors = [x for x in new if x.numel() == logits.numel()]
        assert {x.untyped_storage().data_ptr() for x in tensors} == {logits.untyped_storage().data_ptr()}
        del new, tensors, logits
        gc.collect()
        assert kept() is None
        loss.backward()
        engine.collect()


# Several forward passes before the loss is watched.


@pytest.mark.thin(2)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_forward_pass_between_that_of_the_loss_and_watching(grad: bool, train: bool) -> None:
    model = gpt2().train(train)
    other = torch.randint(1, 100, IDS.shape, generator=torch.Generator().manual_seed(2))
    for by_hand in (False, True):
        with causal_engine(model) as engine:
            engine.prepare(4)
            output = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
            loss = mean_loss(output.logits, LABELS) if by_hand else output.loss
            with torch.set_grad_enabled(grad):
                logits = model(input_ids=other).logits
            with pytest.raises(UsageError, match="divided by 2"):
                engine.watch(loss / 2, labels=LABELS)
            if grad:
                with pytest.raises(UsageError, match="not the mean next-token loss"):
                    engine.watch(mean_loss(logits, LABELS, label_smoothing=0.1), labels=LABELS)
            engine.watch(loss, labels=LABELS)
            engine.discard()


def test_a_term_of_another_forward_pass() -> None:
    model = Nano()
    ids, targets = IDS[:, :-1], LABELS[:, 1:].contiguous()
    losses = losses_of_logits(lambda model, ids: model(ids)[0])
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        engine.prepare(4)
        _, loss = model(ids, targets)
        second, _ = model(ids.flip(1))
        engine.watch(loss, labels=LABELS)
        (loss + F.mse_loss(second, torch.zeros_like(second))).backward()
        with pytest.raises((UsageError, CaptureError)):
            engine.collect()
