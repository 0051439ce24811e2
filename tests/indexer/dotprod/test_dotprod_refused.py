"""What cannot be scored is refused before training, and what hides from the taps in the first batch; both by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghoststore.errors import CaptureError, LayerError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.dotprod.exact import Route
from tests.indexer.encode.test_non_interference import hooks_of
from tests.support.models import bert_causal, gpt2, perceptron, settle
from tests.support.scoring import (
    BATCH,
    VAL,
    causal_engine,
    causal_step,
    check,
    exact_plain,
    plain_step,
    sum_of_squares,
    val_batch,
)

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class WithToken(nn.Module):
    """A parameter of its own, as a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.linear = nn.Parameter(torch.ones(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.token)


def sequential(**named: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, module in named.items():
        model.add_module(name, module)
    return model


def batch_norm(**settings: Any) -> nn.Module:
    return sequential(first=nn.Linear(6, 6), norm=nn.BatchNorm1d(6, **settings))


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "batch norm": (batch_norm, UsageError, "norm is a BatchNorm1d"),
    "batch norm without statistics": (
        lambda: batch_norm(track_running_stats=False).eval(),
        UsageError,
        "norm is a BatchNorm1d",
    ),
    "custom parameter": (WithToken, LayerError, r"the model itself \(WithToken\).*`exclude_layers=\['token'\]`"),
    "max_norm": (lambda: sequential(e=nn.Embedding(5, 6, max_norm=1.0)), LayerError, "'e' has max_norm"),
    "scale_grad_by_freq": (
        lambda: sequential(e=nn.Embedding(5, 6, scale_grad_by_freq=True)),
        LayerError,
        "'e' has scale_grad_by_freq",
    ),
    "two devices": (
        lambda: sequential(one=nn.Linear(6, 6), two=nn.Linear(6, 6, device="meta")),
        UsageError,
        "lie on cpu, meta",
    ),
    "nothing trains": (lambda: nn.Linear(6, 6).requires_grad_(False), UsageError, "no trainable parameter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models(kind: str) -> None:
    make, error, message = REFUSED[kind]
    model = make()
    with pytest.raises(error, match=message):
        GradDotProdEngine(model, X, val_losses=sum_of_squares)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["h.7"], "'h.7' matches no module and no parameter of GPT2LMHeadModel"),
        (["transformer.h.0", "h.1.mpl"], "'h.1.mpl'"),
        ("mpl", "'mpl'"),
        (["transformer"], r"every trainable parameter is excluded by \['transformer'\]"),
    ],
)
def test_patterns(patterns: Any, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        causal_engine(gpt2(), exclude_layers=patterns)


def test_the_advice_of_a_refusal_works() -> None:
    model = settle(WithToken())
    exact = exact_plain(model, X, X).only(lambda name: name != "token")
    for way in ("excluded", "frozen"):
        model.token.requires_grad_(way == "excluded")
        exclude = ["token"] if way == "excluded" else []
        with GradDotProdEngine(model, X, val_losses=sum_of_squares, exclude_layers=exclude) as engine:
            check(plain_step(engine, model, X), exact)


def test_blocks_where_there_are_none_or_none_trains() -> None:
    with pytest.raises(LayerError, match="Sequential has no linears inside transformer blocks"):
        GradDotProdEngine(perceptron(), X, val_losses=sum_of_squares, score_layers="blocks")
    model = gpt2()
    model.transformer.h.requires_grad_(False)
    with pytest.raises(LayerError, match=r"no parameter of transformer\.h\.0\..*is trainable"):
        causal_engine(model, score_layers="blocks")


def test_a_batch_norm_that_wakes_up_after_attaching() -> None:
    model = batch_norm()
    model.norm.requires_grad_(False)
    model.eval()
    with GradDotProdEngine(model, X, val_losses=sum_of_squares) as engine:
        check(plain_step(engine, model, X), exact_plain(model, X, X).only(lambda name: "first" in name))
        model.train()
        with pytest.raises(UsageError, match=r"norm is a BatchNorm1d.*after model.train\(\)"):
            engine.prepare(3)


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), nn.LayerNorm(6)])
def test_a_layer_whose_first_axis_is_not_the_batch(layer: nn.Module) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    model = Turned()
    x = torch.ones(3, 5, 6)
    with (
        GradDotProdEngine(model, x, val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match=r"inner: saw an input of shape \(5, 3, 6\) in a batch of 3 samples"),
    ):
        engine.prepare(3)


