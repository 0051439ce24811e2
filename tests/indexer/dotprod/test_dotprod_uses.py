"""Parameters that are used twice, in part, in unusual ways or not at all: exact without code of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indexer.dotprod import GradDotProdEngine, Scores
from indexer.dotprod.exact import Route
from tests.indexer.layers.test_ties import (
    SharedBias,
    SharedModule,
    SharedWeight,
    SharedWeightAndBias,
    TiedLanguageModel,
)
from tests.support.models import VOCABULARY, gpt2, llama, settle
from tests.support.scoring import (
    BATCH,
    VAL,
    Exact,
    agree,
    causal_engine,
    causal_step,
    check,
    exact_causal,
    exact_of,
    exact_plain,
    plain_step,
    sum_of_squares,
    val_batch,
)

ROUTES: tuple[Route, ...] = ("direct", "gram")


class SharedNorm(nn.Module):
    """One norm object run twice, and its weight in another of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.LayerNorm(6), nn.RMSNorm(6)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.tanh(self.one(x + self.one(x))))


class SquareTied(nn.Module):
    """A weight and its transpose's place: a Linear and an embedding of one square matrix, and a bag of calls."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(8, 8, **settings), nn.Linear(8, 8)
        self.linear.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.embedding(ids))) + self.embedding(ids)


class KeywordsOnly(nn.Module):
    """Layers that are called by the names of their arguments, one of them in a loop of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.one(input=x)) + self.norm(input=x)
        return x


