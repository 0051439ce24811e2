"""The loss that forms its gradient in place equals the slow, obvious one, and destroys nothing of others.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from indexer.encode import losses as module
from indexer.encode.losses import IGNORED, next_token_losses, next_token_losses_plainly


@pytest.fixture(params=["in the cache of a core", "in few passes, as on a GPU"], scope="module", autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to work, whatever the device."""
    patch = pytest.MonkeyPatch()
    if request.param != "in the cache of a core":
        patch.setattr(module, "_in_cache", module._in_few_passes)
        patch.setattr(module, "GPU_CHUNK_NUMBERS", 170)
    yield
    patch.undo()


reductions = st.sampled_from(["mean", "sum"])


def drawn(batch: int, length: int, vocabulary: int, masked: float = 0.3) -> tuple[Tensor, Tensor]:
    """(logits, labels)."""
    generator = torch.Generator().manual_seed(batch * 1000 + length * 10 + vocabulary)
    logits = 3 * torch.randn(batch, length, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    return logits, labels.masked_fill(torch.rand(batch, length, generator=generator) < masked, IGNORED)


def of_both(logits: Tensor, labels: Tensor, reduction: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(losses, targets, gradient at the logits) of the fast and of the slow form."""
    found = []
    for form in (next_token_losses, next_token_losses_plainly):
        leaf = logits.detach().clone().requires_grad_(True)
        values, targets = form(leaf * 1.0, labels, reduction=reduction)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        found.append((values.detach(), targets, gradient))
    return found[0], found[1]


def assert_equal(fast: tuple[Tensor, ...], slow: tuple[Tensor, ...], tolerance: float) -> None:
    assert fast[0].dtype == torch.float32
    assert fast[1].dtype == torch.int64
    torch.testing.assert_close(fast[0], slow[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(fast[1], slow[1])
    assert fast[2].dtype == slow[2].dtype
    torch.testing.assert_close(fast[2], slow[2], rtol=tolerance, atol=tolerance)


@settings(deadline=None)
@given(batch=st.integers(1, 4), length=st.integers(1, 9), vocabulary=st.integers(1, 40), reduction=reductions)
def test_equal_in_values_and_gradients(batch: int, length: int, vocabulary: int, reduction: Any) -> None:
    logits, labels = drawn(batch, length, vocabulary)
    fast, slow = of_both(logits, labels, reduction)
    assert_equal(fast, slow, 2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_in_bfloat16(reduction: Any) -> None:
    logits, labels = drawn(3, 8, 50)
    fast, slow = of_both(logits.bfloat16(), labels, reduction)
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 50, 101, 170])
def test_equal_however_the_work_is_cut(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    logits, labels = drawn(3, 8, 50)
    assert_equal(*of_both(logits, labels, "mean"), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_the_values_are_the_same_and_the_logits_survive(dtype: torch.dtype) -> None:
    logits, labels = drawn(3, 8, 50)
    logits = logits.to(dtype)
    before = logits.clone()
    fast, slow = (form(logits, labels) for form in (next_token_losses, next_token_losses_plainly))
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-6, atol=1e-6)
    assert not fast[0].requires_grad
    assert torch.equal(logits, before)
    with torch.no_grad():
        under, _ = next_token_losses(logits.clone().requires_grad_(True), labels)
    torch.testing.assert_close(under, slow[0], rtol=1e-6, atol=1e-6)


def test_a_row_without_targets_has_loss_and_gradient_zero() -> None:
    logits, labels = drawn(3, 6, 20, masked=0.0)
    labels[1] = IGNORED
    fast, slow = of_both(logits, labels, "mean")
    assert_equal(fast, slow, 2e-6)
    assert fast[0][1] == 0.0
    assert fast[1].tolist() == [5, 0, 5]
    assert not fast[2][1].any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_stands_where_nothing_is_predicted_does_not_matter(value: float) -> None:
    logits, labels = drawn(2, 6, 20, masked=0.0)
    expected, _ = of_both(logits, labels, "mean")
    logits[:, -1] = value  # the last place predicts nothing
    found, _ = of_both(logits, labels, "mean")
    assert_equal(found, expected, 0.0)
    labels[0, 3] = IGNORED
    expected, _ = of_both(logits, labels, "mean")
    logits[0, 2, 5] = value
    found, _ = of_both(logits, labels, "mean")
    assert_equal(found, expected, 0.0)


def test_forbidden_tokens_have_probability_zero() -> None:
    logits, labels = drawn(2, 6, 20, masked=0.0)
    labels.clamp_(max=14)
    logits[..., 15:] = float("-inf")
    fast, slow = of_both(logits, labels, "mean")
    assert bool(torch.isfinite(fast[0]).all())
    assert_equal(fast, slow, 2e-6)
    assert not fast[2][..., 15:].any()


def test_an_impossible_target_is_not_hidden() -> None:
    logits, labels = drawn(2, 6, 20, masked=0.0)
    logits[0, 2, int(labels[0, 3])] = float("-inf")
    losses, _ = next_token_losses(logits, labels)
    assert losses[0] == float("inf")
    assert bool(torch.isfinite(losses[1]))


def test_huge_logits_do_not_overflow() -> None:
    logits, labels = drawn(2, 6, 20)
    assert_equal(*of_both(logits * 1e4, labels, "mean"), 2e-6)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_logits_of_any_layout(layout: str) -> None:
    dense, labels = drawn(3, 6, 20)
    leaf = {
        "transposed": dense.transpose(0, 1).contiguous(),
        "sliced": torch.cat([dense, dense], dim=2),
        "expanded": dense[:1].clone(),
    }[layout]
    kept = leaf.clone()
    gradients = []
    for form in (next_token_losses, next_token_losses_plainly):
        source = leaf.clone().requires_grad_(True)
        logits = {
            "transposed": lambda x: x.transpose(0, 1),
            "sliced": lambda x: x[..., :20],
            "expanded": lambda x: x.expand(3, -1, -1),
        }[layout](source)
        assert not logits.is_contiguous()
        losses, _ = form(logits, labels)
        gradients.append((losses.detach(), *torch.autograd.grad(losses.sum(), source)))
        assert torch.equal(source.detach(), kept)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-6, atol=2e-6)


HEADS = {
    "linear": lambda h, w: h @ w.t(),
    "soft-capped": lambda h, w: 5.0 * torch.tanh(h @ w.t() / 5.0),
    "capped last": lambda h, w: torch.tanh(h @ w.t()),
    "exp": lambda h, w: torch.exp(h @ w.t()),
    "softmax": lambda h, w: torch.softmax(h @ w.t(), dim=-1),
    "sigmoid of a view": lambda h, w: torch.sigmoid(h @ w.t()).view(h.shape[0], -1, w.shape[0]),
    "scaled": lambda h, w: (h @ w.t()) * 0.5,
    "biased": lambda h, w: F.linear(h, w, torch.ones(w.shape[0])),
    "float of bfloat16": lambda h, w: (h.bfloat16() @ w.t().bfloat16()).float(),
    "flattened": lambda h, w: (h.flatten(0, 1) @ w.t()).view(h.shape[0], h.shape[1], -1),
    "cut": lambda h, w: (h @ torch.cat([w, w]).t())[..., : w.shape[0]],
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_that_their_own_backward_needs_are_not_overwritten(head: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 8, generator=generator), torch.randn(20, 8, generator=generator)
    _, labels = drawn(2, 6, 20)
    gradients = []
    for form in (next_token_losses, next_token_losses_plainly):
        h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
        losses, _ = form(HEADS[head](h, w), labels)
        gradients.append(torch.autograd.grad(losses.sum(), (h, w)))
        assert torch.equal(h.detach(), hidden)
        assert torch.equal(w.detach(), weight)
    tolerance = 2e-2 if "bfloat16" in head else 5e-6
    torch.testing.assert_close(gradients[0], gradients[1], rtol=tolerance, atol=tolerance)


def test_a_leaf_is_not_overwritten() -> None:
    logits, labels = drawn(2, 6, 20)
    leaf = logits.clone().requires_grad_(True)
    losses, _ = next_token_losses(leaf, labels)
    losses.sum().backward()
    assert torch.equal(leaf.detach(), logits)


def test_labels_are_shifted_once_and_left_as_they_are() -> None:
    # Logits that are sure of the next token, and of no other, have loss 0.
    labels = torch.tensor([[3, 1, 4, 1, 5]])
    logits = torch.full((1, 5, 7), -50.0)
    for place in range(4):
        logits[0, place, labels[0, place + 1]] = 50.0
    kept = labels.clone()
    losses, targets = next_token_losses(logits, labels, reduction="sum")
    assert float(losses) == 0.0
    assert targets.tolist() == [4]
    assert torch.equal(labels, kept)
    # The first label is no target: masking it changes nothing.
    labels[0, 0] = IGNORED
    assert next_token_losses(logits, labels)[1].tolist() == [4]


def test_a_sample_does_not_see_its_neighbours() -> None:
    logits, labels = drawn(3, 6, 20)
    together, _ = of_both(logits, labels, "mean")
    for place in range(3):
        alone, _ = of_both(logits[place : place + 1], labels[place : place + 1], "mean")
        assert_equal(alone, tuple(value[place : place + 1] for value in together), 1e-6)


@pytest.mark.parametrize(
    "function",
    [lambda x: (x * torch.tensor([1.0, 2.0, 1.0])).sum(), lambda x: x[0], lambda x: x.square().sum() / x[2]],
)
def test_the_gradient_of_any_function_is_that_of_the_plain_form(function: Any) -> None:
    logits, labels = drawn(3, 6, 20)
    leaf = logits.requires_grad_(True)
    (expected,) = torch.autograd.grad(function(next_token_losses_plainly(leaf, labels)[0]), leaf)
    (found,) = torch.autograd.grad(function(next_token_losses(leaf, labels)[0]), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_retained_graph_gives_one_gradient_after_another() -> None:
    logits, labels = drawn(3, 6, 20)
    leaf = logits.requires_grad_(True)
    losses, _ = next_token_losses(leaf, labels)
    (plain,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    plain = plain.clone()
    for weights in ([1.0, 4.0, 0.5], [2.0, 0.0, 1.0], [8.0, 1.0, 1.0], [1.0, 1.0, 1.0]):
        weight_B = torch.tensor(weights)
        (found,) = torch.autograd.grad(losses, leaf, grad_outputs=weight_B, retain_graph=True)
        assert torch.equal(found, plain * weight_B.view(-1, 1, 1))  # powers of two: not a bit is lost


@pytest.mark.parametrize("factor", [-1.0, 1 / 3, 65536.0])
def test_the_gradient_of_a_multiple_is_that_multiple(factor: float) -> None:
    logits, labels = drawn(3, 6, 20)
    leaf = logits.requires_grad_(True)
    (plain,) = torch.autograd.grad(next_token_losses(leaf, labels)[0].sum(), leaf)
    (multiple,) = torch.autograd.grad(next_token_losses(leaf, labels)[0].sum() * factor, leaf)
    assert torch.allclose(multiple, plain * factor, rtol=1e-6)
