"""The manager's configuration: its forms, what cannot be, and the method that does nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghoststore import GhostConfig, GhostEngineManager
from ghoststore.errors import UsageError
from tests.support.loops import (
    ROWS,
    plan,
)
from tests.support.managed_loops import (
    check_scores,
    sgd,
    train,
)
from tests.support.models import gpt2


class PlainConfig:
    """As scripts write them: attributes of the class, and things that are not ours."""

    method = "GradDotProd"
    dot_prod_save_interval = 3
    batch_size = 4
    max_steps = 3
    samples = len(ROWS)
    learning_rate = 0.1

    def __init__(self, store: Path) -> None:
        self.store = store


def forms(store: Path) -> dict[str, Any]:
    given = {"method": "GradDotProd", "store": store, "max_steps": 3, "batch_size": 4, "samples": len(ROWS)}
    given |= {"dot_prod_save_interval": 3}
    return {
        "config": GhostConfig(**given),
        "dict": {**given, "learning_rate": 0.1},
        "namespace": argparse.Namespace(**given, learning_rate=0.1),
        "object": PlainConfig(store),
        "simple": SimpleNamespace(**given),
    }


@pytest.mark.thin(3)
@pytest.mark.parametrize("form", ["config", "dict", "namespace", "object", "simple"])
def test_forms_of_the_configuration(form: str, tmp_path: Path) -> None:
    steps = plan(3)
    config = forms(tmp_path / "store")[form]
    assert GhostConfig.of(config) == forms(tmp_path / "store")["config"]
    _, expected = train(steps, config)
    check_scores(tmp_path / "store", steps, expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "GradDot"}, "GradDot.*known"),
    "no steps": ({"store": "s", "batch_size": 4, "samples": 3}, "needs max_steps"),
    "nothing": ({"store": "s"}, "needs max_steps, batch_size, samples"),
    "interval": ({"dot_prod_save_interval": 0}, "dot_prod_save_interval.*at least 1"),
    "float": ({"dot_prod_save_interval": 2.5}, "whole number"),
    "none": ({"val_refresh_interval": None}, "val_refresh_interval.*None"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    "batch": ({"batch_size": 0}, "batch_size"),
    "store error": ({"on_store_error": "ignore"}, "on_store_error 'ignore'"),
    "domains": ({"domains": ["a"]}, "give samples"),
    "projection unused": ({"proj_rank_total": 16}, "proj_rank_total=16 belongs to method GradProjLora"),
    "embeddings unused": ({"include_embeddings": True}, "include_embeddings"),
    "kind": ({"method": "GradProjLora", "proj_kind": "uniform"}, "'uniform' is unknown"),
    "two kinds": ({"method": "GradProjLora", "proj_kind": "rademacher", "proj_row_orthonormal": True}, "contradicts"),
    "a rank": ({"method": "GradProjLora", "proj_rank_total": -1}, "at least 1"),
    "misspelt": ({"dot_prod_interval": 3, "method": "GradDotProd"}, "'dot_prod_interval'.*not known"),
    "of nothing": ({"learning_rate": 0.1}, "none of the fields"),
}


@pytest.mark.parametrize("case", WRONG)
def test_configurations_that_cannot_be(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        GhostConfig.of(given)
    with pytest.raises(UsageError, match=message):
        GhostConfig.of(SimpleNamespace(**given))


def test_regular_does_nothing_at_all(tmp_path: Path) -> None:
    model = gpt2()
    manager = GhostEngineManager({"method": "Regular", "store": tmp_path / "store"}, model, sgd(model))
    assert manager.state_dict() == {}
    manager.load_state_dict({"step": 3, "pending": {}})
    assert manager.prepare_forward_input("x", "y") == ("x", "y")
    manager.detach_for_evaluation()
    manager.reattach_after_evaluation()
    assert not manager.should_save_metrics(9)
    manager.cleanup()
    assert not (tmp_path / "store").exists()
    assert not any(module._forward_hooks for module in model.modules())
