"""A random search over small modules whose axes are turned, flattened, broadcast and routed: exact or refused."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ghoststore.errors import CaptureError
from ghoststore.settings.projection import ProjectionConfig
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from tests.support import axis_modules
from tests.support.axis_modules import SOUND, UNSOUND, module, plain
from tests.support.models import settle
from tests.support.oracle import naive, relative_error
from tests.support.scoring import exact_plain, plain_step, sum_of_squares

ALL = ProjectionConfig(layers=("all",), rank_total="full")
Run = Callable[[nn.Module, Tensor], Tensor]


@st.composite
def cases(draw: st.DrawFn, runs: tuple[Run, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, train batch, val batch): lengths that coincide, more often than not."""
    samples = draw(st.integers(2, 5))
    length = draw(st.one_of(st.just(samples), st.integers(1, 5)))
    width = draw(st.one_of(st.just(samples), st.sampled_from([3, 6])))
    vals = draw(st.one_of(st.just(samples), st.just(length), st.integers(1, 4)))
    chosen = draw(st.lists(st.sampled_from(runs), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    model = settle(module(chosen, length, width, norm=draw(st.booleans())))
    x, val = (torch.randn(count, length, width, generator=generator) for count in (samples, vals))
    return model, x, val


def scores_are_exact(model: nn.Module, x: Tensor, val: Tensor) -> None:
    with GradDotProdEngine(model, val, val_losses=sum_of_squares) as engine:
        scores = plain_step(engine, model, x)
    exact = exact_plain(model, x, val)
    for name, products in exact.products.items():  # relative to the norms: what cancels leaves rounding
        error = float((scores.parameters[name] - products.mean(1)).norm())
        assert error <= 1e-4 * float(exact.sizes[name].norm()) + 1e-12, f"{name}: {error}"
    torch.testing.assert_close(
        torch.stack(list(scores.parameters.values())).sum(0), scores.total, rtol=1e-9, atol=1e-12
    )


def vectors_are_exact(model: nn.Module, x: Tensor, val: Tensor) -> None:
    with GradProjLoraEngine(model, ALL) as engine:
        engine.prepare(len(x))
        vectors = engine.collect(sum_of_squares(model, x))
    oracle = naive(model, engine.projection, len(x), lambda model, i: sum_of_squares(model, x[i : i + 1]).sum())
    assert relative_error(vectors, oracle.vectors) <= 1e-4


def vectors_without_a_val_set_are_exact(model: nn.Module, x: Tensor, val: Tensor) -> None:
    with GradDotProdEngine(model, None, projection=ALL) as engine:
        vectors = plain_step(engine, model, x).vectors
        projection = engine.method.projection  # type: ignore[union-attr]
    assert vectors is not None
    oracle = naive(model, projection, len(x), lambda model, i: sum_of_squares(model, x[i : i + 1]).sum())
    assert relative_error(vectors, oracle.vectors) <= 1e-4


WAYS = (scores_are_exact, vectors_are_exact, vectors_without_a_val_set_are_exact)


@pytest.mark.thin(1)
@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(case=cases((plain, *SOUND, *UNSOUND)))
def test_exact_or_refused(way: Callable[..., None], case: tuple[nn.Module, Tensor, Tensor]) -> None:
    try:
        way(*case)
    except CaptureError:
        pass  # said, not wrong
    except (IndexError, RuntimeError) as error:  # a table of one position is taken for positions
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if [file for file in files if "site-packages" not in file][-1] != axis_modules.__file__:
            raise


@pytest.mark.thin(1)
@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None)
@given(case=cases((plain, *SOUND)))
def test_sound_layouts_are_not_refused(way: Callable[..., None], case: tuple[nn.Module, Tensor, Tensor]) -> None:
    way(*case)
