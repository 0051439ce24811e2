"""Scores in the metric of Adam: against per-sample gradients and the optimizer's own state, both in float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine, Scores, language_model_losses
from tests.indexer.dotprod.test_one_pass import Behind
from tests.support.models import gpt2, llama, next_token_loss_of
from tests.support.oracle import dense, gradient_matrix, gradients_alone, relative_error
from tests.support.scoring import BATCH, VAL, agree, causal_engine, causal_step, sum_of_squares, val_batch

Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True, eps=1e-4),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True, betas=(0.8, 0.9)),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, weight_decay=0.1),
    "groups": lambda parameters: torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "eps": 1e-6, "betas": (0.9, 0.95)},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    ),
}
MODELS = {"tied": gpt2, "untied": lambda: gpt2(tied=False), "llama": llama}


def reference_scales(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """1/(√v̂ + ε) by parameter, float64."""
    scales = {}
    for name, parameter in model.named_parameters():
        (group,) = [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]
        state = optimizer.state.get(parameter)
        if state is None:
            scales[name] = torch.zeros((), dtype=torch.float64)
            continue
        v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        corrected = v.double() / (1 - group["betas"][1] ** int(state["step"]))
        scales[name] = 1 / (corrected.sqrt() + group["eps"])
    return scales


def reference(model: nn.Module, optimizer: torch.optim.Optimizer, chosen: Callable[[str], bool]) -> Tensor:
    """(B, V): ⟨∇ℓ_i, P ∇ℓ_v⟩ over the ``chosen`` parameters."""
    wide, scales = deepcopy(model).double(), reference_scales(model, optimizer)
    of_batch = gradients_alone(wide, len(BATCH), next_token_loss_of(BATCH))
    of_val = gradients_alone(wide, len(VAL), next_token_loss_of(VAL))
    return torch.tensor(
        [
            [sum(float((one[n] * scales[n] * other[n]).sum()) for n in scales if chosen(n)) for other in of_val]
            for one in of_batch
        ],
        dtype=torch.float64,
    )


def train(engine: GradDotProdEngine, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        causal_step(engine, model)
        optimizer.step()
        optimizer.zero_grad()


def score(engine: GradDotProdEngine, model: nn.Module) -> Scores:
    with engine.scoring(len(BATCH)) as batch:
        return batch.scores(language_model_losses(model, val_batch(BATCH)))


@pytest.mark.thin(1)
@pytest.mark.parametrize("layers", ["all", "blocks"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", MODELS)
def test_equals_the_reference(architecture: str, optimizer: str, layers: Any) -> None:
    model = MODELS[architecture]()
    adam = OPTIMIZERS[optimizer](list(model.parameters()))
    engine = causal_engine(model, VAL, optimizer=adam, score_metric="adam", score_layers=layers, groups="each")
    with engine:
        train(engine, model, adam)
        expected = reference(model, adam, lambda name: layers == "all" or ".mlp." in name or "attn." in name)
        for scores in (score(engine, model), causal_step(engine, model)):
            agree(scores.groups, expected)
            agree(scores.total, expected.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("config", [ProjectionConfig(), ProjectionConfig(layers=("all",), rank_total=16)])
def test_the_sketched_score_projects_the_scaled_val_gradient(config: ProjectionConfig) -> None:
    model = llama()  # a key's bias, whose gradient is rounding noise, would be scaled to the size of the others
    adam = OPTIMIZERS["adamw"](list(model.parameters()))
    with causal_engine(model, VAL, optimizer=adam, score_metric="adam", projection=config, groups="each") as engine:
        train(engine, model, adam)
        scores = score(engine, model)
        projection = engine.method.projection
        assert projection is not None
        scales = reference_scales(model, adam)
        of_val = gradients_alone(deepcopy(model).double(), len(VAL), next_token_loss_of(VAL))
        vectors = []
        for gradients in of_val:
            scaled = {name: gradient * scales[name] for name, gradient in gradients.items()}
            blocks = [
                torch.as_tensor(projection.sides[name][1]).double()
                @ gradient_matrix(model, name, scaled)
                @ torch.as_tensor(projection.sides[name][0]).double().t()
                for name in (layer.block.name for layer in projection.plan.layers)
            ]
            vectors.append(torch.cat([block.flatten() for block in blocks]))
        val_VD = torch.stack(vectors)
        if projection.sketch:
            val_VD = val_VD @ dense(projection.sketch).double().t()
        assert scores.vectors is not None
        agree(scores.groups, scores.vectors.double() @ val_VD.t())
        plain = causal_engine(model, VAL, projection=projection)
        engine.detach()
        with plain:
            assert relative_error(scores.vectors, score(plain, model).vectors) <= 1e-6  # type: ignore[arg-type]


@pytest.mark.slow
def test_nothing_is_known_before_the_first_step_and_the_metric_comes_with_it() -> None:
    model = gpt2()
    adam = OPTIMIZERS["adamw"](list(model.parameters()))
    with causal_engine(model, VAL, optimizer=adam, score_metric="adam", val_refresh_interval=3) as engine:
        for scores in (score(engine, model), causal_step(engine, model)):
            assert bool(scores.total.isnan().all())
        adam.step()
        ages = []
        for _ in range(4):
            scores = causal_step(engine, model)
            assert bool(scores.total.isfinite().all())
            ages.append(scores.val_age)
            adam.step()
        assert ages == [0, 1, 2, 0]


@pytest.mark.slow
@pytest.mark.parametrize("projection", [None, ProjectionConfig()])
def test_an_optimizer_that_goes_on_from_a_checkpoint_scores_at_once(projection: Any) -> None:
    model = gpt2()
    adam = OPTIMIZERS["adamw"](list(model.parameters()))
    settings = {"score_metric": "adam", "projection": projection}
    with causal_engine(model, VAL, optimizer=adam, **settings) as engine:
        train(engine, model, adam, 2)
        expected = score(engine, model)
    resumed = OPTIMIZERS["adamw"](list(model.parameters()))
    resumed.load_state_dict(adam.state_dict())
    with causal_engine(model, VAL, optimizer=resumed, **settings) as engine:
        assert torch.equal(score(engine, model).total, expected.total)


def test_the_first_batch_that_has_a_metric_is_held_against_autograd() -> None:
    model, x = Behind(), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    adam = OPTIMIZERS["adamw"](list(model.parameters()))
    engine = GradDotProdEngine(model, x, val_losses=sum_of_squares, optimizer=adam, score_metric="adam")
    with engine, pytest.raises(CaptureError, match=r"second\.weight"):
        engine.prepare(4)
    grown = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    adam = OPTIMIZERS["adamw"](list(grown.parameters()))
    engine = GradDotProdEngine(grown, x, val_losses=sum_of_squares, optimizer=adam, score_metric="adam")
    with engine:
        for _ in range(2):
            with engine.scoring(4) as batch:
                batch.scores(sum_of_squares(grown, x))
        sum_of_squares(grown, x).mean().backward()
        adam.step()
        engine.refresh()
        # Only now there is something to hold: autograd's gradient is no longer the taps'.
        grown[2].weight.register_hook(lambda gradient: 0.5 * gradient)
        with engine.scoring(4) as batch, pytest.raises(CaptureError, match=r"2\.weight"):
            batch.scores(sum_of_squares(grown, x))


@pytest.mark.slow
def test_a_parameter_that_never_had_a_gradient_counts_as_zero() -> None:
    model = gpt2(tied=False)
    adam = OPTIMIZERS["adamw"](list(model.parameters()))
    with causal_engine(model, VAL, optimizer=adam, score_metric="adam") as engine:
        causal_step(engine, model)
        model.transformer.wpe.weight.grad = None
        adam.step()
        with pytest.warns(RuntimeWarning, match=r"'transformer\.wpe\.weight' never had a gradient"):
            scores = score(engine, model)
    assert not bool(scores.parameters["transformer.wpe.weight"].any())
    agree(scores.total, reference(model, adam, lambda name: True).mean(1))


class Own(torch.optim.AdamW):
    """Its step may be anything."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": None}, "give `optimizer=optimizer`"),
        ({"optimizer": torch.optim.SGD}, 'not SGD.*`score_metric="sgd"`'),
        ({"optimizer": torch.optim.NAdam}, "not NAdam"),
        ({"optimizer": Own}, "not Own"),
        ({"route": "gram"}, '`score_metric="adam"`.*`route="gram"`'),
        ({"pairs": True}, "`pairs`"),
        ({"score_metric": "lion"}, "`score_metric` 'lion' is unknown; known: sgd, adam"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    model = gpt2()
    make = settings.get("optimizer", torch.optim.AdamW)
    settings = {"score_metric": "adam", **settings, "optimizer": make and make(model.parameters(), lr=0.1)}
    with pytest.raises(UsageError, match=message):
        causal_engine(model, VAL, **settings)


@pytest.mark.slow
def test_parameters_that_the_optimizer_does_not_move() -> None:
    model = gpt2()
    adam = OPTIMIZERS["adamw"](list(model.transformer.h.parameters()))
    engine = causal_engine(model, VAL, optimizer=adam, score_metric="adam")
    with engine, pytest.raises(UsageError, match=r"'transformer\.wte\.weight' is not in the optimizer"):
        engine.prepare(4)
    with causal_engine(model, VAL, optimizer=adam, score_metric="adam", score_layers="blocks") as engine:
        train(engine, model, adam, 1)
        assert bool(score(engine, model).total.isfinite().all())
    model.transformer.h[0].requires_grad_(False)
    with pytest.raises(UsageError, match=r"transformer\.h\.0\..*projected but frozen"):
        causal_engine(model, VAL, optimizer=adam, score_metric="adam", projection=ProjectionConfig())


def test_val_groups_that_no_direct_route_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("indexer.dotprod.exact.LARGEST_VAL_GRADIENTS", 4 * gpt2().transformer.wte.weight.numel())
    model = gpt2()
    adam = OPTIMIZERS["adamw"](list(model.parameters()))
    engine = causal_engine(model, VAL, optimizer=adam, score_metric="adam", groups="each")
    with engine, pytest.raises(UsageError, match="8 val groups are too many"):
        engine.prepare(4)
