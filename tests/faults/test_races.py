"""Two writers of one thing with flock disabled in both: one truth, nothing that a record names is ever overwritten."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.support.fault_commands import WRITING
from tests.support.faulting import spread
from tests.support.racing import RACES, overtaken, together

if TYPE_CHECKING:
    from tests.support.faulting import Faults

pytestmark = [pytest.mark.slow, pytest.mark.kill]
CASES = [case for case in RACES if case in WRITING]
OVERTAKEN = 2
"""Places where the first of a pair stands still, each."""


@pytest.mark.parametrize("case", CASES)
def test_at_once(faults: Faults, case: str) -> None:
    together(faults, case)


@pytest.mark.parametrize("case", CASES)
def test_overtaken(faults: Faults, case: str) -> None:
    for call in spread(faults.reference(case).calls, OVERTAKEN, random.Random(case)):
        overtaken(faults, case, call.number)


def test_overtaken_by_other_arithmetic(faults: Faults) -> None:
    """The slow writer wakes up with other bits than those that are committed by then: they stay."""
    for call in spread(faults.reference("build-on").calls, OVERTAKEN, random.Random(1)):
        overtaken(faults, "build-on", call.number, other_bits=True)
