"""Any history of a store, against a model of it; ``make soak`` runs longer ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.store_machine import StoreMachine

if TYPE_CHECKING:
    from tests.support.faulting import Faults


@pytest.mark.slow
@pytest.mark.kill
def test_any_history(faults: Faults) -> None:
    StoreMachine.faults = faults
    quick = settings(
        max_examples=3,
        stateful_step_count=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(StoreMachine, settings=quick)
