"""Token shards of the lab's corpus, and corpora in every form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ghoststore
from tests.support.corpora import write as write

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="session")
def whole(lab: Lab) -> Path:
    """Shards of the corpus of the lab, six: copy them before changing them."""
    out = lab.folder / "shards"
    ghoststore.tokenize(data=lab.corpus, tokenizer=lab.checkpoint, out=out, shard_samples=5, workers=1)
    return out


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "shards"))
