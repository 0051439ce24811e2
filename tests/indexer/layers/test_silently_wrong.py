"""Modules whose gradients were wrong without a word: exact now, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from indexer.layers import layer_type_of
from tests.support.around import Around
from tests.support.oracle import naive, relative_error
from tests.support.scoring import check, exact_plain, plain_step, sum_of_squares

D = Around.width
TABLE = torch.randn(9, D, generator=torch.Generator().manual_seed(2))


def drawn(count: int, positions: int, seed: int) -> Tensor:
    return torch.randn(count, positions, D, generator=torch.Generator().manual_seed(seed))


X, VAL = drawn(3, 4, 0), drawn(5, 4, 1)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(D, D) / 3)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.a) @ self.b.t() + x


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


class InnerToo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scale()
        self.w = self.inner.w

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) + self.w


def loss_alone(model: nn.Module, i: int) -> Tensor:
    return sum_of_squares(model, X[i : i + 1]).sum()


@pytest.mark.parametrize("layer", [TwoNames, InnerToo])
def test_a_parameter_with_two_names_where_a_module_runs_again(layer: type[nn.Module]) -> None:
    """Every name gave the gradient of all its uses: they were counted twice."""
    model = Around(layer()).eval()
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total="full")) as engine:
        engine.prepare(len(X))
        vectors = engine.collect(sum_of_squares(model, X))
    assert relative_error(vectors, naive(model, engine.projection, len(X), loss_alone).vectors) < 1e-5
    engine = GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100)
    with engine:
        scores = plain_step(engine, model, X)
    expected = exact_plain(model, X, VAL)
    check(scores, expected)


class Tied(nn.Module):
    """A weight that is used with its module, and without it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.up(x)) @ self.up.weight


class Shrunk(nn.Linear):
    """The gradient of the weight is a tenth of what the formula says."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.1 * y + 0.9 * y.detach()


class Beside(Scale):
    """Passes a part of its work on beside what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x * self.w
        return torch.tanh(self.kept)


def call_beside(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x) + layer.kept  # type: ignore[operator]
    return y


class PaddedTable(nn.Embedding):
    """Computes what a torch.nn.Embedding does, but its padding index has a gradient."""

    embed_scale = 2.0

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) * self.embed_scale


def call_table(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = x + layer((x[..., 0] > 0).long())
    return y


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("layer", "call"),
    [(Tied, None), (Beside, call_beside)],
    ids=["used without its module", "beside the output"],
)
def test_vectors_that_are_not_autograds_are_refused(
    layer: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor] | None, batch: int
) -> None:
    """No check held a vector against autograd. What the advice names can be left out."""
    model = Around(layer(), call).eval()
    config = ProjectionConfig(layers=("all",), rank_total="full")
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(batch)
        losses = sum_of_squares(model, X[:batch])
        with pytest.raises(CaptureError, match="its gradient is not autograd's") as caught:
            engine.collect(losses)
    config = ProjectionConfig(layers=("all",), rank_total=16, exclude_layers=caught.value.unsupported)
    with GradProjLoraEngine(model, config) as engine:
        engine.prepare(batch)
        vectors = engine.collect(sum_of_squares(model, X[:batch]))
    vars(model.layer).pop("kept", None)  # has a graph, which cannot be copied
    expected = naive(model, engine.projection, batch, loss_alone)
    assert relative_error(vectors, expected.vectors) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layer", "call"),
    [(lambda: Shrunk(D, D), None), (lambda: PaddedTable(2, D, 1), call_table)],
    ids=["detached", "padding"],
)
def test_a_class_with_the_outputs_of_a_formula_but_not_its_gradients_runs_again(
    layer: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor] | None
) -> None:
    model = Around(layer(), call).eval()
    layer_type_of(PaddedTable(2, D))  # without padding it is an embedding
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total="full")) as engine:
        engine.prepare(len(X))
        vectors = engine.collect(sum_of_squares(model, X))
    assert relative_error(vectors, naive(model, engine.projection, len(X), loss_alone).vectors) < 1e-5
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as scores:
        check(plain_step(scores, model, X), exact_plain(model, X, VAL))


class Gated(nn.Module):
    """A table of positions whose share of the output is hard to see."""

    def __init__(self, gate: float, mask: float | None = None) -> None:
        super().__init__()
        self.g, self.mask = nn.Parameter(torch.full((D,), gate)), mask

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.zeros(len(x), x.shape[1], x.shape[1])
        if self.mask is not None:
            mask = mask.masked_fill(torch.ones_like(mask).triu(1).bool(), self.mask)
        return x + self.g * table, mask


