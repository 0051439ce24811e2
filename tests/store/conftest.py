"""Stores with one training run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.runs import JOURNALED, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One complete run: copy it before changing it."""
    store = tmp_path_factory.mktemp("trained") / "store"
    train(store)
    return store


@pytest.fixture
def run_store(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained``."""
    return Path(shutil.copytree(trained, tmp_path / "store"))


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A store whose run ends in its first span: two save intervals, and two steps that are lost."""
    train(tmp_path / "store", layout=JOURNALED, stop=12)
    return tmp_path / "store"
