"""A session by itself, without an engine: what it commits, gives out, goes on from and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststore.errors import MismatchError, UsageError
from ghoststore.store import RowTable, RunLayout
from indexer.session.run_plan import RunPlan
from indexer.session.session import ScoringSession
from tests.support.loops import run_of, same_arrays
from tests.support.runs import LAYOUT, manifest, row_table

SHAPE = RunLayout(steps=8, ranks=1, batch=3, span_steps=3, rows=LAYOUT.rows)
SHARED = {"learning_rate": 0.5, "train_loss": 2.0, "seconds": 1.0}


class Rows:
    def table(self) -> RowTable:
        return row_table(SHAPE.rows)


def session_of(store: Path, notes: list[str] | None = None, layout: RunLayout = SHAPE) -> ScoringSession:
    plan = RunPlan(
        store=store, name="run", layout=layout, manifest=manifest(layout), rows=Rows(), on_store_error="stop"
    )
    return ScoringSession(None, plan, note=(notes if notes is not None else []).append)


def rows_of(step: int) -> np.ndarray:
    """The last step of an epoch is smaller."""
    return np.arange(3 * step, 3 * step + (2 if step % 4 == 3 else 3))


def steps(session: ScoringSession, first: int, end: int, shift: int = 0) -> None:
    for step in range(first, end):
        for rows in (rows_of(step)[:1] + shift, rows_of(step)[1:] + shift):
            session.prepare(len(rows), rows=rows)
            session.collect(rows.astype(np.float32) / 7)
        session.record(session.complete_step(), SHARED)


def test_steps_without_an_engine(tmp_path: Path) -> None:
    with session_of(tmp_path) as session:
        steps(session, 0, 8)
    run = run_of(tmp_path)
    assert run.complete
    for step in range(8):
        rows = rows_of(step)
        assert run.read_committed("sample")[step, 0].tolist() == [*rows, *[-1] * (3 - len(rows))]
        np.testing.assert_array_equal(run.read_committed("loss")[step, 0, : len(rows)], rows.astype(np.float32) / 7)
        assert np.isnan(run.read_committed("loss")[step, 0, len(rows) :]).all()
    assert np.isnan(run.read_committed("score")).all()
    assert (run.read_committed("score_seconds") == 0).all()


def test_the_end_of_an_interval_that_is_not_full(tmp_path: Path) -> None:
    for name in ("ended", "kept open", "given out"):
        with session_of(tmp_path / name) as session:
            steps(session, 0, 4)
            if name == "kept open":
                session.keep_open()
            if name == "given out":
                assert session.pending()["step"].tolist() == [3]
    assert run_of(tmp_path / "ended").steps == 6
    assert (run_of(tmp_path / "ended").read_committed("sample")[4:] == -1).all()
    assert run_of(tmp_path / "kept open").steps == run_of(tmp_path / "given out").steps == 3


def test_pending_steps_and_going_on(tmp_path: Path) -> None:
    with session_of(tmp_path / "whole") as session:
        steps(session, 0, 8)
    with session_of(tmp_path / "store") as session:
        steps(session, 0, 5)
        pending = session.pending()
    with session_of(tmp_path / "store") as session:
        session.restore(5, pending, "the state")
        assert session.next_step == 5
        steps(session, 5, 8)
    same_arrays(run_of(tmp_path / "store"), run_of(tmp_path / "whole"))


def test_a_gap_is_an_error_unless_it_is_known(tmp_path: Path) -> None:
    with session_of(tmp_path) as session:
        steps(session, 0, 5)
        session.keep_open()
    notes: list[str] = []
    with session_of(tmp_path, notes) as session:
        with pytest.raises(UsageError, match="lacks steps 3 to 4, and they are not in the state"):
            session.restore(5, {}, "the state")
        assert not notes
        session.restore(5, {}, "the state", gaps_are_known=True)
        assert "lacks steps 4 to 5" in notes[0]
        steps(session, 5, 8)
    assert run_of(tmp_path).complete


def test_a_step_that_is_repeated_is_of_the_same_samples(tmp_path: Path) -> None:
    with session_of(tmp_path) as session:
        steps(session, 0, 8)
    with session_of(tmp_path) as session:
        steps(session, 0, 8)
    with session_of(tmp_path) as session, pytest.raises(MismatchError, match="has step 0 already, with other samples"):
        steps(session, 0, 1, shift=1)


def test_a_step_of_too_many_samples(tmp_path: Path) -> None:
    with session_of(tmp_path) as session:
        session.prepare(4, rows=np.arange(4))
        session.collect()
        with pytest.raises(UsageError, match="step 0 has 4 samples; the run was made for 3"):
            session.record(session.complete_step(), SHARED)
        session.skip()
    assert (run_of(tmp_path).read_committed("sample") == -1).all()


def test_a_run_of_before_goes_on(tmp_path: Path) -> None:
    """Its spans are its save intervals, as they were; a run that is new has a journal. Both read alike."""
    shape: dict[str, Any] = {"steps": 8, "ranks": 1, "batch": 3, "rows": LAYOUT.rows}
    before, now = RunLayout(span_steps=3, **shape), RunLayout.saving(3, **shape)
    assert (before.interval, now.interval, now.span_steps) == (3, 3, 9)
    with session_of(tmp_path / "store", layout=before) as session:
        steps(session, 0, 4)
        session.keep_open()
    with session_of(tmp_path / "store", layout=now) as session:
        steps(session, 0, 8)
    with session_of(tmp_path / "new", layout=now) as session:
        steps(session, 0, 8)
    old, new = run_of(tmp_path / "store"), run_of(tmp_path / "new")
    assert (old.layout, old.spans) == (before, [0, 1, 2])
    assert (new.layout, new.spans) == (now, [0])
    assert old.ranges == new.ranges == [(0, 8)]
    same_arrays(old, new)
