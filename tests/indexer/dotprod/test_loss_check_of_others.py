"""Losses that are not said to be of tokens: held where the labels can be found, let be where there are none, and said.

Legend: B samples, T tokens of the longest.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from indexer.dotprod import GradDotProdEngine, target_counts
from indexer.encode.losses import IGNORED
from tests.support.models import gpt2, llama, next_token_loss_of, perceptron, settle
from tests.support.oracle import LossOf
from tests.support.own_losses import Bare, losses_of_logits, mean_loss, mixture
from tests.support.scoring import (
    BATCH,
    VAL,
    agree,
    causal_engine,
    check,
    exact_causal,
    exact_of,
    sum_of_squares,
    val_batch,
)
from tests.support.watched_losses import IDS, LABELS, MASK, refused, scored

COUNTS = target_counts(LABELS)


# A second loss that is a mean over samples.


class WithOwnTerm(nn.Module):
    """GPT-2 with a penalty of each sample, whose mean is in the loss and is called ``aux_loss``."""

    def __init__(self, coefficient: float) -> None:
        super().__init__()
        self.inner, self.coefficient = gpt2(), coefficient

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = self.inner.transformer(input_ids=input_ids)[0]
        logits = self.inner.lm_head(hidden)
        each_BT = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
        each_B = each_BT.sum(1) / (labels[:, 1:] != IGNORED).sum(1)
        aux_B = hidden[:, 0].square().mean(1)
        aux_loss = aux_B.mean()
        loss = each_B.mean() + self.coefficient * aux_loss
        return {"loss": loss, "logits": logits, "aux_loss": aux_loss, "each": each_B + self.coefficient * aux_B}


def own_term_losses(model: Any, batch: Any) -> Tensor:
    each: Tensor = model(batch["input_ids"], batch["labels"])["each"]
    return each


def own_term_loss_of(batch: list[Any]) -> LossOf:
    def loss_of(model: nn.Module, sample: int) -> Tensor:
        ids, labels = batch[sample]
        loss: Tensor = model(ids.unsqueeze(0), labels.unsqueeze(0))["loss"]
        return loss

    return loss_of


def test_a_second_loss_that_is_a_mean_over_samples() -> None:
    model = WithOwnTerm(0.5)
    batch = {"input_ids": IDS, "labels": LABELS}
    own = lambda: model(IDS, LABELS)["loss"]  # noqa: E731
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=own_term_losses) as engine:
        refused(engine, own, "0.5 × aux_loss", labels=LABELS)
        refused(engine, lambda: own() + own() * 0.01, "aux_loss|not Σ weights × val_losses", batch=batch)
        scores = scored(engine, own, batch=batch)
    check(scores, exact_of(model, 4, own_term_loss_of(BATCH), 3, own_term_loss_of(VAL[:3])))


def test_a_second_loss_that_val_losses_do_not_have_or_that_no_value_shows() -> None:
    batch = {"input_ids": IDS, "labels": LABELS}
    without = losses_of_logits(lambda model, ids: model(ids, ids)["logits"])
    model = WithOwnTerm(0.5)
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=without) as engine:
        refused(engine, lambda: model(IDS, LABELS)["loss"], "0.5 × aux_loss", batch=batch)
    small = WithOwnTerm(1e-6)
    with GradDotProdEngine(small, val_batch(VAL[:3]), val_losses=without) as engine:
        refused(engine, lambda: small(IDS, LABELS)["loss"], "1e-06 × aux_loss", batch=batch)
    experts = mixture("mixtral", output_router_logits=True, router_aux_loss_coef=0.001)
    with causal_engine(experts, exclude_layers=("model.layers.*.mlp",)) as engine:
        own = lambda: experts(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss  # noqa: E731
        refused(engine, own, "0.001 × aux_loss", weights=COUNTS / COUNTS.sum(), batch=batch)


# Integer labels that are no tokens.


@pytest.mark.parametrize("name", ["labels", "targets", "target"])
def test_integer_labels_of_a_model_that_is_no_language_model(name: str) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()

        def forward(self, x: Tensor, **labels: Tensor) -> Any:
            logits = self.inner(x)
            each = F.binary_cross_entropy_with_logits(logits, labels[name].float(), reduction="none").mean(1)
            return {"loss": each.mean(), "logits": logits, "each": each}

    model = Classes()
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    hot = (torch.randn(4, 5, generator=torch.Generator().manual_seed(9)) > 0).long()
    with GradDotProdEngine(model, x[:3], val_losses=lambda model, x: sum_of_squares(model.inner, x)) as engine:
        own = lambda: model(x, **{name: hot})["loss"]  # noqa: E731
        with pytest.warns(RuntimeWarning, match="Classes that is watched was not compared with its logits, nor with"):
            found = [scored(engine, own, **said).total for said in ({}, {"weights": torch.full((4,), 0.25)})]
    exact = exact_of(
        model,
        4,
        lambda model, i: model(x[i : i + 1], **{name: hot[i : i + 1]})["loss"],
        3,
        lambda model, i: sum_of_squares(model.inner, x[i : i + 1]).sum(),  # type: ignore[operator]
    )
    for total in found:
        agree(total, exact.total().mean(1))


def test_flat_logits_are_those_of_a_language_model() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2()

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            logits = self.inner(input_ids=input_ids).logits
            return {"loss": mean_loss(logits, labels), "logits": logits.flatten(0, 1)}

    model = Flat()
    losses = losses_of_logits(lambda model, ids: model.inner(input_ids=ids).logits)
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        refused(engine, lambda: model(IDS, LABELS)["loss"], "does not run without labels|returns no logits")


# Labels of any name.


class OfAnyName(nn.Module):
    """``model(x, y)``, y shifted already, gives (logits, loss)."""

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.inner, self.smoothing = gpt2(), smoothing

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.inner(input_ids=x).logits
        if y is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, label_smoothing=self.smoothing)
        return logits, loss


def any_name_engine(model: nn.Module) -> GradDotProdEngine:
    return GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses_of_logits(lambda model, ids: model(ids)[0]))


def test_labels_of_any_name() -> None:
    x, y = IDS[:, :-1], LABELS[:, 1:].contiguous()
    exact = exact_causal(gpt2(), val=VAL[:3]).total().mean(1)
    model = OfAnyName()
    own = lambda: model(x, y)[1]  # noqa: E731
    with any_name_engine(model) as engine, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        refused(engine, own, r"not shifted.*labels=torch.cat\(\[labels\[:, :1\], labels\], 1\)")
        agree(scored(engine, own, weights=COUNTS / COUNTS.sum()).total, exact)


def test_a_loss_of_labels_of_any_name_that_is_taken_at_its_word() -> None:
    x, y = IDS[:, :-1], LABELS[:, 1:].contiguous()
    model = OfAnyName(smoothing=0.3)
    with any_name_engine(model) as engine:
        with pytest.warns(RuntimeWarning, match="OfAnyName that is watched was not compared with its logits"):
            scored(engine, lambda: model(x, y)[1], weights=COUNTS / COUNTS.sum())
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # it is said once
            scored(engine, lambda: model(x, y)[1], weights=COUNTS / COUNTS.sum())


@pytest.mark.parametrize("said", [{}, {"weights": COUNTS / COUNTS.sum()}], ids=["nothing", "weights"])
def test_a_loss_of_a_loop_without_labels_is_said_not_to_be_held(said: dict[str, Any]) -> None:
    model = Bare()
    losses = losses_of_logits(lambda model, ids: model(ids))
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        with pytest.warns(RuntimeWarning, match=r"labels=labels.*batch=batch") as caught:
            scored(engine, lambda: mean_loss(model(IDS), LABELS), **said)
        assert len(caught) == 1
        assert caught[0].filename.endswith("watched_losses.py"), "where watch() is called"


def embedded(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(inputs_embeds=model.transformer.wte(ids)).logits
    return logits


def parts_of(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(model.transformer(input_ids=ids)[0])
    return logits


@pytest.mark.parametrize("said", [{}, {"weights": COUNTS / COUNTS.sum()}], ids=["nothing", "weights"])
@pytest.mark.parametrize("logits_of", [embedded, parts_of])
def test_a_loss_is_said_not_to_be_held_whatever_went_in(logits_of: Any, said: dict[str, Any]) -> None:
    """Embeddings instead of tokens; a loop that calls the parts of its model."""
    model = gpt2()
    with causal_engine(model) as engine:
        with pytest.warns(RuntimeWarning, match=r"not compared.*labels=labels.*batch=batch") as caught:
            scored(engine, lambda: mean_loss(logits_of(model, IDS), LABELS), **said)
        assert len(caught) == 1
        assert caught[0].filename.endswith("watched_losses.py"), "where watch() is called"
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # it is said once
            scored(engine, lambda: mean_loss(logits_of(model, IDS), LABELS), **said)


def test_a_loss_of_no_tokens_is_said_not_to_be_held() -> None:
    """It may be the sum, which is watched as a mean: with the batch, val_losses show it."""
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    model = perceptron()
    summed = lambda: sum_of_squares(model, x).sum()  # noqa: E731
    told = pytest.warns(RuntimeWarning, match=r"not compared.*a sum that is watched as a mean.*batch=batch")
    with GradDotProdEngine(model, x[:3], val_losses=sum_of_squares) as engine, told:
        scored(engine, summed)
    with GradDotProdEngine(model, x[:3], val_losses=sum_of_squares) as engine:
        refused(engine, summed, "not Σ weights × val_losses", batch=x)


@pytest.mark.parametrize("check", [True, False])
def test_no_word_about_a_loss_that_is_held_or_trusted(check: bool) -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    plain, model = perceptron(), gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with causal_engine(model, check=check) as engine:
            scored(engine, lambda: mean_loss(model(input_ids=IDS).logits, LABELS), labels=LABELS)
        with GradDotProdEngine(plain, x[:3], val_losses=sum_of_squares, check=check) as engine:
            scored(engine, lambda: sum_of_squares(plain, x).mean(), **({"batch": x} if check else {}))


# What to do.


def test_classes_of_tokens() -> None:
    config = BertConfig(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=40,
        num_labels=5,
    )
    model = settle(BertForTokenClassification(config))
    labels = torch.where(MASK.bool(), IDS % 5, IGNORED)
    own = lambda: model(input_ids=IDS, attention_mask=MASK, labels=labels).loss  # noqa: E731
    n = (labels != IGNORED).sum(1)

    def losses(model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"] % 5, reduction="none").mean(1)

    def loss_of(batch: list[Any]) -> LossOf:
        return lambda model, i: F.cross_entropy(model(input_ids=batch[i][0][None]).logits[0], batch[i][0] % 5)

    val = [example for example in VAL if len(example[0]) == len(VAL[0][0])]
    with GradDotProdEngine(model, val_batch(val), val_losses=losses) as engine:
        refused(engine, own, r"classes of tokens, .* weights=n / n.sum\(\)\), with n = \(labels != -100\).sum\(1\)")
        scores = scored(engine, own, weights=n / n.sum())
    check(scores, exact_of(model, 4, loss_of(BATCH), len(val), loss_of(val)))


@pytest.mark.parametrize("items", [200, torch.tensor(200)], ids=["number", "tensor"])
def test_a_loss_divided_by_the_items_of_a_step(items: Any) -> None:
    model = llama()
    own = lambda: model(input_ids=IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=items).loss  # noqa: E731
    with causal_engine(model) as engine:
        message = refused(engine, own, r"divided by num_items_in_batch \(200\)", labels=LABELS)
        assert "weights=(labels[:, 1:] != -100).sum(1) / 200, labels=labels)" in message
        scores = scored(engine, own, weights=(LABELS[:, 1:] != -100).sum(1) / 200, labels=LABELS)
    check(scores, exact_of(model, 4, next_token_loss_of(BATCH), 3, next_token_loss_of(VAL[:3])))
