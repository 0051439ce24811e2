"""What the explorer holds after many questions and many readers: no more than after a few."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import ghoststore

pytest.importorskip("starlette", reason="the explorer needs starlette")
pytest.importorskip("uvicorn", reason="the explorer needs uvicorn")

from query.answer.session import Session
from query.training_scores.watch import Watcher
from tests.support.explorers import answered, events, got
from tests.support.score_runs import append, make

if TYPE_CHECKING:
    from tests.conftest import Lab


def held() -> tuple[int, int, int]:
    """Tensors, sessions and watchers that are alive in this process."""
    gc.collect()
    objects = list(map(type, gc.get_objects()))
    tensors = sum(issubclass(kind, torch.Tensor) for kind in objects)
    return tensors, objects.count(Session), objects.count(Watcher)


@pytest.mark.slow
def test_many_questions_hold_no_more_than_a_few(built: Path) -> None:
    gc.unfreeze()  # what was there when the tests were collected is looked at, too
    with ghoststore.serve({"one": built, "two": built}) as explorer:

        def ask(count: int) -> None:
            for number in range(count):
                name = ("one", "two")[number // 5 % 2]
                got(explorer, f"/api/stores/{name}/query", {"val_set": [f"the old dog {number}"], "top_k": 2})

        ask(10)
        after_few = held()
        assert after_few[1] >= 1
        ask(20)
        after_many = held()
        assert after_many[1:] == after_few[1:]
        assert after_many[0] <= after_few[0]  # those of tests before this one may go meanwhile
    assert held()[1] < after_few[1]
    gc.freeze()


def test_readers_that_go_leave_nothing(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built, store)
    append(make(store), 0, 5)
    watchers = held()[2]
    with ghoststore.serve(store) as explorer:
        for _ in range(20):
            with answered(explorer, "/api/runs/run/events") as answer:
                assert next(events(answer))[0] == "frame"
        while held()[2] > watchers:  # until the server has seen that they went
            got(explorer, "/api/store")  # which lets it look