class InPlace(nn.Module):
    """What follows a layer changes its output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.one(x), inplace=True)
        y = self.norm(y)
        y += 1
        z = self.two(y)
        z.mul_(2)[..., 0] = 0
        return z


def numbers(count: int, seed: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def places(count: int, seed: int, *shape: int) -> Tensor:
    return torch.randint(8, (count, *shape), generator=torch.Generator().manual_seed(seed))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "module": SharedModule,
    "weight": SharedWeight,
    "weight and bias": SharedWeightAndBias,
    "bias": SharedBias,
    "norm": SharedNorm,
    "keywords": KeywordsOnly,
    "in place": InPlace,
}


@pytest.mark.thin
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_shared_and_in_place(kind: str, shape: tuple[int, ...], route: Route) -> None:
    model = settle(MODULES[kind]())
    x, val = numbers(3, 0, *shape), numbers(4, 1, *shape)
    engine = GradDotProdEngine(model, [val[:1], val[1:]], val_losses=sum_of_squares, route=route, pairs=True)
    with engine:
        scores = plain_step(engine, model, x)
    check_plain(scores, model, x, val)


def check_plain(scores: Scores, model: nn.Module, x: Tensor, val: Tensor) -> None:
    exact = exact_plain(model, x, val)
    agree(scores.total, exact.total().mean(1))
    for name, products in exact.products.items():
        error = float((scores.parameters[name] - products.mean(1)).norm())
        assert error <= 1e-5 * float(exact.sizes[name].norm()), name
    assert scores.pairs is not None
    agree(scores.pairs, exact_plain(model, x, x).total())


@pytest.mark.thin
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("settings", [{}, {"padding_idx": 3}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("make", [SquareTied, lambda **s: nn.Sequential(nn.Embedding(8, 6, **s))])
def test_embeddings(make: Callable[..., nn.Module], settings: dict[str, Any], route: Route) -> None:
    if settings.get("sparse") and make is SquareTied:
        settings = {"padding_idx": 0}  # torch cannot add a sparse gradient to a dense one in every order
    model = settle(make(**settings))
    x, val = places(3, 0, 5), places(4, 1, 7)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares, route=route, pairs=True) as engine:
        scores = plain_step(engine, model, x)
    check_plain(scores, model, x, val)


@pytest.mark.thin
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head(head_first: bool, padding: int | None, route: Route) -> None:
    model = settle(TiedLanguageModel(head_first=head_first, bias=True, padding=padding))
    x, val = places(3, 0, 5), places(4, 1, 7)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares, route=route, pairs=True) as engine:
        scores = plain_step(engine, model, x)
    check_plain(scores, model, x, val)
    assert model.get_parameter("embedding.weight").shape[0] == VOCABULARY


class Positions(nn.Module):
    """Token and position embeddings; the positions come as (1, T) or (B, T)."""

    def __init__(self, *, of_each: bool) -> None:
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(8, 6), nn.Embedding(9, 6), nn.Linear(6, 8)
        self.of_each = of_each

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1]).unsqueeze(0)
        return self.head(self.tokens(ids) + self.places(at.expand(len(ids), -1) if self.of_each else at))


@pytest.mark.thin
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("of_each", [False, True])
def test_position_embeddings(of_each: bool, route: Route, count: int) -> None:
    model = settle(Positions(of_each=of_each))
    x, val = places(count, 0, 5), places(count, 1, 5)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares, route=route, pairs=True) as engine:
        scores = plain_step(engine, model, x)
    check_plain(scores, model, x, val)


@pytest.mark.parametrize("route", ROUTES)
def test_float64_models_keep_their_precision(route: Route) -> None:
    model = gpt2().double()
    exact = exact_causal_in_double(model)
    with causal_engine(model, VAL, val_losses=double_losses, route=route, pairs=True) as engine:
        ids, labels, mask = val_batch(BATCH).values()
        del mask
        engine.prepare(4)
        loss = double_losses(model, {"input_ids": ids, "labels": labels}).mean()
        engine.watch(loss)
        loss.backward()
        check(engine.collect(), exact, tolerance=1e-12)


def double_losses(model: Any, batch: Any) -> Tensor:
    """Without a mask: padding is on the right, and no target."""
    logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return each.sum(1) / (labels != -100).sum(1)


def exact_causal_in_double(model: nn.Module) -> Exact:
    def loss_of(batch: list[Any]) -> Callable[[nn.Module, int], Tensor]:
        return lambda model, i: double_losses(
            model, {"input_ids": batch[i][0].unsqueeze(0), "labels": batch[i][1].unsqueeze(0)}
        ).sum()

    return exact_of(model, len(BATCH), loss_of(BATCH), len(VAL), loss_of(VAL))


@pytest.mark.thin(1)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_checkpointed_layers(make: Any, route: Route, reentrant: bool) -> None:
    model = make(**({} if make is llama else {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}))
    exact, pairs = exact_causal(model, val=VAL[:3]), exact_causal(model, val=BATCH)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with causal_engine(model, route=route, pairs=True) as engine:
        for _ in range(2):
            scores = causal_step(engine, model)
            check(scores, exact)
            assert scores.pairs is not None
            agree(scores.pairs, pairs.total())


# Some parameters only.


FROZEN: dict[str, Callable[[str], bool]] = {
    "the biases train": lambda name: not name.endswith("bias"),
    "one layer trains": lambda name: ".h.1." not in name,
    "the weights of norms and the head are frozen": lambda name: "ln_" in name and name.endswith("weight"),
    "the embeddings are frozen": lambda name: "wte" in name or "wpe" in name,
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_have_no_part_in_the_score(kind: str, route: Route) -> None:
    model = gpt2()
    exact = exact_causal(model, val=VAL[:3])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not FROZEN[kind](name))
    with causal_engine(model, route=route) as engine:
        scores = causal_step(engine, model)
    check(scores, exact.only(lambda name: not FROZEN[kind](name)))
    assert all(parameter.requires_grad != FROZEN[kind](name) for name, parameter in model.named_parameters())


EXCLUDED: dict[str, tuple[str | list[str], Callable[[str], bool]]] = {
    "a block": (["transformer.h.1"], lambda name: ".h.1." in name),
    "an alias": (["mlp", "norm"], lambda name: ".mlp." in name or "ln_" in name),
    "a glob": (["h.*.attn.c_proj"], lambda name: "attn.c_proj" in name),
    "one as a string": ("ln_f", lambda name: "ln_f" in name),
    "parameters": (["h.0.*.c_fc.bias", "wpe.weight"], lambda name: "h.0.mlp.c_fc.bias" in name or "wpe" in name),
    "a tied weight by its second name": (["lm_head"], lambda name: "wte" in name),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("kind", EXCLUDED)
def test_excluded_layers_are_left_out(kind: str) -> None:
    patterns, hit = EXCLUDED[kind]
    model = gpt2()
    with causal_engine(model, exclude_layers=patterns) as engine:
        scores = causal_step(engine, model)
    check(scores, exact_causal(model, val=VAL[:3]).only(lambda name: not hit(name)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_linears_of_the_blocks_alone(tied: bool) -> None:
    model = gpt2(tied=tied)
    with causal_engine(model, score_layers="blocks") as engine:
        scores = causal_step(engine, model)
    check(scores, exact_causal(model, val=VAL[:3]).only(lambda name: ".attn." in name or ".mlp." in name))


def test_blocks_without_some_of_their_layers() -> None:
    model = llama()
    with causal_engine(model, score_layers="blocks", exclude_layers=["self_attn"]) as engine:
        scores = causal_step(engine, model)
    check(scores, exact_causal(model, val=VAL[:3]).only(lambda name: ".mlp." in name))


class Adapted(nn.Module):
    """A frozen Linear with a trainable low-rank path beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("route", ROUTES)
