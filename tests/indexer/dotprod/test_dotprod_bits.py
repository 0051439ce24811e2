"""Training is what it was: after many steps every weight has the same bits with and without the engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from tests.indexer.encode.test_non_interference import hooks_of
from tests.support.models import examples, gpt2, llama, pad, settle
from tests.support.scoring import VAL, causal_engine, plain_step, sum_of_squares

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

STEPS = 20
MODES: dict[str, dict[str, Any]] = {
    "auto": {},
    "direct": {"route": "direct"},
    "gram": {"route": "gram"},
    "each": {"groups": "each"},
    "pairs": {"pairs": True},
    "sketched": {"projection": ProjectionConfig()},
    "plain blocks": {"projection": ProjectionConfig(layers=("all",), rank_total=16)},
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a model is trained."""

    make: Callable[..., Any] = gpt2
    """Dropout as in the model's own config: GPT-2 has it, in the embeddings, the attention and the residuals."""
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    accumulation: int = 1
    clip: float | None = None
    reentrant: bool | None = None
    """The kind of gradient checkpointing; None for none."""

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.make(layers=1, **self.settings).to(self.dtype).train()
        if self.reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": self.reentrant})
        return model

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)

    def train(self, model: Any, engine_of: Callable[[torch.optim.Optimizer], GradDotProdEngine] | None) -> list[Tensor]:
        """All that a training run leaves behind: losses, weights, optimizer state, random state."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=self.autocast == torch.float16)
        engine = None if engine_of is None else engine_of(optimizer).attach()
        torch.manual_seed(1)
        losses = []
        for step in range(STEPS):
            for micro in range(self.accumulation):
                ids, labels, mask = pad(examples((9, 4, 12), seed=step * self.accumulation + micro))
                if engine is not None:
                    engine.prepare(3, loss_scale=scaler.get_scale())
                with self.context():
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                if engine is not None:
                    engine.watch(loss, labels=labels)
                scaler.scale(loss / self.accumulation).backward()
                if engine is not None:
                    assert bool(torch.isfinite(engine.collect().total).all())
                losses.append(loss.detach().float())
            if self.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if engine is not None:
            engine.detach()
        state = [x for of in optimizer.state_dict()["state"].values() for x in of.values()]
        return [torch.stack(losses), *model.state_dict().values(), *state, torch.get_rng_state()]


RUNS = {
    "float32": Run(),
    "llama": Run(make=llama, settings={"attention_dropout": 0.1}),
    "bfloat16": Run(dtype=torch.bfloat16),
    "autocast": Run(autocast=torch.bfloat16),
    "accumulation": Run(accumulation=2),
    "clipping": Run(clip=0.1),
    "checkpointing": Run(reentrant=False),
    "reentrant": Run(reentrant=True),
}

CASES = [(run, mode) for run in RUNS for mode in ("auto", "pairs", "sketched")]
CASES += [("float32", mode) for mode in MODES if ("float32", mode) not in CASES]

unscored: dict[str, list[Tensor]] = {}


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.thin(4)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_same_bits(name: str, mode: str) -> None:
    run = RUNS[name]
    if name not in unscored:
        unscored[name] = run.train(run.model(), None)
    model = run.model()
    hooks = hooks_of(model)  # transformers' own, for checkpointing
    found = run.train(
        model,
        lambda optimizer: causal_engine(model, VAL[:2], optimizer=optimizer, val_refresh_interval=3, **MODES[mode]),
    )
    assert same(found, unscored[name])
    assert hooks_of(model) == hooks


def test_two_runs_differ_where_anything_does() -> None:
    # What the comparison above is worth: one other random number, and the weights are others.
    run = RUNS["float32"]
    one, other = run.model(), run.model()
    expected = run.train(one, None)
    torch.nn.init.normal_(other.transformer.ln_f.bias)
    assert not same(run.train(other, None), expected)


@pytest.mark.thin(1)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_float16_with_a_loss_scaler(clip: float | None) -> None:
    run = Run(autocast=torch.float16, clip=clip)
    model = run.model()
    expected = run.train(run.model(), None)
    assert same(run.train(model, lambda optimizer: causal_engine(model, VAL[:2], optimizer=optimizer)), expected)


# Around the steps.


def test_the_val_pass_leaves_gradients_modes_and_randomness_alone() -> None:
    model = gpt2().train()
    model.transformer.h[0].eval()  # a part that its owner keeps in eval mode
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    modes = [module.training for module in model.modules()]
    seen = []
    model.transformer.drop.register_forward_hook(lambda module, args, y: seen.append(module.training))
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with causal_engine(model) as engine:
        state = torch.get_rng_state()
        engine.refresh()
        assert torch.equal(torch.get_rng_state(), state)
        assert seen
        assert not any(seen)
        assert [module.training for module in model.modules()] == modes
        assert all(bool((parameter.grad == 7.0).all()) for parameter in model.parameters())
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))


def test_a_val_pass_that_fails_leaves_them_alone_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    model[0].eval()

    def fails(model: Any, x: Tensor) -> Tensor:
        model.train()
        model(x)
        torch.rand(5)
        raise KeyboardInterrupt

    with GradDotProdEngine(model, torch.ones(2, 3), val_losses=fails) as engine:
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            engine.refresh()
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == [True, False, True]
        model(torch.ones(2, 3)).sum().backward()  # an ordinary pass, not taken for a val pass


@pytest.mark.thin(2)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_between_steps_changes_nothing(mode: str, detached: bool) -> None:
    ids, labels, mask = pad(examples((5, 8), seed=9))
    found = []
    for evaluates in (False, True):
        run = RUNS["float32"]
        model = run.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scores = []
        with causal_engine(model, optimizer=optimizer, val_refresh_interval=2, **MODES[mode]) as engine:
            for step in range(4):
                batch = pad(examples((9, 4, 12), seed=step))
                engine.prepare(3)
                if evaluates and not detached:  # even with a batch open
                    with torch.no_grad():
                        model.eval()(input_ids=batch[0])
                        model.train()
                loss = model(input_ids=batch[0], attention_mask=batch[2], labels=batch[1]).loss
                engine.watch(loss, labels=batch[1])
                loss.backward()
                scores.append(engine.collect())
                optimizer.step()
                optimizer.zero_grad()
                if evaluates:
                    if detached:
                        engine.detach()
                        assert hooks_of(model) == 0
                    model.eval()
                    with torch.set_grad_enabled(step % 2 == 0):
                        assert bool(model(input_ids=ids, attention_mask=mask, labels=labels).loss.isfinite())
                    model.train()
                    if detached:
                        engine.attach()
        found.append(([s.total for s in scores], [s.pairs for s in scores], [s.val_age for s in scores], model))
    (totals, pairs, ages, model), (their_totals, their_pairs, their_ages, their_model) = found
    assert same(their_totals, totals)
    assert ages == their_ages == [0, 1, 0, 1]
    if mode == "pairs":
        assert same(their_pairs, pairs)
    assert same(list(their_model.state_dict().values()), list(model.state_dict().values()))


def test_nothing_is_left_on_the_model_and_its_parameters() -> None:
    model = settle(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attributes = [sorted(vars(module)) for module in model.modules()]
    x = torch.ones(2, 3)
    for leave in ("in the middle", "after a step", "at once"):
        engine = GradDotProdEngine(model, x, val_losses=sum_of_squares, optimizer=optimizer).attach()
        assert engine.attached
        if leave == "in the middle":
            engine.prepare(2)
            engine.watch(sum_of_squares(model, x).mean())
        elif leave == "after a step":
            plain_step(engine, model, x)
        engine.detach()
        assert not engine.attached
        assert hooks_of(model) == 0
        assert all(not parameter._backward_hooks for parameter in model.parameters())
        assert not optimizer._optimizer_step_post_hooks
        assert [sorted(vars(module)) for module in model.modules()] == attributes
