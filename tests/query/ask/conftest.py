"""What several files ask: runs that keep their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.kept_runs import kept_runs

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With :func:`kept_runs`."""
    folder = tmp_path_factory.mktemp("asked")
    kept_runs(lab, folder)
    return folder
