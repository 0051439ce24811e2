"""Which device searches: where nothing is said the CPU, also beside a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghoststore.progress import Silent
from query.ask.question import Question
from query.ask.scorer import Scorer
from tests.support.parts import opened_scorer

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_auto_searches_on_the_cpu(built: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("query.ask.scorer.resolve_device", lambda device: "cuda" if device == "auto" else device)
    with opened_scorer(Question(store=built, val_set=lab.corpus, max_samples=2)) as scorer:
        assert (scorer.question.device, scorer.device) == ("auto", "cpu")
        for device in ("cpu", "cuda"):
            asked = replace(scorer.question, device=device)
            assert Scorer.of(asked, scorer.parts, scorer.weights, [scorer.val], Silent()).device == device
