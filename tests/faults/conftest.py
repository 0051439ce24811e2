"""Faults of the disk, for every command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.faulting import Faults, open_faults

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """Processes with the shim in them. What is made in its folder is shared."""
    folder: Path = tmp_path_factory.mktemp("faults")
    made = open_faults(folder)
    if made is None:
        pytest.skip("the shim needs a C compiler (gcc or cc)")
    yield made
    made.lab.close()
