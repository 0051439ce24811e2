"""Several workers, each with a share of the spans: one part, byte for byte that of one process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ghoststore
from ghoststore.errors import BusyError, MismatchError, UsageError
from ghoststore.progress import Silent, Task
from ghoststore.store.spans.writer import writing
from indexer.build import job
from indexer.build.share import Share
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab

SPAN_ROWS = "2"


@pytest.fixture(scope="module")
def alone(lab: Lab) -> Path:
    """The part that one process builds."""
    store = lab.folder / "alone"
    assert lab.build(store, "--span-rows", SPAN_ROWS).code == 0
    return store


def worker(lab: Lab, store: Path, share: str, **settings: Any) -> ghoststore.BuildReport:
    given = {"checkpoint": lab.checkpoint, "data": lab.corpus, "name": "part", "span_rows": 2, "device": "cpu"}
    return ghoststore.build(store=store, worker=share, **(given | settings))


class Listener(Silent):
    """Which bars a build begins."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        self.begun.append(description)
        return super().task(description, total, done, unit)


@given(spans=st.integers(0, 2000), count=st.integers(1, 40))
def test_each_span_is_in_one_share(spans: int, count: int) -> None:
    shares = [Share(number, count).of(spans) for number in range(1, count + 1)]
    assert sorted(span for share in shares for span in share) == list(range(spans))
    assert all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= -(-spans // (8 * count))  # one run of spans


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "1/2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_ARRAY_TASK_ID": "9"}, "2/2"),
        ("task 7 of 4 to 7", "4/4"),
        ("task 6 of 0 to 8 by 2", "4/5"),
        ("task 3 of 3 to 3", "1/1"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, "3/3"),
        ("task 2 of 1 to 4, process 1 of 2", "4/8"),
    ],
)
def test_launchers(variables: dict[str, str] | str, share: str) -> None:
    if isinstance(variables, str):
        variables = slurm(variables)
    assert str(Share.given("auto", variables)) == share


