"""What the tests of training-time scores share: the exact answer from the oracle, one training step, a comparison.

Legend: B samples, V val samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from indexer.dotprod import GradDotProdEngine, Scores
from tests.support.models import Example, examples, next_token_loss_of, pad
from tests.support.oracle import LossOf, gradients_alone, relative_error

TOLERANCE = 1e-5

BATCH = examples((24, 3, 11, 17))
"""Very different lengths, prompts, tokens that are no targets."""

VAL = examples((9, 20, 5, 13, 24, 7, 2, 16), seed=7)

VAL_LAYOUTS: dict[str, list[list[Example]]] = {
    "one": [VAL[:1]],
    "three": [VAL[:3]],
    "eight": [VAL],
    "three batches": [VAL[:3], VAL[3:4], VAL[4:]],
}
"""Val batches, each padded on its own."""


@dataclass(frozen=True)
class Exact:
    """Inner products, in float64, of the gradients of samples and val samples that each ran alone."""

    products: dict[str, Tensor]
    """(B, V) by parameter."""
    sizes: dict[str, Tensor]
    """(B,) by parameter: ‖gradient‖ · ‖mean val gradient‖."""

    def total(self) -> Tensor:
        """(B, V): over all parameters."""
        return torch.stack(list(self.products.values())).sum(0)

    def only(self, chosen: Callable[[str], bool]) -> Exact:
        """Of the parameters with a name that is ``chosen``."""
        kept = [name for name in self.products if chosen(name)]
        return Exact({name: self.products[name] for name in kept}, {name: self.sizes[name] for name in kept})


def exact_of(model: nn.Module, count: int, loss_of: LossOf, val_count: int, val_loss_of: LossOf) -> Exact:
    """The exact answer for a model of any kind."""
    ones = gradients_alone(model, count, loss_of)
    others = gradients_alone(model, val_count, val_loss_of)
    products, sizes = {}, {}
    for name in ones[0]:
        one_BN = torch.stack([gradients[name].flatten() for gradients in ones])
        other_VN = torch.stack([gradients[name].flatten() for gradients in others])
        products[name] = one_BN @ other_VN.t()
        sizes[name] = one_BN.norm(dim=1) * other_VN.mean(0).norm()
    return Exact(products, sizes)


def exact_causal(model: nn.Module, batch: Sequence[Example] = BATCH, val: Sequence[Example] = VAL) -> Exact:
    """The exact answer for a language model."""
    return exact_of(model, len(batch), next_token_loss_of(batch), len(val), next_token_loss_of(val))


def val_batch(batch: Sequence[Example]) -> dict[str, Tensor]:
    """A padded val batch of language-model samples."""
    return dict(zip(("input_ids", "labels", "attention_mask"), pad(batch), strict=True))


def causal_engine(model: nn.Module, val: Sequence[Example] = VAL[:3], **settings: Any) -> GradDotProdEngine:
    """An engine whose val set is one padded batch."""
    return GradDotProdEngine(model, val_batch(val), **settings)


def causal_step(engine: GradDotProdEngine, model: Any, batch: Sequence[Example] = BATCH, factor: float = 1.0) -> Scores:
    """Forward and backward of a padded batch with the model's own loss, times ``factor``; no optimizer."""
    ids, labels, mask = pad(batch)
    engine.prepare(len(ids), tokens=ids.numel())
    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    engine.watch(loss, labels=labels)
    (loss * factor).backward()
    return engine.collect()


def sum_of_squares(model: nn.Module, x: Any) -> Tensor:
    """A val_losses for models of any output: one loss a sample."""
    y = model(x)
    weight = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(3))
    return (torch.tanh(0.5 * y) * weight).flatten(1).sum(1) + 0.1 * y.square().flatten(1).sum(1)


def plain_step(engine: GradDotProdEngine, model: nn.Module, x: Tensor) -> Scores:
    """Forward and backward of the mean of :func:`sum_of_squares`."""
    engine.prepare(len(x))
    loss = sum_of_squares(model, x).mean()
    engine.watch(loss)
    loss.backward()
    return engine.collect()


def exact_plain(model: nn.Module, x: Tensor, val: Tensor) -> Exact:
    """The exact answer for :func:`sum_of_squares`."""
    return exact_of(
        model,
        len(x),
        lambda model, i: sum_of_squares(model, x[i : i + 1]).sum(),
        len(val),
        lambda model, i: sum_of_squares(model, val[i : i + 1]).sum(),
    )


def agree(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Error of a whole batch's scores, as a norm, relative to theirs; and every sign."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert relative_error(found.unsqueeze(0), expected.unsqueeze(0)) <= tolerance
    certain = expected.abs() > tolerance * expected.norm()
    assert torch.equal(found.sign()[certain], expected.sign()[certain])


def check(scores: Scores, exact: Exact, tolerance: float = TOLERANCE) -> None:
    """Total, every parameter and every block. A single parameter's scores may cancel: their error is relative to
    the norms of the gradients.
    """
    agree(scores.total, exact.total().mean(1), tolerance)
    assert set(scores.parameters) == set(exact.products)
    blocks: dict[str, Tensor] = {name: torch.zeros_like(scores.total) for name in scores.blocks}
    for name, products in exact.products.items():
        size = float(exact.sizes[name].norm())
        error = float((scores.parameters[name] - products.mean(1)).norm())
        assert error <= tolerance * size + 1e-12, f"{name}: {error / size:.2g}"
        owner = name.rpartition(".")[0]
        # BERT's head holds a bias that only the decoder below it uses; a part may count with the module around it.
        around = [block for block in blocks if f"{name}.".startswith(f"{block}.")]
        blocks[owner if owner in blocks else (around or [f"{owner}.decoder"])[-1]] += scores.parameters[name]
    for name, block in blocks.items():
        torch.testing.assert_close(scores.blocks[name], block, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(list(scores.parameters.values())).sum(0), scores.total, rtol=1e-9, atol=0)
