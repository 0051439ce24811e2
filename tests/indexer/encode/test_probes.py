"""What a probe must not be fooled by, and sound models that it must not refuse: found by an attack on it."""

from __future__ import annotations

from collections import UserDict
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.support.models import settle
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_of, exact_plain, plain_step, sum_of_squares

FULL = ProjectionConfig(layers=("all",), rank_total="full")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)


class ZeroBranch(Layers):
    """Works sequence first; a low-rank branch that begins at zero gets no gradient before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1)))
        return self.b(h + self.up(self.down(h))).transpose(0, 1)


def test_a_branch_that_begins_at_zero_does_not_switch_the_test_off() -> None:
    model = settle(ZeroBranch())
    nn.init.zeros_(model.up.weight)
    with GradProjLoraEngine(model, FULL) as engine:
        engine.prepare(4)
        with pytest.raises(CaptureError, match="reaches the rows of others"):
            engine.collect(sum_of_squares(model, random(4, 4, 6)))


class SoundBranch(ZeroBranch):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h + self.up(self.down(h)))


def test_nor_is_a_sound_one_refused() -> None:
    model, x = settle(SoundBranch()), random(4, 4, 6)
    nn.init.zeros_(model.up.weight)
    with GradProjLoraEngine(model, FULL) as engine:
        for _ in range(3):
            engine.prepare(4)
            found = engine.collect(sum_of_squares(model, x))
    expected = naive(model, engine.projection, 4, lambda model, i: sum_of_squares(model, x[i : i + 1]).sum())
    assert relative_error(found, expected.vectors) < 1e-5


class Mixup(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(0.7 * h + 0.3 * h.roll(1, 0) if self.training else h)


class OwnBatchNorm(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.mean.lerp_(h.detach().flatten(0, -2).mean(0), 0.1)
            return self.b(h - h.mean(0))
        return self.b(h - self.mean)


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", [Mixup, OwnBatchNorm])
def test_mixing_in_training_mode_alone(kind: type[nn.Module]) -> None:
    model = settle(kind()).train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    with (
        GradDotProdEngine(model, random(3, 4, 6, seed=1), val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match="b: its input does not follow the samples"),
    ):
        plain_step(engine, model, random(4, 4, 6))
    fresh = settle(kind()).train()
    fresh(random(4, 4, 6))  # the step's own pass, and no other, has counted
    assert len(buffers) == len(list(model.buffers()))
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), fresh.buffers(), strict=True))


class MixedAfterwards(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.tanh(self.a(x)))
        return h - h.mean(0)


def test_mixing_after_the_last_layer() -> None:
    model = settle(MixedAfterwards())
    with (
        GradDotProdEngine(model, None, projection=FULL) as engine,
        pytest.raises(CaptureError, match="changes with the batch mates"),
    ):
        plain_step(engine, model, random(4, 4, 6))
    with (
        GradDotProdEngine(model, random(3, 4, 6, seed=1), val_losses=sum_of_squares) as engine,
        pytest.raises(CaptureError, match=r"reaches the rows of others|changes with its batch mates"),
    ):
        engine.prepare(4)


@dataclass
class Batch:
    x: Tensor


class Wrapped(Layers):
    """Called with something that cannot be cut along an axis."""

    def forward(self, batch: Any) -> Tensor:
        x = batch.x if isinstance(batch, Batch) else torch.stack([one[:2] for one in batch])
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("form", ["an object", "a list of tensors"])
def test_inputs_that_cannot_be_cut(form: str) -> None:
    def given(x: Tensor) -> Any:
        return Batch(x) if form == "an object" else [torch.cat([one, random(i, 6)]) for i, one in enumerate(x)]

    def losses(model: Any, x: Tensor) -> Tensor:
        return sum_of_squares(lambda x: model(given(x)), x)  # type: ignore[arg-type]

    model, x, val = settle(Wrapped()), random(4, 2, 6), random(3, 2, 6, seed=1)
    exact = exact_of(
        model,
        4,
        lambda model, i: losses(model, x[i : i + 1]).sum(),
        3,
        lambda model, i: losses(model, val[i : i + 1]).sum(),
    )
    with GradDotProdEngine(model, val, val_losses=losses) as engine:
        engine.prepare(4)
        loss = losses(model, x).mean()
        engine.watch(loss)
        loss.backward()
        check(engine.collect(), exact)
    with GradProjLoraEngine(model, FULL) as projecting:
        projecting.prepare(4)
        vectors = projecting.collect(losses(model, x))
    expected = naive(model, projecting.projection, 4, lambda model, i: losses(model, x[i : i + 1]).sum())
    assert relative_error(vectors, expected.vectors) < 1e-5


class Noisy(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x + 0.3 * torch.randn_like(x))))


def test_a_random_forward_pass_is_left_to_the_reweighted_losses() -> None:
    model = settle(Noisy())
    state = torch.get_rng_state()
    with GradDotProdEngine(model, random(3, 4, 6, seed=1), val_losses=sum_of_squares) as engine:
        engine.refresh()
        assert torch.equal(torch.get_rng_state(), state)
        assert bool(plain_step(engine, model, random(4, 4, 6)).total.isfinite().all())


@dataclass
class Rows:
    """Of a batch, as objects: no tensor holds the samples."""

    items: list[Tensor]


@pytest.mark.parametrize("form", ["a val set of its own", "rows as objects"])
def test_losses_of_a_val_set_that_cannot_be_cut(form: str) -> None:
    """A probe of two or three samples runs on all of them: what its layers see is no mistake."""
    model, x, val = settle(SoundBranch()), random(5, 2, 6), random(4, 2, 6, seed=1)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return sum_of_squares(model, val if form == "a val set of its own" else torch.stack(batch["rows"].items))

    batch = torch.arange(4) if form == "a val set of its own" else {"id": torch.arange(4), "rows": Rows(list(val))}
    with GradDotProdEngine(model, batch, val_losses=losses) as engine:
        check(plain_step(engine, model, x), exact_plain(model, x, val))


class OfItsOwnTensors(Layers):
    """Called with what it made itself: tensors with a graph, which cannot be copied."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(x))


