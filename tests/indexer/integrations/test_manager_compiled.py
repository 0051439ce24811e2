"""The manager with a model that torch.compile compiled: the scores and the weights of the model as it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ghoststore import Choosing, GhostEngineManager
from tests.support.loops import VAL_BATCH, plan, weights_of
from tests.support.managed_loops import Loop, config_of, sgd
from tests.support.models import gpt2
from tests.support.scoring import agree


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"choosing": Choosing(keep=2)}], ids=["all", "chosen"])
def test_a_compiled_model(settings: dict[str, Any]) -> None:
    steps = plan(3)

    def trained(compiled: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        model = gpt2(layers=1)
        given = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer, scores = sgd(model), []
        with GhostEngineManager(config_of(None, 3, **settings), given, optimizer, val_data=VAL_BATCH) as manager:
            for step in range(3):
                Loop(steps, manager).run(given, optimizer, step, step + 1)
                scores += [of.total for of in manager.last_scores]
        return scores, weights_of(model)

    scores, weights = trained(True)
    expected, plain = trained(False)
    torch._dynamo.reset()
    for mine, theirs in zip(scores, expected, strict=True):
        agree(mine, theirs)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-4, atol=1e-5)
