"""`ghoststore watch`: frames of a run that grows, which read only what is new and hold what `scores` says."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

import ghoststore
import query.training_scores.watch
from ghoststore.cli.charts import histogram, line_chart, sparkline
from ghoststore.cli.terminal import duration
from ghoststore.cli.watch import render
from ghoststore.errors import UsageError
from ghoststore.store import RunWriter, Store
from ghoststore.store.base.writers import at_work
from query.training_scores.frame import Frame
from query.training_scores.watch import Watcher, newest_of, writer_fields
from tests.support.score_runs import (
    DOMAINS,
    GAP,
    LAYOUT,
    Reference,
    append,
    committed,
    make,
    opened_before_its_span,
    row_table,
    values,
    whole,
)

if TYPE_CHECKING:
    from tests.conftest import Lab


def test_the_last_commit_of_a_run_that_was_opened_before_it(tmp_path: Path) -> None:
    """Its journal is gone when it is looked at: the span that holds it now has an age."""
    opened = opened_before_its_span(tmp_path / "store")
    assert not any(journal.path.exists() for journal in opened.journals.values())
    age = writer_fields(opened, finished=False)["commit_age"]
    assert age is not None
    assert age >= 0


def test_the_newest_of_runs_one_of_which_is_at_work(tmp_path: Path) -> None:
    """Folders come and go while they are looked at."""
    store = tmp_path / "store"
    for name in ("first", "run"):
        make(store, name=name)
    began, ended = threading.Event(), threading.Event()

    def work() -> None:
        while not ended.is_set():
            with at_work(store / "runs" / "run", "written"):
                began.set()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            assert began.wait(60)
            names = {newest_of(["first", "run"], Store.open(store)) for _ in range(500)}
        finally:
            ended.set()
        working.result()
    assert names == {"run"}


def timeless(frame: Frame) -> Frame:
    return replace(frame, commit_age=None, silent=None)


def same(frame: Frame, other: Frame) -> bool:
    return timeless(frame) == timeless(other)


@pytest.mark.parametrize("span", [5, 10])
def test_a_growing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span: int) -> None:
    """Each frame equals that of a watcher that reads everything, and reads only the steps that are new: from spans, or
    a journal.
    """
    store = tmp_path / "store"
    layout = LAYOUT if span == 5 else replace(LAYOUT, span_steps=span, save_steps=5)
    run, watcher, read = make(store, layout=layout), Watcher(store), []
    real = query.training_scores.watch.stream_steps

    def counted(run: Any, column: Any, ranges: Any, **options: Any) -> Any:
        read.extend(ranges)
        return real(run, column, ranges, **options)

    first = watcher.look()
    assert first.waiting == "run 'run' has no committed steps yet"
    for start, stop, new in ((0, 5, [(0, 5)]), (5, 10, [(5, 10)]), (10, 15, []), (15, 23, [(15, 23)])):
        append(run, start, stop)
        monkeypatch.setattr(query.training_scores.watch, "stream_steps", counted)
        read.clear()
        frame = watcher.look()
        assert read == new
        monkeypatch.setattr(query.training_scores.watch, "stream_steps", real)
        assert same(frame, Watcher(store).look())
        steps = [step for step in committed() if step < stop]
        agree(frame, store, steps)
    assert frame.finished
    assert frame.gaps == [GAP]


def agree(frame: Frame, store: Path, steps: list[int]) -> None:
    """With `scores`, and with what was appended."""
    assert frame.weight == "unit"
    found = ghoststore.scores(store=store, top_k=20, bottom_k=20, text=False)
    assert [(one.id, one.value, one.times) for one in frame.best] == [(h.id, h.value, h.times) for h in found.hits]
    assert [(one.id, one.value, one.times) for one in frame.worst] == [(h.id, h.value, h.times) for h in found.bottom]
    summary = found.summary
    assert (frame.steps, frame.planned, frame.unread) == (len(steps), 23, 0)
    assert (frame.scored, frame.negative_share) == (summary.scored, summary.negative_share)
    assert frame.left_out == summary.unscored + summary.not_finite + summary.without_learning_rate
    domains = ghoststore.scores(store=store, by="domain").domains
    assert domains is not None
    assert [(one.domain, one.times) for one in frame.domains] == [(one.domain, one.times) for one in domains]
    assert (frame.candidates, frame.kept, frame.kept_share, frame.recent_kept_share) == (None,) * 4
    for mine, theirs in zip(frame.domains, domains, strict=True):
        assert mine.kept_share is None
        assert mine.value_per_time == pytest.approx(theirs.value_per_time)
        assert mine.negative_share == theirs.negative_share
        assert len(mine.trend) <= steps[-1] + 1
    last = values(steps[-1])
    assert frame.train_loss == np.float32(last["train_loss"])
    assert frame.val_loss == (np.float32(5.7) if len(steps) == 5 else pytest.approx(frame.val_loss))
    assert frame.learning_rate == last["learning_rate"]
    assert frame.tokens_per_second == pytest.approx(np.mean([100 + step for step in steps]) / 0.5)
    assert (frame.score_share, frame.seconds_per_step) == (0.25, 0.5)
    left = LAYOUT.steps - steps[-1] - 1
    assert (frame.state, frame.seconds_left) == ("stopped" if left else "finished", None)
    assert frame.commit_age is not None
    assert 0 <= frame.commit_age < 600
    assert frame.recent_scores == summary.scored == sum(frame.histogram)
    assert len(frame.histogram_edges) == len(frame.histogram) + 1
    assert frame.curve is not None
    stored = {step: float(np.float32(values(step)["train_loss"])) for step in steps}
    assert frame.curve.train_loss == [stored.get(step) for step in range(steps[-1] + 1)]
    assert frame.curve.steps == [step + 0.5 for step in range(steps[-1] + 1)]


def test_a_long_run_is_read_in_pieces(tmp_path: Path) -> None:
    """It appears at once; the frames say how much is still to be read, and the last one has it all."""
    whole(tmp_path / "store")
    watcher = Watcher(tmp_path / "store")
    frames = [watcher.look(most_steps=5) for _ in range(4)]
    assert [frame.unread for frame in frames] == [13, 8, 3, 0]
    assert [frame.steps for frame in frames] == [18] * 4
    assert same(frames[-1], Watcher(tmp_path / "store").look())


def test_bins_that_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bins for many steps: sums stay what they are."""
    monkeypatch.setattr(query.training_scores.watch, "BINS", 4)
    whole(tmp_path / "store")
    frame = Watcher(tmp_path / "store").look()
    assert frame.curve is not None
    assert frame.curve.steps == [4, 12, 20]
    losses = [[values(step)["train_loss"] for step in committed() if step // 8 == bin] for bin in range(3)]
    assert frame.curve.train_loss == pytest.approx([np.mean(some) for some in losses], rel=1e-6)
    scored = Reference(committed()).scores()
    for one in frame.domains:
        mine = [
            (step, score * factor)
            for key, seen in scored.items()
            for step, score, factor in seen
            if (DOMAINS[place] if (place := key % 3 - 1) >= 0 else None) == one.domain
        ]
        means = [[value for step, value in mine if step // 8 == bin] for bin in range(3)]
        assert one.trend == pytest.approx([np.mean(some) for some in means])


def test_waiting(lab: Lab, tmp_path: Path) -> None:
    """For a run, and for its first steps; a store that is none is an error."""
    store = tmp_path / "store"
    with pytest.raises(UsageError, match="there is no store"):
        Watcher(store)
    ghoststore.Store.create(store)
    any_run, named = Watcher(store), Watcher(store, "mine")
    assert "no training run in" in str(any_run.look().waiting)
    assert "no run 'mine' in" in str(named.look().waiting)
    once = lab.run("watch", "--store", store, "--once")
    assert (once.code, once.out, "Error: no training run in" in once.err) == (2, "", True)
    run = make(store, "mine")
    assert any_run.look().waiting == named.look().waiting == "run 'mine' has no committed steps yet"
    append(run, 0, 5)
    assert same(any_run.look(), named.look())
    assert named.look().waiting is None
    with pytest.raises(UsageError, match="cannot name a run"):
        Watcher(store, "../x").look()


def test_frames_come_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, slept = tmp_path / "store", []
    run = make(store)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        append(run, 5 * len(slept) - 5, min(5 * len(slept), 23))

    monkeypatch.setattr(query.training_scores.watch.time, "sleep", sleep)
    frames = list(ghoststore.watch(store=store, interval=0.25))
    assert [frame.steps for frame in frames] == [0, 5, 10, 10, 15, 18]
    assert slept == [0.25] * 5
    assert [frame.finished for frame in frames] == [False] * 5 + [True]
    assert len(list(ghoststore.watch(store=store, once=True))) == 1


@pytest.mark.parametrize("interval", [0.0, -1.0, float("nan"), float("inf")])
def test_intervals_that_are_none(tmp_path: Path, interval: float) -> None:
    with pytest.raises(UsageError, match="`interval` must be above 0"):
        next(ghoststore.watch(store=tmp_path, interval=interval))


def test_the_command(lab: Lab, tmp_path: Path) -> None:
    """One frame, as text and as JSON; live, it ends with the run."""
    store = tmp_path / "store"
    run = make(store)
    append(run, 0, 9)
    once = lab.run("watch", "--store", store, "--run", "run", "--once")
    assert (once.code, once.err) == (0, "")
    for text in (
        "5 of 23 steps (22%)",
        "stopped: no writer since",
        "loss 4.",
        "val 5.",
        "η 0.0",
        "2.0 steps/s",
        "scoring 25%",
        "earth",
        "best so far, by Σ unit·score",
        "mean unit·score by domain",
        "s0",
    ):
        assert text in once.out
    document = lab.run("watch", "--store", store, "--once", "--json").json
    assert document["commit_age"] >= 0
    assert document["silent"] >= 0
    expected = json.loads(json.dumps(timeless(Watcher(store).look()).to_json()))
    assert document | {"commit_age": None, "silent": None} == expected
    refused = lab.run("watch", "--store", store, "--json")
    assert (refused.code, "needs --once" in refused.err) == (2, True)
    append(run, 5, 23)
    live = lab.run("watch", "--store", store)
    assert live.code == 0, live.err
    assert "finished" in live.out
    assert "note: stdout is no terminal" in live.err


def test_a_run_that_is_written_and_one_that_is_not(tmp_path: Path) -> None:
    """A living writer, a dead one, none that is known; a finished run is finished whoever is there."""
    store = tmp_path / "store"
    run = make(store)
    watcher = Watcher(store)
    for steps in (0, 5):
        with RunWriter(run) as writer:
            for step in range(steps):
                writer.append(step, values(step))
            writer.flush()
            frame = watcher.look()
            assert (frame.state, frame.steps, frame.silent) == ("running", steps, None)
            assert frame.writer is not None
            assert (frame.writer["pid"], frame.writer["alive"]) == (os.getpid(), True)
            assert frame.seconds_left == (pytest.approx(18 * 0.5) if steps else None)
            (record,) = (run.path / ".writers").iterdir()
            dead = record.read_bytes().replace(b'"pid": %d' % os.getpid(), b'"pid": 4194305')
        assert watcher.look().state == "stopped"
        name = re.sub(r"-\d+-", "-4194305-", record.name, count=1)  # no process has so high a number
        record.parent.mkdir()
        (record.parent / name).write_bytes(dead)
        before = time.time() - 3000
        for path in (record.parent / name, *run.path.glob("commits/0*.json")):
            os.utime(path, (before, before))
        frame = watcher.look()
        assert (frame.state, frame.seconds_left) == ("stopped", None)
        assert frame.silent == pytest.approx(3000, abs=60)
        assert frame.writer is not None
        assert not frame.writer["alive"]
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(render(frame, 120))
        text = " ".join(console.export_text().split())
        assert "stopped: no writer since 50 min" in text
        assert "about" not in text
        shutil.rmtree(run.path / ".writers")
    append(run, 5, 23)
    assert watcher.look().state == "finished"


INTERRUPTED = """
import os, signal, query.training_scores.watch, ghoststore.cli
query.training_scores.watch.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGINT)
ghoststore.cli.main(["watch", "--store", {store!r}])
"""


def test_control_c_ends_it(lab: Lab, tmp_path: Path) -> None:
    append(make(tmp_path / "store"), 0, 5)
    outcome = lab.run(code=INTERRUPTED.format(store=str(tmp_path / "store")))
    assert (outcome.code, outcome.err.strip().splitlines()[-1]) == (130, "Interrupted.")
    assert "Traceback" not in outcome.err


def test_texts_are_shown_where_they_are_at_hand(lab: Lab, tmp_path: Path) -> None:
    """Short, from a plain file that has not changed; if not, one note."""
    corpus = ghoststore.Corpus.open(str(lab.write(tmp_path / "own.jsonl", lab.rows)))
    samples = list(corpus.samples())
    source = row_table().source_row
    table = row_table(
        source_offset=np.array([samples[i].offset for i in source]),
        source_digest=np.array([samples[i].digest() for i in source], dtype=np.uint64),
    )
    sections = {
        "corpus": {
            "fingerprint": "c",
            "domains": list(DOMAINS),
            "repeated_ids": None,
            "fields": corpus.resolved.to_json(),
        },
        "source": {"data": "x", "corpus": str(tmp_path / "own.jsonl"), "form": "jsonl"},
    }
    append(make(tmp_path / "store", table=table, **sections), 0, 10)
    texts = {f"s{i}": row["text"] for i, row in enumerate(lab.rows)}
    for frame in (Watcher(tmp_path / "store").look(),):
        assert {one.id: one.text for one in frame.best} == {one.id: texts[one.id] for one in frame.best}
    assert Watcher(tmp_path / "store", text=False).look().best[0].text is None
    lab.write(tmp_path / "own.jsonl", lab.sample_rows(27, 9))
    frame = Watcher(tmp_path / "store").look()
    assert len(frame.notes) == 1
    (tmp_path / "own.jsonl").unlink()
    assert Watcher(tmp_path / "store").look().notes == []


@pytest.mark.thin(2)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_frame_of_any_width(tmp_path: Path, width: int) -> None:
    run = whole(tmp_path / "store")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(Watcher(tmp_path / "store").look(), width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) == width
    assert "best so far" in text
    assert run.name in text


def test_a_run_without_scores(tmp_path: Path) -> None:
    """As `train --method Regular` writes it: losses, and nothing to rank."""
    layout = replace(LAYOUT, groups=(), blocks=())
    run = make(tmp_path / "store", layout=layout)
    with RunWriter(run) as writer:
        for step in range(5):
            given = values(step, layout)
            del given["score"]
            if step == 2:
                given["learning_rate"] = given["seconds"] = np.nan
            writer.append(step, given)
    frame = Watcher(tmp_path / "store").look()
    assert (frame.scored, frame.best, frame.histogram, frame.negative_share) == (0, [], [], None)
    assert frame.train_loss is not None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(frame, 100))
    assert "no scores yet" in console.export_text()


def test_charts() -> None:
    assert sparkline([1, 2, None, 3], 10) == "▁▅ █" or sparkline([1, 2, None, 3], 10) == "▁▄ █"
    assert sparkline([None, None], 5) == ""
    assert sparkline([2.0] * 50, 5) == "▁" * 5
    assert histogram([0, 1, 8], 1) == [" ▁█"]
    assert histogram([8, 4, 0], 2) == ["█  ", "██ "]
    assert histogram([], 2) == ["", ""]
    lines = [line.plain for line in line_chart([([4.0, None, 2.0], "red"), ([3.0], "blue")], 20, 3)]
    assert [len(line) for line in lines] == [20, 20, 20]
    assert (lines[0].split()[0], lines[-1].split()[0]) == ("4", "2")
    assert line_chart([([None], "red")], 20, 3)[0].plain == "no loss yet"
    assert [duration(value) for value in (None, 3.2, 100, 600, 10_000, 1e6)] == [
        "–",
        "3 s",
        "100 s",
        "10 min",
        "2.8 h",
        "11.6 d",
    ]