@pytest.mark.parametrize("engine_class", [GradDotProdEngine, GradProjLoraEngine])
def test_a_model_is_copied_while_an_engine_is_attached(engine_class: type[Any]) -> None:
    """A moving average of the weights, or the best ones."""
    model, x = settle(OfItsOwnTensors()), random(4, 2, 6)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return sum_of_squares(lambda x: model(model.a(x)), x)  # type: ignore[arg-type,operator]

    projects = engine_class is GradProjLoraEngine
    made = engine_class(model, FULL) if projects else engine_class(model, random(3, 2, 6), val_losses=losses)
    with made as engine:
        engine.prepare(4)
        each = losses(model, x)
        deepcopy(model)
        if projects:
            engine.collect(each)
        else:
            loss = each.mean()
            engine.watch(loss)
            loss.backward()
            engine.collect()
        deepcopy(model)
        keeper = engine._keeper if projects else engine._axes._keeper
        assert keeper.call is None


def test_losses_that_share_a_divisor_of_the_batch() -> None:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        weights = x[:, 0, 0].abs() + 1
        return sum_of_squares(model, x) * weights * len(x) / weights.sum()

    model = settle(SoundBranch())
    with GradDotProdEngine(model, random(4, 4, 6, seed=1), val_losses=losses) as engine:
        engine.prepare(4)


def test_a_mapping_that_is_used_by_its_attributes_and_one_val_sample() -> None:
    class Encoding(UserDict):  # type: ignore[type-arg]  # as transformers' BatchEncoding
        def __getattr__(self, name: str) -> Any:
            try:
                return self.data[name]
            except KeyError:
                raise AttributeError(name) from None

    def losses(model: nn.Module, batch: Any) -> Tensor:
        assert batch.temperature.shape == (1,) or len(batch.x) > 1
        return sum_of_squares(model, batch.x) / batch.temperature[0]

    model, x, val = settle(SoundBranch()), random(4, 4, 6), random(1, 4, 6, seed=1)
    batch = Encoding({"x": val, "temperature": torch.ones(1)})
    with GradDotProdEngine(model, batch, val_losses=losses) as engine:
        check(plain_step(engine, model, x), exact_plain(model, x, val))


@pytest.mark.slow
def test_layers_that_were_compiled_in_place() -> None:
    model, x = settle(SoundBranch()), random(4, 4, 6)
    model.compile(backend="aot_eager")
    with GradProjLoraEngine(model, FULL) as engine:
        engine.prepare(4)
        found = engine.collect(sum_of_squares(model, x))
    torch._dynamo.reset()
    plain = settle(SoundBranch())
    expected = naive(plain, engine.projection, 4, lambda model, i: sum_of_squares(model, x[i : i + 1]).sum())
    assert relative_error(found, expected.vectors) < 1e-5


def test_small_float16_gradients() -> None:
    """Below float16's smallest normal number powers of two round, too."""
    model = settle(SoundBranch())
    for parameter in model.parameters():
        parameter.data *= 0.3
    model.half()

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return 1e-3 * model(x.half()).float().square().flatten(1).mean(1)

    with GradDotProdEngine(model, random(3, 4, 6, seed=1), val_losses=losses) as engine:
        engine.examine()