def test_an_index_of_one_axis() -> None:
    # One index a sample. One that counts up looks like positions at first.
    model = settle(nn.Sequential(nn.Embedding(8, 6)))
    for index, message in (
        (torch.tensor([3, 1, 2, 2]), r"0: saw .* an index of one axis.*\(samples, 1\)"),
        (torch.arange(4), "watching the layers changes what this model computes"),
    ):
        with (
            GradDotProdEngine(model, index, val_losses=sum_of_squares) as engine,
            pytest.raises(CaptureError, match=message),
        ):
            engine.prepare(3)


# A parameter that is used where no tap sees it.


class Behind(nn.Module):
    """A tied head that is no module: a functional call on the embedding's weight, now and then."""

    def __init__(self, *, when: str) -> None:
        super().__init__()
        self.emb, self.linear, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8)
        self.when = when
        self.validates = False

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.linear(self.emb(ids)))
        used = {"always": True, "val": self.validates, "train": not self.validates, "never": False}[self.when]
        return self.head(x) + (F.linear(x, self.emb.weight) if used else 0)


def losses_of_behind(model: Any, ids: Tensor) -> Tensor:
    model.validates = True
    try:
        return sum_of_squares(model, ids)
    finally:
        model.validates = False


IDS = torch.randint(8, (3, 5), generator=torch.Generator().manual_seed(0))
VAL_IDS = torch.randint(8, (4, 5), generator=torch.Generator().manual_seed(1))


@pytest.mark.thin
@pytest.mark.parametrize("groups", [None, "each"])
@pytest.mark.parametrize("route", ["direct", "gram"])
@pytest.mark.parametrize("when", ["always", "val", "train"])
def test_a_functional_use_of_a_weight_is_found_in_the_first_batch(when: str, route: Route, groups: Any) -> None:
    model = settle(Behind(when=when))
    engine = GradDotProdEngine(model, VAL_IDS, val_losses=losses_of_behind, route=route, groups=groups)
    with engine:
        for _ in range(2):  # and again, while it is so
            with pytest.raises(CaptureError, match=r"'emb.weight'.*`exclude_layers`; `check=False` trusts"):
                plain_step(engine, model, IDS)
            engine.discard()
        model.when = "never"
        engine.refresh()
        plain_step(engine, model, IDS)
    model.when = when
    with GradDotProdEngine(model, VAL_IDS, val_losses=losses_of_behind, exclude_layers=["emb"]) as engine:
        plain_step(engine, model, IDS)


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_a_functional_use_in_the_val_pass_is_found_before_the_first_batch(route: Route) -> None:
    """On the Gram route, too, which forms no val gradient: a sum of products with it may be right by chance."""
    model = settle(Behind(when="val"))
    with (
        GradDotProdEngine(model, VAL_IDS, val_losses=losses_of_behind, route=route) as engine,
        pytest.raises(CaptureError, match=r"'emb.weight': its val gradient differs"),
    ):
        engine.refresh()


@pytest.mark.parametrize("route", ["direct", "gram"])
def test_a_first_batch_without_a_gradient_does_not_use_up_the_check(route: Route) -> None:
    model = settle(Behind(when="train"))
    with GradDotProdEngine(model, VAL_IDS, val_losses=losses_of_behind, route=route) as engine:
        engine.prepare(3)
        loss = sum_of_squares(model, IDS).mean()
        engine.watch(loss)
        (0 * loss).backward()
        assert bool(engine.collect().total.isnan().all())
        with pytest.raises(CaptureError, match=r"'emb.weight'"):
            plain_step(engine, model, IDS)


def test_the_check_can_be_left_out() -> None:
    model = settle(Behind(when="always"))
    with GradDotProdEngine(model, VAL_IDS, val_losses=losses_of_behind, check=False) as engine:
        plain_step(engine, model, IDS)


def test_a_module_that_was_replaced_after_attaching() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)))
    with GradDotProdEngine(model, X, val_losses=sum_of_squares) as engine:
        twin = nn.Linear(6, 6)
        twin.weight, twin.bias = model[0].weight, model[0].bias
        model[0] = twin
        with pytest.raises(CaptureError, match=r"'0.weight'"):
            engine.prepare(3)


