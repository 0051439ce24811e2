"""`ghoststore watch` on a terminal: what fits, what a larger one shows, which run is followed, and what was kept."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from ghoststore.cli.terminal import pace
from ghoststore.cli.watch import render
from ghoststore.store import RunLayout, RunWriter
from query.training_scores.frame import Extreme, Frame
from query.training_scores.watch import Watcher
from tests.support.score_runs import DOMAINS, append, make, row_table, whole

CHOOSING = RunLayout.saving(2, steps=9, ranks=2, batch=4, rows=24, weights=True)


def lines_of(frame: Frame, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(frame, width, height))
    return console.export_text().splitlines()


def full(frame: Frame) -> Frame:
    """As ``frame``, with as much to show as a long run has."""
    sample = Extreme(
        id="sample-of-the-corpus", id_repeats=False, source_row=1, domain="earth", value=1.5, times=3, text="x" * 300
    )
    trends = [replace(frame.domains[0], domain=f"domain {place}") for place in range(30)]
    return replace(frame, best=[sample] * 20, worst=[sample] * 20, domains=trends)


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> Frame:
    store = tmp_path_factory.mktemp("watched") / "store"
    whole(store)
    return Watcher(store).look()


@pytest.mark.thin(8)
@pytest.mark.parametrize("height", [4, 8, 12, 15, 20, 24, 40, 80])
@pytest.mark.parametrize("width", [40, 80, 140, 200])
def test_a_frame_fits_the_terminal(frame: Frame, width: int, height: int) -> None:
    """The last line is the cursor's. Whatever is left out, the first lines say how the run stands."""
    for shown in (frame, full(frame), replace(full(frame), notes=["a note of many words " * 9] * 2, runs=3)):
        lines = lines_of(shown, width, height)
        assert len(lines) <= max(height - 1, 8 if width < 80 else 5)
        assert max(map(cell_len, lines)) <= width
        assert "18 of 23 steps (78%)" in lines[0]


def test_scores_come_first_on_a_small_terminal(frame: Frame) -> None:
    """80 x 24: the loss is one line, then scores beside domains, the best, the worst; nothing is cut off."""
    lines = lines_of(full(frame), 80, 24)
    assert len(lines) == 23
    assert [line.startswith("loss 2.8") for line in lines].count(True) == 1
    assert not any("nats a token" in line for line in lines)
    order = [next(i for i, line in enumerate(lines) if word in line) for word in ("92 scores", "best so", "worst so")]
    assert order == sorted(order)
    assert "by domain" in lines[order[0]]
    assert sum("sample-of-the" in line for line in lines) == 10
    assert lines[-1].startswith("╰")
    low = lines_of(full(frame), 80, 12)
    assert any("92 scores" in line for line in low)
    assert not any("best so" in line for line in low)


def test_a_tall_terminal_shows_more(frame: Frame) -> None:
    small, tall, wide = (lines_of(full(frame), width, height) for width, height in ((80, 24), (80, 70), (200, 24)))
    for lines, charts, samples in ((tall, 1, 24), (wide, 1, 10)):
        assert sum("nats a token" in line for line in lines) == charts
        assert sum(line.count("sample-of-the") for line in lines) >= samples
    assert sum("domain " in line for line in tall) > sum("domain " in line for line in small)
    (titles,) = (line for line in wide if "nats a token" in line)
    assert "scores" in titles
    assert "by domain" in titles
    (titles,) = (line for line in wide if "best so" in line)
    assert "worst so" in titles


def test_rates_below_one_a_second() -> None:
    assert [pace(seconds, "steps") for seconds in (0.001, 0.25, 1.0, 2.5, 90.0, 7200.0)] == [
        "1,000 steps/s",
        "4.0 steps/s",
        "1.0 steps/s",
        "2.5 s/step",
        "90.0 s/step",
        "7,200 s/step",
    ]


def candidates(step: int) -> dict[str, Any]:
    """(2, 4): the first half of each step's places is trained on, and none of one domain, ever."""
    sample = np.random.default_rng([7, step]).permutation(24)[:8].reshape(2, 4)
    weight = np.tile([1.0, 0.5, 0.0, 0.0], (2, 1)).astype(np.float32)
    domain = row_table().domain[sample]
    weight[domain == 1] = 0.0
    score = sample.astype(np.float32)
    if step == 3:
        sample[1, 3], score[1, 3], weight[1, 3] = -1, np.nan, np.nan
    return {"sample": sample, "score": score, "weight": weight}


def test_what_was_kept(tmp_path: Path) -> None:
    """Of all candidates, of the recent ones and of each domain: one that was never kept is shown, too."""
    run = make(tmp_path / "store", layout=CHOOSING, scoring={"choosing": {"policy": "top-k", "keep": 4}})
    with RunWriter(run) as writer:
        for step in range(8):
            writer.append(step, {**candidates(step), "learning_rate": 0.1, "seconds": 2.5})
    frame, grown = Watcher(tmp_path / "store").look(), Watcher(tmp_path / "store")
    for _ in range(4):
        newest = grown.look(most_steps=2)
    assert replace(newest, commit_age=0, silent=0) == replace(frame, commit_age=0, silent=0)
    drawn = dict.fromkeys([*DOMAINS, None], 0)
    trained = dict(drawn)
    for step in range(8):
        given = candidates(step)
        for row, weight in zip(given["sample"].ravel().tolist(), given["weight"].ravel().tolist(), strict=True):
            if row >= 0:
                place = int(row_table().domain[row])
                drawn[DOMAINS[place] if place >= 0 else None] += 1
                trained[DOMAINS[place] if place >= 0 else None] += weight > 0
    assert (frame.candidates, frame.kept) == (63, sum(trained.values())) == (sum(drawn.values()), frame.scored)
    assert frame.kept_share == frame.recent_kept_share == sum(trained.values()) / 63
    assert {one.domain: one.kept_share for one in frame.domains} == {
        name: trained[name] / drawn[name] for name in drawn
    }
    last = frame.domains[-1]
    assert (last.domain, last.times, last.value_per_time, last.negative_share) == ("earth", 0, None, None)
    text = "\n".join(lines_of(frame, 80, 24))
    assert f"kept {frame.kept_share:.0%} (now {frame.kept_share:.0%})" in text
    assert "2.5 s/step" in text
    (row,) = (line for line in text.splitlines() if "earth" in line and "0.0%" in line)
    assert "–" in row


def test_the_run_that_is_written_or_the_newest_is_followed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for age, name in ((300, "b"), (100, "c"), (200, "a")):
        run = make(store, name)
        append(run, 0, 5)
        for path in (run.path, *run.path.rglob("*")):
            then = path.stat().st_mtime - age
            os.utime(path, (then, then))
    frame = Watcher(store).look()
    assert (frame.run, frame.runs, frame.steps) == ("c", 3, 5)
    assert "the newest of 3 runs; --run NAME shows another" in "\n".join(lines_of(frame, 80, 24))
    assert (Watcher(store, "a").look().run, Watcher(store, "a").look().runs) == ("a", 1)
    run = make(store, "b")
    with RunWriter(run):
        follower = Watcher(store)
        assert (follower.look().run, follower.look().state) == ("b", "running")
        make(store, "d")
        assert Watcher(store).look().run == "b"
    assert follower.look().run == "b"