def call_gated(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x, TABLE[: x.shape[1]])[0]
    return y


GATES = [(0.0, None), (1e-4, None), (0.5, float("-inf")), (0.5, torch.finfo(torch.float32).min)]


@pytest.mark.parametrize(("gate", "mask"), GATES)
@pytest.mark.parametrize("scored", [False, True], ids=["vectors", "scores"])
def test_a_table_of_positions_in_a_batch_of_as_many_samples(gate: float, mask: float | None, *, scored: bool) -> None:
    """It was cut as if it were of the samples: the output was still near enough, or drowned in that of a mask. Where
    the output tells, it is taken whole.
    """
    model = Around(Gated(gate, mask), call_gated).eval()
    batch = drawn(4, 4, 3)
    if scored:
        with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
            plain_step(engine, model, X)
            if gate == 0.5:
                check(plain_step(engine, model, batch), exact_plain(model, batch, VAL))
                return
            with pytest.raises(CaptureError, match="a Gated, which no formula knows"):
                plain_step(engine, model, drawn(4, 4, 3))
        return
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total="full")) as vectors:
        for earlier in (X, drawn(2, 4, 5)):
            vectors.prepare(len(earlier))
            vectors.collect(sum_of_squares(model, earlier))
        vectors.prepare(4)
        if gate == 0.5:
            found = vectors.collect(sum_of_squares(model, batch))
            vectors.detach()
            exact = naive(model, vectors.projection, 4, lambda m, i: sum_of_squares(m, batch[i : i + 1]).sum())
            assert relative_error(found, exact.vectors) < 1e-5
            return
        with pytest.raises(CaptureError, match="a Gated, which no formula knows"):
            vectors.collect(sum_of_squares(model, drawn(4, 4, 3)))


class TableFirst(Gated):
    def forward(self, table: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x, table)


def test_a_table_of_positions_as_first_argument() -> None:
    model = Around(TableFirst(0.0), lambda layer, x: layer(TABLE[: x.shape[1]], x)[0]).eval()
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",)), check=False) as engine:
        engine.prepare(4)
        with pytest.raises(CaptureError, match="whose axis is the first, its output does not tell"):
            engine.collect(sum_of_squares(model, drawn(4, 4, 3)))


@pytest.mark.parametrize("layer", [Scale, lambda: nn.Linear(D, D)], ids=["runs again", "formula"])
def test_gradient_checkpointing_that_a_model_has_in_eval_mode_too(layer: Callable[[], nn.Module]) -> None:
    """The check of the axes took its taps away before the backward pass, in which the layer runs again."""
    model = Around(layer(), lambda layer, x: checkpoint(layer, x, use_reentrant=False)).eval()  # type: ignore[arg-type]
    with GradDotProdEngine(model, VAL, val_losses=sum_of_squares) as engine:
        check(plain_step(engine, model, X), exact_plain(model, X, VAL))


class Unpadded(nn.Module):
    """Takes the padding out: rows that are all 0."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        kept = (x != 0).any(-1)
        out = torch.zeros_like(x)
        out[kept] = torch.tanh(self.up(x[kept]))
        return x + out


@pytest.mark.parametrize("scored", [False, True], ids=["vectors", "scores"])
def test_padding_that_is_taken_out_only_later(*, scored: bool) -> None:
    """8 of 12 rows are a multiple of 4 samples by accident."""
    model = Around(Unpadded()).eval()
    model.first.bias.data.zero_()  # type: ignore[union-attr, operator]
    first, later = drawn(4, 3, 0), drawn(4, 3, 1)
    later[0, 1:] = later[2, 2:] = later[3, 2:] = 0.0
    if scored:
        with GradDotProdEngine(model, VAL, val_losses=sum_of_squares, val_refresh_interval=100) as engine:
            plain_step(engine, model, first)
            with pytest.raises(CaptureError, match="rows of 2 positions of each sample where other layers have 3"):
                plain_step(engine, model, later)
        return
    with GradProjLoraEngine(model, ProjectionConfig(layers=("all",), rank_total="full")) as vectors:
        for batch in (first, drawn(4, 3, 2)):
            vectors.prepare(len(batch))
            vectors.collect(sum_of_squares(model, batch))
        vectors.prepare(len(later))
        with pytest.raises(CaptureError, match="rows of 2 positions of each sample where other layers have 3"):
            vectors.collect(sum_of_squares(model, later))
