"""A val pass that takes long is shown while it is at work; later ones only if they take longer still."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import indexer.training.scoring
import indexer.training.validation
from ghoststore.cli.terminal import Bars
from ghoststore.progress import Late, Silent

if TYPE_CHECKING:
    from ghoststore.progress import Task
    from tests.support.trainings import Gym

ROWS = 300
"""Of at most 32 tokens: several batches of 4,096."""


class Listener(Silent):
    """The tasks that it is told of: description, total, and rows done."""

    def __init__(self) -> None:
        self.tasks: list[list[object]] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        told: list[object] = [description, total, done]
        self.tasks.append(told)
        task = super().task(description, total, done, unit)

        def advance(rows: int, tokens: int = 0) -> None:
            told[2] = int(str(told[2])) + rows

        task.advance = advance  # type: ignore[method-assign]
        return task

    def of(self, description: str) -> list[list[object]]:
        return [told[1:] for told in self.tasks if told[0] == description]


@pytest.mark.thin(1)
@pytest.mark.parametrize("options", [{}, {"candidates": 6, "keep": 3}], ids=["all", "chosen"])
def test_the_first_val_gradient_has_a_bar(
    gym: Gym, options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step has a val gradient here."""
    val = gym.lab.write(tmp_path / "val.jsonl", gym.lab.sample_rows(ROWS, seed=4))
    shared = {"max_steps": 2, "val_set": val, "val_batch_size": ROWS, "eval_interval": 1, **options}
    for module in (indexer.training.scoring, indexer.training.validation):
        monkeypatch.setattr(module, "SHOWN_AFTER", 0.0)
    monkeypatch.setattr(indexer.training.scoring, "SHOWN_LATER_AFTER", float("inf"))
    listener = Listener()
    gym.fresh(tmp_path, progress=listener, **shared)
    assert listener.of("val gradient") == [[ROWS, ROWS]]
    assert listener.of("val loss") == [[ROWS, ROWS]] * 2


def test_what_is_done_soon_is_not_shown() -> None:
    listener = Listener()
    for after, total in ((float("inf"), 10), (0.0, 3)):
        task = Late(listener, "val loss", total, after)
        task.advance(3)
        task.close()
    assert listener.tasks == []


def test_a_bar_within_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """A val gradient is computed while the bar of the steps is shown."""
    bars = Bars()
    outer = bars.task("training", 2, unit="steps")
    inner = bars.task("val gradient", 3)
    for task, rows in ((inner, 3), (outer, 2)):
        task.advance(rows)
        task.close()
    said = capsys.readouterr().err
    assert "val gradient" in said
    assert "training" in said