def test_a_parameter_whose_gradient_is_zero_is_no_reason() -> None:
    # A key's bias moves all logits of a query alike: its gradient is rounding noise.
    for route in ("direct", "gram"):
        model = gpt2()
        with causal_engine(model, route=route) as engine:
            scores = causal_step(engine, model)
        assert float(scores.parameters["transformer.h.0.attn.c_attn.bias"].abs().sum()) > 0
    bert = bert_causal()
    with causal_engine(bert) as engine:
        scores = causal_step(engine, bert)
    keys = [name for name in scores.parameters if name.endswith("key.bias")]
    assert len(keys) == 2
    assert all(float(scores.parameters[name].norm()) <= 1e-6 * float(scores.total.norm()) for name in keys)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_refresh_interval": 0}, "`val_refresh_interval` must be at least 1 step, not 0"),
        ({"route": "fastest"}, "`route` 'fastest' is unknown; known: auto, direct, gram"),
        ({"projection": ProjectionConfig(), "pairs": True}, "belong to the exact score"),
        ({"projection": ProjectionConfig(), "route": "gram"}, "belong to the exact score"),
        ({"projection": ProjectionConfig(), "exclude_layers": ["ln_f"]}, "belong to the exact score"),
        ({"projection": ProjectionConfig(), "score_layers": "blocks"}, "belong to the exact score"),
        ({"score_layers": "heads"}, "`score_layers` 'heads' is unknown; known: blocks, all"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        causal_engine(gpt2(), **settings)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(["a", "b"], "`groups` names 2 val samples, but there are 3"), ("domain", "not 'domain'"), ([], "names 0 val")],
)
def test_groups(groups: Any, message: str) -> None:
    with causal_engine(gpt2(), groups=groups) as engine, pytest.raises(UsageError, match=message):
        engine.prepare(4)


@pytest.mark.parametrize("val", [[], {}, "text", [{"input_ids": "text"}], 7])
def test_val_sets_without_samples(val: Any) -> None:
    with pytest.raises(UsageError, match=r"no samples|holds tensors"):
        GradDotProdEngine(gpt2(), val).attach().prepare(4)


def test_an_empty_val_batch() -> None:
    empty = {name: value[:0] for name, value in val_batch(VAL).items()}
    with GradDotProdEngine(gpt2(), empty) as engine, pytest.raises(UsageError, match="the val set has no samples"):
        engine.prepare(4)


def test_a_model_that_is_no_language_model_needs_a_loss() -> None:
    with pytest.raises(UsageError, match="give `val_losses=f`"):
        GradDotProdEngine(nn.Linear(6, 6), X)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda model, x: model(x).sum(), UsageError, r"shape \(\) for a val batch of 3 samples"),
        (lambda model, x: model(x)[:2, 0], UsageError, r"shape \(2,\)"),
        (lambda model, x: model(x).sum(1).detach(), CaptureError, "no gradient"),
        (lambda model, x: x.sum(1).requires_grad_(), CaptureError, "do not depend on any scored layer"),
        (lambda model, x: model(x).sum(1) / torch.tensor([1.0, 0.0, 1.0]), UsageError, r"val sample\(s\) \[1\]"),
    ],
)
def test_val_losses(losses: Any, error: type[Exception], message: str) -> None:
    model = settle(nn.Sequential(nn.Linear(6, 4)))
    with (
        GradDotProdEngine(model, X.clone(), val_losses=losses) as engine,
        pytest.raises(error, match=message),
    ):
        engine.prepare(3)


def test_the_place_of_a_bad_val_sample_counts_all_batches() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 4)))
    bad = X.clone()
    bad[1] = torch.nan
    with (
        GradDotProdEngine(model, [X, bad], val_losses=sum_of_squares) as engine,
        pytest.raises(UsageError, match=r"val sample\(s\) \[4\] is not finite"),
    ):
        engine.prepare(3)


def test_a_projected_layer_without_part_in_the_loss() -> None:
    model = gpt2()
    with causal_engine(model, projection=ProjectionConfig()) as engine:
        engine.prepare(4)
        batch = val_batch(BATCH)
        loss = model.transformer.wte(batch["input_ids"]).square().mean()
        engine.watch(loss)
        loss.backward()
        with pytest.raises(CaptureError, match=r"had no part in the loss: transformer.h.0.attn.c_attn"):
            engine.collect()
        causal_step(engine, model)