def test_low_rank_adapters(route: Route) -> None:
    model = llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
    settle(model)
    with causal_engine(model, route=route, pairs=True) as engine:
        scores = causal_step(engine, model)
    adapters = exact_causal(model, val=VAL[:3]).only(lambda name: ".down." in name or ".up." in name)
    assert len(adapters.products) == 8
    check(scores, adapters)


class TwoHeads(nn.Module):
    """Chosen by the input: every sample of a batch goes through one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.goes_left = True

    def forward(self, x: Tensor) -> Tensor:
        return (self.left if self.goes_left else self.right)(torch.tanh(self.body(x)))


@pytest.mark.parametrize("route", ROUTES)
def test_a_parameter_that_one_side_does_not_depend_on_scores_zero(route: Route) -> None:
    model = settle(TwoHeads())
    x, val = numbers(3, 0, 6), numbers(4, 1, 6)

    def val_losses(model: Any, x: Tensor) -> Tensor:
        model.goes_left = False
        try:
            return sum_of_squares(model, x)
        finally:
            model.goes_left = True

    exact = exact_of(
        model,
        len(x),
        lambda model, i: sum_of_squares(model, x[i : i + 1]).sum(),
        len(val),
        lambda model, i: val_losses(model, val[i : i + 1]).sum(),
    )
    with GradDotProdEngine(model, val, val_losses=val_losses, route=route) as engine:
        scores = plain_step(engine, model, x)
    agree(scores.total, exact.total().mean(1))
    for name in ("left.weight", "left.bias", "right.weight", "right.bias"):
        assert torch.equal(scores.parameters[name], torch.zeros(3, dtype=torch.float64))


def test_a_users_own_hook_may_change_a_layers_output() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    x, val = numbers(3, 0, 6), numbers(4, 1, 6)
    exact = exact_plain(model, x, val)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine:
        check(plain_step(engine, model, x), exact)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
def test_gradients_of_higher_order_do_not_stay_in_the_scores() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    x, val = numbers(3, 0, 6), numbers(4, 1, 6)
    with GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine:
        engine.prepare(3)
        loss = sum_of_squares(model, x).mean()
        engine.watch(loss)
        loss.backward(create_graph=True)
        scores = engine.collect()
    assert not scores.total.requires_grad
    check(scores, exact_plain(model, x, val))
    for parameter in model.parameters():
        parameter.grad = None  # it holds its own graph