def slurm(words: str) -> dict[str, str]:
    """The variables of SLURM for "task T of FIRST to LAST [by STEP][, process P of N]"."""
    array, _, inside = words.partition(", ")
    task, first, last = (int(array.split()[place]) for place in (1, 3, 5))
    step = int(array.split()[7]) if " by " in array else 1
    variables = {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(last),
        "SLURM_ARRAY_TASK_COUNT": str((last - first) // step + 1),
    }
    if inside:
        variables |= {"SLURM_PROCID": inside.split()[1], "SLURM_NTASKS": inside.split()[3]}
    return variables


@pytest.mark.parametrize(
    ("worker", "variables", "message"),
    [
        ("auto", {}, "none of these variables is set"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "the variable RANK is 'x'"),
        ("auto", {**slurm("task 7 of 4 to 7"), "SLURM_ARRAY_TASK_COUNT": "3"}, "not evenly spaced"),
    ],
)
def test_launchers_that_cannot_be_followed(worker: str, variables: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Share.given(worker, variables)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"worker": "0/2"}, "`worker` is I/N"),
        ({"worker": "3/2"}, "`worker` is I/N"),
        ({"worker": "one"}, "`worker` is I/N"),
        ({"worker": "1/2", "workers": 2}, "give one"),
        ({"devices": ["0"]}, "`devices` are those of `workers`"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"workers": 2, "data": ["a text"]}, "save what is in memory"),
        ({"worker": "1/2", "data": "-"}, "standard input can be read only once"),
    ],
)
def test_refused(lab: Lab, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ghoststore.build(**({"checkpoint": lab.checkpoint, "data": lab.corpus, "store": tmp_path / "store"} | settings))
    assert not (tmp_path / "store").exists()


def test_one_after_another(lab: Lab, alone: Path, tmp_path: Path) -> None:
    """In any order; the later ones neither read the whole corpus nor learn again."""
    store, listener = tmp_path / "store", Listener()
    reports = [worker(lab, store, "2/3"), worker(lab, store, "3/3", progress=listener)]
    assert not any("scanning" in words or "learning" in words for words in listener.begun)
    left = ghoststore.Store.open(store).part()
    assert not left.complete
    assert reports[1].rows_built + reports[0].rows_built == left.rows == reports[1].resumed_rows + reports[1].rows_built
    assert [report.worker for report in reports] == ["2/3", "3/3"]
    assert worker(lab, store, "2/3").rows_built == 0
    worker(lab, store, "1/3")
    assert lab.tree(store) == lab.tree(alone)


def test_what_a_worker_left_is_built_by_the_next(lab: Lab, alone: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ("--span-rows", SPAN_ROWS, "--worker", "1/2")
    killed = lab.build(store, *command, fault={"call": "name", "path": r"\d\.json$", "when": "after", "act": "kill"})
    assert killed.code == -9
    worker(lab, store, "2/2")
    assert lab.build(store, "--span-rows", SPAN_ROWS).code == 0
    assert lab.tree(store) == lab.tree(alone)


@pytest.mark.kill
@pytest.mark.parametrize("moment", ["before it learns", "before the part is there", "in its first span"])
def test_the_first_is_killed(lab: Lab, alone: Path, tmp_path: Path, moment: str) -> None:
    """Whoever waits for it begins the part, or finds it."""
    paths = {
        "before it learns": (r"\.writers/[^/]*$", "name"),
        "before the part is there": (r"parts/part$", "name"),
        "in its first span": (r"commits/.*\.intent$", "name"),
    }
    path, call = paths[moment]
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    command = ("build", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--name", "part", "--store", store)
    command += ("--span-rows", SPAN_ROWS, "--quiet", "--worker")
    first = lab.start(*command, "1/2", fault={"call": call, "path": path, "when": "before", "act": "stop"})
    stopped = lab.stops(first)
    second = lab.start(*command, "2/2")
    if stopped:
        os.kill(first, signal.SIGKILL)
    assert lab.wait(first).code == (-9 if stopped else 0)
    outcome = lab.wait(second)
    assert outcome.code == 0, outcome.err
    assert lab.run(*command, "1/2").code == 0
    assert lab.tree(store) == lab.tree(alone)


@pytest.mark.thin(1)
@pytest.mark.parametrize("store_exists", [True, False])
def test_at_once(lab: Lab, alone: Path, tmp_path: Path, store_exists: bool) -> None:
    """Three processes from the beginning: one plans and learns, and none is refused."""
    store = tmp_path / "store"
    if store_exists:
        ghoststore.Store.create(store)
    command = ("build", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--name", "part", "--store", store)
    command += ("--span-rows", SPAN_ROWS, "--json", "--quiet", "--worker")
    outcomes = [lab.wait(pid) for pid in [lab.start(*command, f"{number}/3") for number in (1, 2, 3)]]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], [outcome.err for outcome in outcomes]
    assert sum(outcome.json["seconds"]["learning"] > 0 for outcome in outcomes) == 1
    assert sum(outcome.json["rows_built"] for outcome in outcomes) == len(lab.rows)
    assert lab.tree(store) == lab.tree(alone)


def test_others_are_refused_while_workers_write(lab: Lab, alone: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(alone, tmp_path / "store"))
    part = ghoststore.Store.open(store).part()
    unbuild(part, 3)
    with writing(part, shared=True):
        assert lab.build(store, "--span-rows", SPAN_ROWS).code == BusyError.exit_code
        assert "left alone: part" in lab.run("gc", "--store", store).out
        beside = lab.build(store, "--span-rows", SPAN_ROWS, "--worker", "1/1")
        assert beside.code == 0, beside.err
    with writing(part):
        refused = lab.build(store, "--span-rows", SPAN_ROWS, "--worker", "1/1")
        assert refused.code == BusyError.exit_code, refused.err
    assert lab.tree(store) == lab.tree(alone)


@pytest.mark.thin(1)
@pytest.mark.parametrize("change", ["a row", "another order", "fewer rows"])
def test_another_corpus_is_refused(lab: Lab, tmp_path: Path, change: str) -> None:
    """A worker that joins does not scan its corpus: the digest of its first span tells."""
    store = tmp_path / "store"
    worker(lab, store, "1/2")
    before = lab.tree(store)
    rows = list(lab.rows)
    if change == "a row":
        rows = [{**row, "text": f"{row['text']}!"} if "text" in row else row for row in rows]
    elif change == "another order":
        rows = rows[::-1]
    else:
        rows = rows[:3]
    data = lab.write(tmp_path / "other.jsonl", rows)
    with pytest.raises(MismatchError):
        worker(lab, store, "2/2", data=data)
    assert lab.tree(store) == before


@pytest.mark.parametrize("share", ["1/2", "1/1"])
def test_another_corpus_is_refused_by_a_complete_part(lab: Lab, alone: Path, share: str) -> None:
    """Where a worker has nothing to build, it reads the whole corpus: no digest of a span would tell."""
    before = lab.tree(alone)
    for rows, message in ((lab.rows[::-1], "other settings"), ([*lab.rows, *lab.rows[:2]], "has grown since")):
        with pytest.raises(MismatchError, match=message):
            worker(lab, alone, share, data=lab.write(lab.folder / "another.jsonl", rows))
    assert lab.tree(alone) == before


def test_a_corpus_that_grew_under_a_part_that_is_not_complete(lab: Lab, alone: Path, tmp_path: Path) -> None:
    """A worker builds the rows that the part was begun with, as a build that is none does (test_grown.py)."""
    store, data = tmp_path / "store", lab.write(tmp_path / "data.jsonl", lab.rows)
    worker(lab, store, "1/2", data=data)
    lab.write(data, [*lab.rows, *lab.rows[:2]])
    command = ("--span-rows", SPAN_ROWS, "--data", data)
    completed = lab.build(store, *command, "--worker", "1/1")
    assert completed.code == 0, completed.err
    part, whole = (ghoststore.Store.open(place).part() for place in (store, alone))
    np.testing.assert_array_equal(vectors_of(part), vectors_of(whole))
    refused = lab.build(store, *command)
    assert refused.code == MismatchError.exit_code
    assert "--skip-samples 27" in refused.err


SCRIPTS = {"loop": "for i in", "torchrun": "torchrun", "slurm": "#SBATCH"}


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_of_the_docs(lab: Lab, alone: Path, tmp_path: Path, script: str) -> None:
    """As they stand in docs/scale.md, in a folder that holds what they name."""
    page = (Path(__file__).parents[3] / "docs/scale.md").read_text()
    (block,) = [text for text in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if SCRIPTS[script] in text]
    (tmp_path / "model").symlink_to(lab.checkpoint)
    (tmp_path / "train.jsonl").symlink_to(lab.corpus)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("ghoststore", "ghoststore"), ("torchrun", "torch.distributed.run")):
        rest = f" --name part --span-rows {SPAN_ROWS} --device cpu" if name == "ghoststore" else ""
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"{rest}\n')
        (programs / name).chmod(0o755)
    block = block.replace(
        "-m ghoststore build", f"-m ghoststore build --name part --span-rows {SPAN_ROWS} --device cpu"
    )
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environments = [environment]
    if script == "slurm":
        environments = [environment | slurm(f"task {task} of 1 to 2") for task in (1, 2)]
    at_work = [
        subprocess.Popen(["bash", "-e", "-c", block], cwd=tmp_path, env=each, stderr=subprocess.PIPE, text=True)
        for each in environments
    ]
    for process in at_work:
        assert process.stderr is not None
        assert process.wait() == 0, process.stderr.read()
    assert lab.tree(tmp_path / "store") == lab.tree(alone)


def test_another_learned_meanwhile(lab: Lab, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other hardware, with other last bits: what the first to finish has learned is taken."""
    store = tmp_path / "store"
    calibrate = job.calibrate

    def slower(model: Any, plan: Any, rows: Any, **settings: Any) -> Any:
        monkeypatch.setattr(job, "calibrate", calibrate)
        assert lab.build(store, "--span-rows", SPAN_ROWS).code == 0
        return calibrate(model, plan, rows[:-1], **settings)

    monkeypatch.setattr(job, "calibrate", slower)
    assert worker(lab, store, "1/2").seconds["learning"] == 0
    assert lab.tree(store) == lab.tree(alone)


def test_a_dry_run_says_what_a_worker_would_do(lab: Lab, tmp_path: Path) -> None:
    """The shares sum to the part, and to its time; what is there is nobody's."""
    whole = lab.build(tmp_path / "store", "--dry-run", "--json").json
    dry = [lab.build(tmp_path / "store", "--dry-run", "--worker", f"{n}/3", "--json").json for n in (1, 2, 3)]
    assert sum(one["rows_built"] for one in dry) == whole["rows"]
    assert [one["worker"] for one in dry] == ["1/3", "2/3", "3/3"]
    assert {one["rows"] for one in dry} == {whole["rows"]}
    first = lab.build(tmp_path / "store", "--worker", "1/3", "--json").json
    assert first["rows_built"] == dry[0]["rows_built"] > 0
    again = [lab.build(tmp_path / "store", "--dry-run", "--worker", f"{n}/3", "--json").json for n in (1, 2, 3)]
    assert [one["rows_built"] for one in again] == [0, dry[1]["rows_built"], dry[2]["rows_built"]]
    shares = [one["seconds"].get("compute", 0.0) > 0 for one in again]
    assert shares == [False, True, True]
    table = lab.build(tmp_path / "store", "--dry-run", "--worker", "2/3").out
    assert f"worker 2/3 would build {dry[1]['rows_built']} rows" in table


@pytest.mark.slow
def test_a_dry_run_says_what_one_of_several_would_do(lab: Lab, tmp_path: Path) -> None:
    """No worker has more than its part of the missing spans, and those without a span are not counted."""
    store, small = tmp_path / "store", ("--span-rows", SPAN_ROWS)
    whole = lab.build(store, "--dry-run", *small, "--json").json
    spans = -(-whole["rows"] // int(SPAN_ROWS))
    assert whole["workers"] is None
    for workers in (2, spans, spans + 3):
        dry = lab.build(store, "--dry-run", *small, "--workers", workers, "--json").json
        busy = min(workers, spans)
        assert (dry["workers"], dry["rows_built"]) == (busy, -(-spans // busy) * int(SPAN_ROWS))
    table = lab.build(store, "--dry-run", *small, "--workers", "2").out
    rows = f"{-(-spans // 2) * int(SPAN_ROWS)} rows"
    assert f"2 side by side, each builds at most {rows} if all are equally fast" in table
    assert "in one process" in table
    assert lab.build(store, *small, "--worker", "1/2").code == 0
    left = spans - len(Share(1, 2).of(spans))
    dry = lab.build(store, "--dry-run", *small, "--workers", "1", "--json").json
    assert dry["rows_built"] == left * int(SPAN_ROWS) - (whole["rows"] % int(SPAN_ROWS) > 0)
    assert lab.build(store, "--dry-run", *small, "--workers", "99", "--json").json["workers"] == left
    assert lab.build(store, *small).code == 0
    assert "nothing is left to build" in lab.build(store, "--dry-run", *small, "--workers", "2").out
