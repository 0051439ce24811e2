"""The gym: trainings that the tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.trainings import Gym, open_gym

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="session")
def gym(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Gym:
    return open_gym(lab, tmp_path_factory.mktemp("gym"))
