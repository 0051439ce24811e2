"""The loss that is scored is the loss that trains: what ``watch`` accepts is exact, what it refuses it names, and its
advice works.

Legend: B samples, T tokens of the longest.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.errors import UsageError
from indexer.dotprod import GradDotProdEngine, target_counts
from indexer.encode.losses import IGNORED, next_token_losses
from tests.support.models import bert_masked, gpt2, next_token_loss_of, perceptron
from tests.support.own_losses import (
    DECODER_LEFT_OUT,
    DECODERS,
    EXPERTS,
    Bare,
    Nano,
    WithTerm,
    decoder,
    losses_of_logits,
    mean_loss,
    mixture,
    own_place_loss_of,
    smoothed_loss_of,
    smoothed_losses,
)
from tests.support.scoring import (
    BATCH,
    VAL,
    agree,
    causal_engine,
    causal_step,
    check,
    exact_causal,
    exact_of,
    plain_step,
    sum_of_squares,
    val_batch,
)
from tests.support.watched_losses import IDS, LABELS, MASK, refused, scored

# Router losses.


def outside_experts(name: str) -> bool:
    return ".mlp." not in name


@pytest.mark.thin(2)
@pytest.mark.parametrize(("kind", "coefficient"), [("mixtral", 0.001), ("olmoe", 0.02), ("qwen2-moe", 0.1)])
def test_a_router_loss_is_refused_and_the_advice_works(kind: str, coefficient: float) -> None:
    model = mixture(kind, output_router_logits=True, router_aux_loss_coef=coefficient)
    exact = exact_causal(model, val=VAL[:3]).only(outside_experts)

    def own_loss(**settings: Any) -> Tensor:
        return model(input_ids=IDS, attention_mask=MASK, labels=LABELS, **settings).loss

    with causal_engine(model, exclude_layers=EXPERTS) as engine:
        for said in ({"labels": LABELS}, {}, {"weights": torch.ones(4)}):
            refused(
                engine, own_loss, f"second loss in it: {coefficient:g} × aux_loss.*output_router_logits=False", **said
            )
        check(scored(engine, lambda: own_loss(output_router_logits=False), labels=LABELS), exact)
    with causal_engine(model, exclude_layers=EXPERTS) as engine:
        logits = lambda: model(input_ids=IDS, attention_mask=MASK).logits  # noqa: E731
        check(scored(engine, lambda: mean_loss(logits(), LABELS), labels=LABELS), exact)


def test_a_router_loss_of_no_weight_changes_nothing() -> None:
    model = mixture("mixtral", output_router_logits=True, router_aux_loss_coef=0.0)
    with causal_engine(model, exclude_layers=EXPERTS) as engine:
        check(causal_step(engine, model), exact_causal(model, val=VAL[:3]).only(outside_experts))


def test_a_router_loss_in_a_tuple() -> None:
    model = mixture("mixtral", output_router_logits=True, router_aux_loss_coef=0.001)
    with causal_engine(model, exclude_layers=EXPERTS) as engine:
        loss = lambda: model(input_ids=IDS, labels=LABELS, return_dict=False)[0]  # noqa: E731
        refused(engine, loss, r"0.001 × output\[1\]", labels=LABELS)


@pytest.mark.parametrize("said", [{"labels": LABELS}, {"weights": torch.ones(4)}], ids=["labels", "weights"])
def test_a_router_loss_that_is_added_after_watching(said: dict[str, Any]) -> None:
    model = mixture("mixtral", output_router_logits=True)
    with causal_engine(model, exclude_layers=EXPERTS) as engine:
        engine.prepare(4)
        output = model(input_ids=IDS, attention_mask=MASK)
        loss = mean_loss(output.logits, LABELS)
        engine.watch(loss, **said)
        (loss + 0.01 * output.aux_loss).backward()
        with pytest.raises(UsageError, match=r"aux_loss of the output of Mixtral.* beside the watched loss"):
            engine.collect()


# Losses that are not shifted.


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_loss_that_is_not_shifted_is_refused_and_the_advice_works(kind: str) -> None:
    model = decoder(kind)
    own = lambda: model(input_ids=IDS, labels=LABELS).loss  # noqa: E731
    with causal_engine(model, exclude_layers=DECODER_LEFT_OUT) as engine:
        refused(engine, own, "not the mean next-token loss.*at the labels' own places, not shifted", labels=LABELS)
        prepended = torch.cat([LABELS[:, :1], LABELS], 1)
        scores = scored(engine, own, labels=prepended)
    exact = exact_of(model, 4, own_place_loss_of, 3, next_token_loss_of(VAL[:3]))
    agree(scores.total, exact.only(lambda name: name in scores.parameters).total().mean(1))
    with causal_engine(model, exclude_layers=DECODER_LEFT_OUT) as engine:
        scores = scored(engine, lambda: mean_loss(model(input_ids=IDS).logits, LABELS), labels=LABELS)
    exact = exact_causal(model, val=VAL[:3])
    agree(scores.total, exact.only(lambda name: name in scores.parameters).total().mean(1))


def test_weights_so_small_that_every_loss_is_log_v() -> None:
    # The values agree to 1e-6; only the gradients tell the losses apart.
    model = decoder("bart", init_std=1e-6)
    own = lambda: model(input_ids=IDS, labels=LABELS).loss  # noqa: E731
    with causal_engine(model, exclude_layers=DECODER_LEFT_OUT) as engine:
        refused(engine, own, "its gradient is .* off.*not shifted", labels=LABELS)
        smooth = lambda: mean_loss(model(input_ids=IDS).logits, LABELS, label_smoothing=0.1)  # noqa: E731
        refused(engine, smooth, r"its gradient is .* off.*label smoothing 0\.1\b", labels=LABELS)
        scored(engine, lambda: mean_loss(model(input_ids=IDS).logits, LABELS), labels=LABELS)


def test_a_masked_language_model() -> None:
    model = bert_masked()
    own = lambda: model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss  # noqa: E731
    counts = (LABELS != IGNORED).sum(1)
    exact = exact_of(model, 4, own_place_loss_of, 3, next_token_loss_of(VAL[:3]))
    for said in ({"labels": torch.cat([LABELS[:, :1], LABELS], 1)}, {"weights": counts / counts.sum()}):
        with causal_engine(model) as engine:
            refused(engine, own, "not shifted", labels=LABELS)
            agree(scored(engine, own, **said).total, exact.total().mean(1))


# Named for what they are.


COUNTS = target_counts(LABELS)


def z_loss(logits: Tensor) -> Tensor:
    targets = LABELS[:, 1:] != IGNORED
    return 1e-4 * logits[:, :-1].logsumexp(2).square()[targets].mean()


def of_samples(logits: Tensor) -> Tensor:
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), LABELS[:, 1:], ignore_index=IGNORED, reduction="none")
    return each.sum(1) / COUNTS


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "smoothed": (lambda z: mean_loss(z, LABELS, label_smoothing=0.1), r"label smoothing 0\.1\b"),
    "hardly smoothed": (lambda z: mean_loss(z, LABELS, label_smoothing=0.002), r"label smoothing 0\.002\b"),
    "sum": (lambda z: mean_loss(z, LABELS, reduction="sum"), r"the sum over the targets.*weights=\(labels"),
    "mean of means": (lambda z: of_samples(z).mean(), r"mean over the samples of their own means: watch\(loss\)$"),
    "a quarter": (lambda z: mean_loss(z, LABELS) / 4, "divided by 4: watch it before it is divided"),
    "one and a half": (lambda z: mean_loss(z, LABELS) * 1.5, "that times 1.5: watch it before"),
    "z-loss": (lambda z: mean_loss(z, LABELS) + z_loss(z), "a z-loss in it, 0.0001 ×"),
    "a constant": (lambda z: mean_loss(z, LABELS) + 0.3, "what else it is of is not known.*batch=batch"),
    "another": (lambda z: z.square().mean(), "what else it is of is not known"),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("fused", [False, True], ids=["with logits", "without"])
@pytest.mark.parametrize("kind", LOSSES)
def test_another_loss_is_named(kind: str, fused: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt2()

        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.inner(input_ids=input_ids).logits
            if labels is None:
                return {"logits": logits}
            found = LOSSES[kind][0](logits)
            return {"loss": found} if fused else {"loss": found, "logits": logits}

    model = Model()
    losses = losses_of_logits(lambda model, ids: model(input_ids=ids)["logits"])
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        own = lambda: model(input_ids=IDS, labels=LABELS)["loss"]  # noqa: E731
        # One number cannot show so little smoothing for what it is, but for what it is not.
        expected = "0.01 % off" if fused and kind == "hardly smoothed" else LOSSES[kind][1]
        message = refused(engine, own, expected, labels=LABELS)
        assert "the loss of Model that is watched (" in message


ADVICE: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "sum": (LOSSES["sum"][0], {"weights": COUNTS, "labels": LABELS}),
    "mean of means": (LOSSES["mean of means"][0], {}),
    "mean of samples with targets": (LOSSES["mean of means"][0], {"weights": torch.ones(4) / 4}),
    "mean of means, held": (LOSSES["mean of means"][0], {"weights": torch.full((4,), 0.25), "labels": LABELS}),
    "one and a half": (LOSSES["one and a half"][0], {"weights": 1.5 * COUNTS / COUNTS.sum(), "labels": LABELS}),
    "in doubles": (lambda z: mean_loss(z.double(), LABELS), {"labels": LABELS}),
    "flat": (lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()), {"labels": LABELS}),
}


@pytest.mark.thin(4)
@pytest.mark.parametrize("kind", ADVICE)
def test_what_the_advice_says_is_accepted_and_exact(kind: str) -> None:
    model = gpt2()
    loss_of, said = ADVICE[kind]
    with causal_engine(model) as engine:
        scores = scored(engine, lambda: loss_of(model(input_ids=IDS, attention_mask=MASK).logits), **said)
    check(scores, exact_causal(model, val=VAL[:3]))


def test_a_smoothed_loss_with_val_losses_of_its_kind() -> None:
    model = gpt2()
    batch = {"input_ids": IDS, "labels": LABELS}
    exact = exact_of(model, 4, smoothed_loss_of(0.1, BATCH), 3, smoothed_loss_of(0.1, VAL[:3]))

    def loss() -> Tensor:
        return mean_loss(model(input_ids=IDS).logits, LABELS, label_smoothing=0.1)

    weights = COUNTS / COUNTS.sum()
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=smoothed_losses(0.1)) as engine:
        check(scored(engine, loss, weights=weights, batch=batch), exact)
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=smoothed_losses(0.2)) as engine:
        refused(engine, loss, r"not Σ weights × val_losses", weights=weights, batch=batch)
        refused(engine, lambda: loss() / 2, r"not Σ weights × val_losses", weights=weights, batch=batch)


def test_the_models_own_loss_is_held_without_being_asked() -> None:
    model = gpt2()
    own = lambda: model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss  # noqa: E731
    with causal_engine(model) as engine:
        refused(engine, own, r"mean over all targets: watch\(loss, labels=labels\)")
        refused(engine, lambda: own() / 2, "divided by 2", weights=COUNTS / COUNTS.sum())
        refused(engine, own, "not Σ weights × each sample's mean.*mean over all targets", weights=torch.ones(4))
        check(scored(engine, own, weights=COUNTS / COUNTS.sum()), exact_causal(model, val=VAL[:3]))


@pytest.mark.parametrize("kind", ["penalty", "named", "hidden"])
def test_a_second_term_that_is_too_small_to_see(kind: str) -> None:
    model = WithTerm(kind)
    message = {
        "penalty": r"inner.transformer.ln_f.weight\) without passing through the logits",
        "named": "1e-05 × ln_penalty",
        "hidden": r"adds an auxiliary loss in its backward pass \(AddsAuxiliaryLoss\)",
    }[kind]
    losses = losses_of_logits(lambda model, ids: model.inner(input_ids=ids).logits)
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        refused(engine, lambda: model(input_ids=IDS, labels=LABELS)["loss"], message, labels=LABELS)


@pytest.mark.thin(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers(dtype: torch.dtype) -> None:
    model = gpt2()
    losses = [
        lambda z: mean_loss(z, LABELS),
        lambda z: mean_loss(z.float(), LABELS),
        lambda z: mean_loss(z, LABELS).to(dtype),
    ]
    for loss_of in losses:
        with torch.autocast("cpu", dtype=dtype), causal_engine(model) as engine:
            smoothed = lambda: mean_loss(model(input_ids=IDS).logits.float(), LABELS, label_smoothing=0.1)  # noqa: E731
            refused(engine, smoothed, r"label smoothing 0\.(0|1)", labels=LABELS)
            scored(engine, lambda loss_of=loss_of: loss_of(model(input_ids=IDS).logits), labels=LABELS)


# Other outputs, and loops that hide the logits.


def test_a_model_in_the_manner_of_nanogpt() -> None:
    model = Nano()
    ids, targets = IDS[:, :-1], LABELS[:, 1:].contiguous()
    own = lambda: model(ids, targets)[1]  # noqa: E731
    losses = losses_of_logits(lambda model, ids: model(ids)[0])
    exact = exact_causal(gpt2(), val=VAL[:3]).total().mean(1)
    for said in (
        {"labels": LABELS},
        {"labels": torch.cat([targets[:, :1], targets], 1)},
        {"weights": COUNTS / COUNTS.sum()},
    ):
        with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
            refused(engine, own, r"not shifted.*labels=torch.cat\(\[labels\[:, :1\], labels\], 1\)", labels=targets)
            refused(engine, own, "mean over all targets|own places")
            agree(scored(engine, own, **said).total, exact)


def test_an_output_that_is_the_logits() -> None:
    model = Bare()
    losses = losses_of_logits(lambda model, ids: model(ids))
    with GradDotProdEngine(model, val_batch(VAL[:3]), val_losses=losses) as engine:
        refused(engine, lambda: mean_loss(model(IDS), LABELS, label_smoothing=0.1), "label smoothing", labels=LABELS)
        scores = scored(engine, lambda: mean_loss(model(IDS), LABELS), labels=LABELS)
    agree(scores.total, exact_causal(gpt2(), val=VAL[:3]).total().mean(1))


def test_a_loop_that_calls_the_parts_of_a_model() -> None:
    model = gpt2()
    batch = {"input_ids": IDS, "labels": LABELS}
    loss = lambda: mean_loss(model.lm_head(model.transformer(input_ids=IDS)[0]), LABELS)  # noqa: E731
    weights = COUNTS / COUNTS.sum()
    exact = exact_causal(model, val=VAL[:3])
    with causal_engine(model) as engine:
        refused(engine, loss, "GPT2LMHeadModel was not seen in this batch.*check=False", labels=LABELS)
        refused(engine, lambda: 2 * loss(), "not Σ weights × val_losses", weights=weights, batch=batch)
        check(scored(engine, loss, weights=weights, batch=batch), exact)
    with causal_engine(model, check=False) as engine:
        check(scored(engine, loss, labels=LABELS), exact)


def test_an_error_of_watch_leaves_the_batch_open() -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        engine.prepare(4)
        loss = mean_loss(model(input_ids=IDS).logits, LABELS)
        with pytest.raises(UsageError, match="divided by 2"):
            engine.watch(loss / 2, labels=LABELS)
        engine.watch(loss, labels=LABELS)
        loss.backward()
        check(engine.collect(), exact_causal(model, val=VAL[:3]))


# Models that are no language models.


def test_a_loss_of_ones_own_is_held_against_val_losses() -> None:
    model = perceptron()
    x, val = (torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
    weights = torch.tensor([2.0, 1.0, -0.5, 0.0])
    with GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine:
        total = lambda: sum_of_squares(model, x).sum()  # noqa: E731
        refused(engine, total, "not Σ weights × val_losses.*the mean over samples", batch=x)
        refused(engine, total, "not Σ weights", weights=weights, batch=x)
        refused(engine, total, r"shape \(3,\) for the train batch of 4", batch=x[:3])
        scored(engine, lambda: sum_of_squares(model, x) @ weights, weights=weights, batch=x)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine:
        plain_step(engine, model, x)  # said by nobody, trusted


def test_dropout_in_a_loss_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.5), nn.Linear(16, 5))
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(4))
    with GradDotProdEngine(model.train(), x, val_losses=sum_of_squares) as engine:
        engine.prepare(4)
        loss = sum_of_squares(model, x).mean()
        state = torch.get_rng_state()
        engine.watch(loss, batch=x)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training


class ManyClasses(nn.Module):
    """Labels (samples, classes) that are no tokens; with ``strict``, not to be left out."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.inner, self.strict = perceptron(), strict

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.inner(x)
        if labels is None:
            if self.strict:
                raise TypeError("no labels")
            return {"logits": logits}
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1) @ WEIGHTS
        return {"loss": loss, "logits": logits}


