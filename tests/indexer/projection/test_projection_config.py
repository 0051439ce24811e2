"""What the user asks for, what it resolves to, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from torch import nn

from ghoststore.errors import LayerError, UsageError
from ghoststore.settings.projection import ProjectionConfig
from indexer.projection.matrices import Projection
from indexer.projection.plan import ProjectionPlan
from tests.support.models import gpt2, perceptron


def wide() -> nn.Module:
    """Three layers, each larger than 64 × 64, a norm, and a layer that is smaller."""
    return nn.Sequential(
        nn.Linear(80, 90), nn.LayerNorm(90), nn.Linear(90, 70), nn.Linear(70, 100), nn.Linear(100, 3, bias=False)
    )


def plan_of(model: nn.Module, **settings: Any) -> ProjectionPlan:
    config = ProjectionConfig(layers=settings.pop("layers", ("all",)), **settings)
    return ProjectionPlan.for_model(model, config)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kind": "cauchy"}, "'cauchy'.*gaussian, rademacher, orthonormal"),
        ({"rank_total": 0}, "`rank_total` must be at least 1, not 0"),
        ({"rank_total": "half"}, "`rank_total` takes a number or full, not 'half'"),
        ({"rank_min": 0}, "`rank_min` must be at least 1, not 0"),
        ({"compress": 0}, "`compress` must be at least 1 or none, not 0"),
        ({"compress": "most"}, "`compress` takes a number, none or auto, not 'most'"),
    ],
)
def test_nonsense_is_refused_where_it_is_made(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ProjectionConfig(**settings)


def test_the_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        ProjectionConfig().seed = 3  # type: ignore[misc]


def test_by_default_blocks_of_64_by_64_are_sketched_to_64_numbers_a_layer() -> None:
    plan = plan_of(wide())
    assert [(layer.k_out, layer.k_in) for layer in plan.layers] == [(64, 64), (180, 1), (64, 64), (64, 64), (3, 100)]
    assert plan.compress == plan.dimension == 64 * 5
    assert plan.kronecker_dimension == 3 * 64 * 64 + 180 + 300
    assert plan.groups == [("all", 0, 320)]


def test_a_rank_alone_means_plain_blocks() -> None:
    plan = plan_of(wide(), rank_total=100)
    assert plan.compress is None
    assert [(layer.k_out, layer.k_in) for layer in plan.layers] == [(10, 10), (100, 1), (10, 10), (10, 10), (3, 33)]
    assert plan.groups == [("0", 0, 100), ("1", 100, 200), ("2", 200, 300), ("3", 300, 400), ("4", 400, 499)]
    assert plan.dimension == plan.kronecker_dimension == 499


def test_no_compression_alone_means_plain_blocks_of_256() -> None:
    plan = plan_of(wide(), compress="none")
    assert plan.compress is None
    assert [layer.k_out * layer.k_in for layer in plan.layers] == [256, 180, 256, 256, 3 * 85]


def test_both_given_both_done() -> None:
    plan = plan_of(wide(), rank_total=100, compress=50)
    assert (plan.kronecker_dimension, plan.dimension) == (499, 50)


def test_a_sketch_alone_keeps_the_large_blocks() -> None:
    plan = plan_of(wide(), compress=50)
    assert (plan.kronecker_dimension, plan.dimension) == (3 * 64 * 64 + 480, 50)


def test_full_keeps_every_axis() -> None:
    model = wide()
    plan = plan_of(model, rank_total="full")
    assert plan.compress is None
    assert plan.dimension == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_too_small_to_be_sketched_stay_plain() -> None:
    plan = plan_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert plan.compress is None
    assert plan.dimension == 4 * 4 + 2 * 5


@pytest.mark.parametrize("compress", [499, 500, 10_000])
def test_a_sketch_that_does_not_shrink_is_refused(compress: int) -> None:
    with pytest.raises(UsageError, match=f"`compress={compress}` is not smaller than the 499 numbers"):
        plan_of(wide(), rank_total=100, compress=compress)


def test_a_rank_larger_than_a_layer_names_the_layer() -> None:
    with pytest.raises(LayerError, match=r"`rank_total=301` is larger than layer '4'.*3 × 100 = 300"):
        plan_of(wide(), rank_total=301)
    plan_of(wide(), rank_total=300)
    plan_of(wide(), rank_total=301, exclude_layers=("4",))


def test_a_least_rank_that_the_total_cannot_give_is_refused() -> None:
    with pytest.raises(UsageError, match=r"`rank_min=11` needs blocks of 121 numbers.*`rank_total` is 100"):
        plan_of(wide(), rank_total=100, rank_min=11)


def test_a_least_rank_that_a_layer_cannot_give_names_the_layer() -> None:
    with pytest.raises(LayerError, match=r"`rank_min=4` cannot be met by layer '4' \(3 × 100\)"):
        plan_of(wide(), rank_total=100, rank_min=4)
    plan = plan_of(wide(), rank_total=100, rank_min=4, exclude_layers=("4",))
    assert all(min(layer.k_out, layer.k_in) >= 4 for layer in plan.layers if layer.block.is_matrix)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthonormal"])
@pytest.mark.parametrize("compress", ["none", 20])
def test_the_hash_follows_the_matrices_and_nothing_else(kind: str, compress: Any) -> None:
    def hash_of(model: nn.Module, **settings: Any) -> str:
        chosen = {"layers": ("all",), "rank_total": 9, "kind": kind, "compress": compress, **settings}
        return Projection.for_model(model, ProjectionConfig(**chosen)).hash

    model = perceptron()
    base = hash_of(model)
    assert base.startswith("sha256:")
    assert len(base) == len("sha256:") + 64
    # The same matrices, though the weights, or the words they were asked for with, are others.
    assert hash_of(perceptron().double()) == base
    assert hash_of(model, layers=("0", "2", "4")) == base
    assert hash_of(model, rank_min=2) == base
    other_kind = "gaussian" if kind == "rademacher" else "rademacher"
    others = [
        hash_of(model, seed=1),
        hash_of(model, kind=other_kind),
        hash_of(model, rank_total=4, compress="none"),
        hash_of(model, exclude_layers=("2",), compress="none"),
        hash_of(model, compress=19),
    ]
    assert len({base, *others}) == 6


def test_the_manifest_holds_everything_that_was_resolved() -> None:
    plan = plan_of(gpt2(), rank_total=16, compress=40, seed=3, exclude_layers=("h.1",))
    assert plan.to_json() == {
        "layers": ["all"],
        "exclude_layers": ["h.1"],
        "include_embeddings": False,
        "rank_total": 16,
        "rank_min": 1,
        "seed": 3,
        "kind": "gaussian",
        "compress": 40,
        "compress_by": "all",
        "precondition": "none",
        "damping": None,
        "calibration_samples": None,
        "calibration": None,
        "kronecker_dimension": plan.kronecker_dimension,
        "dimension": 40,
    }
    layers = plan.layers_json()
    assert layers[0] == {
        "name": "transformer.wte",
        "type": "embedding",
        "parameters": ["transformer.wte.weight"],
        "modules": ["transformer.wte", "lm_head"],
        "shape": [24, 101],
        "ranks": [4, 4],
        "columns": [0, 16],
    }
    stops = [layer["columns"][1] for layer in layers]
    assert [layer["columns"][0] for layer in layers] == [0, *stops[:-1]]
    assert stops[-1] == plan.kronecker_dimension
