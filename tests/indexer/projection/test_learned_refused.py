"""What must be learned from a corpus is refused where there is none, and so are settings that mean nothing."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import ghoststore
from ghoststore import ProjectionConfig
from ghoststore.errors import UsageError
from ghoststore.settings.projection import config_of
from indexer.dotprod import GradDotProdEngine
from indexer.encode.engine import GradProjLoraEngine
from indexer.projection.plan import ProjectionPlan, ranks
from tests.support.models import examples, gpt2
from tests.support.scoring import val_batch

if TYPE_CHECKING:
    from tests.conftest import Lab

LEARNED: dict[str, dict[str, Any]] = {
    "pca": {"kind": "pca"},
    "kronecker": {"precondition": "kronecker"},
    "sizes": {"compress_by": "layer"},
    "whole": {"precondition": "kronecker", "rank_total": "full"},
}
REASON = "are learned from a sample of a corpus: only a build has them"
EACH = pytest.mark.parametrize("settings", LEARNED.values(), ids=LEARNED)


@EACH
def test_engines(settings: dict[str, Any]) -> None:
    model, config = gpt2(), ProjectionConfig(**settings)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UsageError, match=REASON):
        GradProjLoraEngine(model, config)
    plan = ProjectionPlan.for_model(model, config)
    assert plan.calibration is None
    with pytest.raises(UsageError, match=REASON):
        GradDotProdEngine(model, [val_batch(examples())], projection=config)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


@EACH
def test_training_and_doctor(lab: Lab, settings: dict[str, Any], tmp_path: Path) -> None:
    projection = ProjectionConfig(**settings)
    with pytest.raises(UsageError, match=REASON):
        ghoststore.train(
            data=lab.corpus,
            val_set=lab.corpus,
            output_dir=tmp_path / "out",
            store=tmp_path / "store",
            architecture="GPT2-Tiny",
            tokenizer=lab.checkpoint,
            max_length=16,
            batch_size=4,
            max_steps=3,
            score="sketched",
            projection=projection,
            device="cpu",
        )
    with pytest.raises(UsageError, match=REASON):
        ghoststore.doctor(checkpoint=lab.checkpoint, projection=projection, store=tmp_path / "store", device="cpu")
    assert not (tmp_path / "store" / "runs").exists()


def test_the_command_line_says_so(lab: Lab) -> None:
    outcome = lab.run("doctor", "--checkpoint", lab.checkpoint, "--proj-kind", "pca", "--quiet")
    assert outcome.code == 2, outcome.err
    assert REASON in outcome.err
    for command in ("doctor", "train"):
        outcome = lab.run(command, "--proj-precondition", "kronecker")
        assert outcome.code == 2
        assert "--proj-precondition" in outcome.err


def test_by_default_an_engine_learns_nothing() -> None:
    """``auto`` is a preconditioner in a build alone."""
    assert GradProjLoraEngine(gpt2()).projection.plan.config.precondition == "auto"
    config = ProjectionConfig()
    assert config.for_build(optimizer_state=False).precondition == "kronecker"
    assert config.for_build(optimizer_state=True).precondition == "none"
    assert ProjectionConfig(rank_total="full").for_build(optimizer_state=False).precondition == "none"
    assert ProjectionConfig(precondition="none").for_build(optimizer_state=False).precondition == "none"
    assert ProjectionConfig(precondition="kronecker").for_build(optimizer_state=True).precondition == "kronecker"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"compress_by": "rows"}, "`compress_by` 'rows' is unknown; known: auto, layer, all"),
        ({"precondition": "kfac"}, "`precondition` 'kfac' is unknown; known: auto, none, kronecker"),
        ({"damping": 0.0}, "`damping` must be above 0, not 0.0"),
        ({"damping": float("nan")}, "`damping` must be above 0, not nan"),
        ({"calibration_samples": 0}, "`calibration_samples` must be at least 1, not 0"),
    ],
)
def test_nonsense(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ProjectionConfig(**settings)


def test_fewer_numbers_than_layers() -> None:
    model = gpt2()
    with pytest.raises(UsageError, match="`compress=3` is less than a number for each of 4 layers"):
        ProjectionPlan.for_model(model, ProjectionConfig(layers=("mlp",), compress=3, compress_by="layer"))
    assert ProjectionPlan.for_model(model, ProjectionConfig(layers=("mlp",), compress=3)).compress == 3


@pytest.mark.parametrize("total", [1, 2, 12, 256, 4096])
@pytest.mark.parametrize(("n_out", "n_in"), [(1, 1), (3, 500), (500, 3), (90, 100), (4000, 768)])
def test_ranks_of_any_layer(n_out: int, n_in: int, total: int) -> None:
    k_out, k_in = ranks(n_out, n_in, total)
    assert 1 <= k_out <= n_out
    assert 1 <= k_in <= n_in
    assert k_out * k_in <= total


def test_a_manifest_holds_every_setting_and_null_for_what_is_not_used() -> None:
    model = gpt2()
    plain = ProjectionPlan.for_model(model, ProjectionConfig(layers=("mlp",), rank_total=16)).to_json()
    assert {field.name for field in fields(ProjectionConfig)} <= plain.keys()
    assert {name for name, value in plain.items() if value is None} == {
        "compress",
        "damping",
        "calibration_samples",
        "calibration",
    }
    other = ProjectionConfig(layers=("mlp",), rank_total=16, damping=0.7, calibration_samples=3)
    assert ProjectionPlan.for_model(model, other).to_json() == plain, "what is not used is not told of"


@pytest.mark.parametrize(
    "settings", [*LEARNED.values(), {}, {"rank_total": 16}, {"rank_total": "full", "seed": 3}], ids=str
)
def test_a_manifest_is_read_back_as_the_same_plan(settings: dict[str, Any]) -> None:
    model, config = gpt2(), ProjectionConfig(exclude_layers=("h.1",), rank_min=2, **settings)
    plan = ProjectionPlan.for_model(model, config)
    again = ProjectionPlan.for_model(model, config_of(*json.loads(json.dumps([plan.to_json(), plan.layers_json()]))))
    assert (again.layers, again.to_json()) == (plan.layers, plan.to_json())


def test_a_model_too_small_for_a_sketch_is_read_back() -> None:
    """Its blocks are those before a sketch, larger than plain ones."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_inner=80, n_layer=8, n_head=1))
    plan = ProjectionPlan.for_model(
        model, ProjectionConfig(layers=("transformer.h.*.attn.c_proj", "transformer.h.0.mlp.c_fc"))
    )
    assert plan.compress is None
    assert max(layer.k_out * layer.k_in for layer in plan.layers) > 256
    again = ProjectionPlan.for_model(model, config_of(plan.to_json(), plan.layers_json()))
    assert again.layers_json() == plan.layers_json()
