"""Manifests, records, shards and sample files from a stranger: an error of ours or none, in bounded memory and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fuzzing import HOSTILE_FILES

if TYPE_CHECKING:
    from tests.support.faulting import Faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile(faults: Faults, kind: str) -> None:
    tried, wrong = HOSTILE_FILES[kind](faults, 1, 2)
    assert tried == 40
    assert wrong == [], "\n".join(wrong)
