"""`build --workers`: processes of one machine, which may die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ghoststore
from ghoststore import piped
from ghoststore.errors import CheckpointError, MismatchError, WorkerError
from ghoststore.progress import Silent, Task
from ghoststore.settings.build import BuildOptions
from indexer.build import crew
from indexer.build.share import device_in_turn
from indexer.build.workers import devices_of
from tests.support.parts import unbuild

if TYPE_CHECKING:
    from tests.conftest import Lab


def build(lab: Lab, store: Path, **settings: Any) -> ghoststore.BuildReport:
    given = {"checkpoint": lab.checkpoint, "data": lab.corpus, "name": "part", "span_rows": 6, "device": "cpu"}
    return ghoststore.build(store=store, **(given | {"workers": 2} | settings))


def processes() -> list[int]:
    """Workers of this process that are alive."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"indexer.build.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class Killing(Silent):
    """Kills a worker whenever a bar called ``at`` begins or advances, at most ``most`` times."""

    def __init__(self, at: str, most: int) -> None:
        self.at, self.left = at, most
        self.notes: list[str] = []
        self.rows = 0

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        self.strike(description)
        listener = self

        class Bar(type(super().task("", None))):  # type: ignore[misc]
            def advance(self, rows: int, tokens: int = 0) -> None:
                listener.rows += rows if description == "building" else 0
                listener.strike(description)

        return Bar()

    def strike(self, description: str) -> None:
        if description.startswith(self.at) and self.left and (pids := processes()):
            os.kill(pids[self.left % len(pids)], signal.SIGKILL)
            self.left -= 1

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.slow
@pytest.mark.parametrize(("at", "most"), [("building", 2), ("learning", 1)])
def test_as_one_process(lab: Lab, built: Path, tmp_path: Path, at: str, most: int) -> None:
    store, listener = tmp_path / "store", Killing(at, most)
    report = build(lab, store, progress=listener)
    assert lab.tree(store) == lab.tree(built)
    assert listener.left == 0
    assert len([note for note in listener.notes if "was killed by SIGKILL: another takes its place" in note]) == most
    assert listener.rows == len(lab.rows) == report.rows_built  # what was built twice is shown once
    assert report.statuses == build(lab, store).statuses
    assert processes() == []


@pytest.mark.slow
def test_resumed(lab: Lab, built: Path, tmp_path: Path) -> None:
    """None dies; and spans that are there are not built again, by however many."""
    store, listener = tmp_path / "store", Killing("", 0)
    report = build(lab, store, workers=3, progress=listener)
    assert lab.tree(store) == lab.tree(built)
    assert listener.rows == len(lab.rows) == report.rows_built
    assert not any("another takes its place" in note for note in listener.notes)
    unbuild(ghoststore.Store.open(store).part(), 1, 2)
    report = build(lab, store)
    assert (report.rows_built, report.resumed_rows) == (12, len(lab.rows) - 12)
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.slow
def test_errors_of_a_worker_are_those_of_the_build(lab: Lab, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(lab, store, workers=1)
    before = lab.tree(store)
    with pytest.raises(MismatchError, match="rank_total"):
        build(lab, store, projection=ghoststore.ProjectionConfig(rank_total=16))
    assert lab.tree(store) == before
    assert processes() == []


@pytest.mark.kill
def test_that_die_again_and_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any of them has built a span."""
    monkeypatch.setattr(crew, "DEATHS", 1)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(piped.sys, "executable", str(program))
    with pytest.raises(WorkerError, match=r"was killed by SIGKILL, the last of 3 that died .* `workers`"):
        build(lab, tmp_path / "store")
    assert processes() == []


def test_one_that_fails_is_not_begun_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail again: what it said is on stderr."""
    monkeypatch.setattr(piped.sys, "executable", "/bin/false")
    with pytest.raises(
        WorkerError, match=r"^worker [12] \(process \d+\) ended with exit status 1; what it said is above"
    ):
        build(lab, tmp_path / "store")
    assert processes() == []


@pytest.mark.slow
@pytest.mark.kill
def test_the_workers_end_with_their_parent(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ["build", "--checkpoint", str(lab.checkpoint), "--data", str(lab.corpus), "--store", str(store)]
    command += ["--name", "part", "--span-rows", "6", "--workers", "2"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "ghoststore", *command], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert parent.stderr is not None
    parent.stderr.readline()  # a worker is at work
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children
    parent.kill()
    parent.stderr.read()  # which the workers hold open
    parent.wait()
    assert not any(Path(f"/proc/{pid}/cmdline").exists() and b"build.worker" in cmdline(pid) for pid in children)
    assert lab.build(store).code == 0
    assert lab.tree(store) == lab.tree(built)


def cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_devices() -> None:
    def of(**settings: Any) -> list[str]:
        return devices_of(BuildOptions(checkpoint="m", data="d", store="s", workers=4, **settings))

    assert of(device="cpu") == ["cpu"]
    assert of(devices=["0,1", "cuda:3"]) == ["cuda:0", "cuda:1", "cuda:3"]
    assert of(devices=["cpu"]) == ["cpu"]
    assert of(device="cuda:1") == ["cuda:1"]
    assert of(device="auto") == ["auto"]  # each worker looks for the GPUs itself


@pytest.mark.parametrize(("gpus", "got"), [(0, ["auto"] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])])
def test_gpus_in_turn(monkeypatch: pytest.MonkeyPatch, gpus: int, got: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [device_in_turn("auto", number) for number in (1, 2, 3)] == got
    assert device_in_turn("cpu", 2) == "cpu"
    assert device_in_turn("cuda:5", 2) == "cuda:5"


@pytest.mark.parametrize("way", [{"workers": 2}, {"workers": None, "worker": "1/2"}])
def test_a_wrong_checkpoint_makes_no_store(lab: Lab, tmp_path: Path, way: dict[str, Any]) -> None:
    """Of a part that has a name, too."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no config"):
        build(lab, tmp_path / "store", checkpoint=tmp_path / "empty", **way)
    assert not (tmp_path / "store").exists()


def test_who_starts_workers_imports_no_torch(lab: Lab, tmp_path: Path) -> None:
    """Its imports would come before theirs: they begin seconds later, and its memory holds what nobody uses."""
    words = {"checkpoint": str(lab.checkpoint), "data": str(lab.corpus), "store": str(tmp_path), "device": "cpu"}
    code = (
        "import json, sys, ghoststore\n"
        "report = ghoststore.build(**json.loads(sys.argv[1]), workers=1)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(report.rows_built)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(words)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(lab.rows)
