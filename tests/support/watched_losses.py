"""A training step whose loss is watched, and its refusal: shared by the tests of the loss check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from ghoststore.errors import UsageError
from indexer.dotprod import GradDotProdEngine, Scores
from tests.support.models import pad
from tests.support.scoring import BATCH

IDS, LABELS, MASK = pad(BATCH)


def scored(engine: GradDotProdEngine, loss_of: Callable[[], Tensor], **said: Any) -> Scores:
    """A whole step with the loss that ``loss_of()`` gives."""
    engine.prepare(len(IDS))
    loss = loss_of()
    engine.watch(loss, **said)
    loss.backward()
    return engine.collect()


def refused(engine: GradDotProdEngine, loss_of: Callable[[], Tensor], message: str, **said: Any) -> str:
    """The whole message of the refusal; the batch is forgotten."""
    engine.prepare(len(IDS))
    with pytest.raises(UsageError, match=message) as error:
        engine.watch(loss_of(), **said)
    engine.discard()
    return str(error.value)