WEIGHTS = torch.tensor([2.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("strict", [False, True])
def test_labels_that_are_no_tokens_and_weights_that_are_the_users_word(strict: bool) -> None:
    model = ManyClasses(strict=strict)
    x, val = (torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
    labels = (torch.randn(4, 5, generator=torch.Generator().manual_seed(9)) > 0).long()

    def losses(model: Any, x: Tensor) -> Tensor:
        return sum_of_squares(model.inner, x)

    with GradDotProdEngine(model, val, val_losses=losses) as engine:
        own = lambda: model(x, labels)["loss"]  # noqa: E731
        assert bool(scored(engine, own, weights=WEIGHTS).total[:3].isfinite().all())


# Once, and nothing is kept.


def test_the_check_waits_for_targets() -> None:
    model = gpt2()
    nothing = torch.full_like(LABELS, IGNORED)
    with causal_engine(model) as engine:
        scores = scored(engine, lambda: model(input_ids=IDS, labels=nothing).loss, labels=nothing)
        assert bool(scores.total.isnan().all())
        refused(engine, lambda: 2 * model(input_ids=IDS, labels=LABELS).loss, "times 2", labels=LABELS)
        causal_step(engine, model)
        scored(engine, lambda: 2 * model(input_ids=IDS, labels=LABELS).loss, labels=LABELS)  # held already


@pytest.mark.parametrize("watched", [True, False])
def test_nothing_of_the_forward_pass_is_kept(watched: bool) -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        engine.prepare(4)
        output = model(input_ids=IDS, labels=LABELS)
        logits = weakref.ref(output.logits)
        if watched:
            engine.watch(output.loss, labels=LABELS)
        else:
            engine.discard()
        del output
        gc.collect()
        assert logits() is None


@pytest.mark.parametrize("grad", [False, True])
def test_an_evaluation_between_forward_and_watch(grad: bool) -> None:
    model = gpt2()
    with causal_engine(model) as engine:
        engine.prepare(4)
        loss = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        with torch.no_grad():
            model(input_ids=IDS[:2, :3])
        engine.watch(loss, labels=LABELS)
        loss.backward()
        check(engine.collect(), exact_causal(model, val=VAL[:3]))


def test_a_loss_that_uses_up_the_logits() -> None:
    # Its gradient takes their place in memory, and its backward runs once.
    model = gpt2()
    weights = torch.full((4,), 0.25)
    with causal_engine(model) as engine:
        loss = lambda: next_token_losses(model(input_ids=IDS).logits, LABELS)[0].sum() / 4  # noqa: E731
        refused(engine, lambda: loss() * 4, "times 4", weights=weights, labels=LABELS)
        check(scored(engine, loss, weights=weights, labels=LABELS), exact_causal(model, val=VAL[:3]))
