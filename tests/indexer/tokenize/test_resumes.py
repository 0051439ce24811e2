"""Interrupted, on a disk that refuses, with workers or from standard input: the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghoststore.errors import BusyError, CorpusError
from ghoststore.store.base.disk import exclusive
from ghoststore.tokens.shards import TokenShards
from tests.support.shards import tokenize

if TYPE_CHECKING:
    from tests.conftest import Lab


def order(lab: Lab, out: Path, *more: str | Path) -> list[str | Path]:
    words = ["--data", lab.corpus, "--tokenizer", lab.checkpoint, "--out", out, "--shard-samples", "5", "--quiet"]
    return ["tokenize", *words, *more]


MOMENTS = {
    # The call, the paths it is called with, when, and how many of the six shards are committed then.
    "folder-begun": ("fsync", r"\.out\.[^/]*tmp/commits", "before", None),
    "folder-unnamed": ("name", r"/out$", "before", None),
    "folder-named": ("name", r"/out$", "after", 0),
    "tokens-unwritten": ("fsync", r"commits/\.00000001\.tokens-00000001\.npy", "before", 1),
    "tokens-unnamed": ("name", r"out/tokens-00000002\.npy$", "before", 2),
    "samples-named": ("name", r"out/samples-00000002\.npy$", "after", 2),
    "ids-named": ("name", r"out/ids-00000000\.npy$", "after", 0),
    "record-unwritten": ("fsync", r"commits/\.00000003\.json", "before", 3),
    "record-named": ("name", r"commits/00000003\.json$", "after", 4),
    "last-record": ("name", r"commits/00000005\.json$", "after", 6),
}


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize("act", ["kill", "interrupt", "ENOSPC"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumes_to_the_same_bytes(lab: Lab, whole: Path, moment: str, act: str, tmp_path: Path) -> None:
    call, path, when, shards = MOMENTS[moment]
    out = tmp_path / "out"
    fault = {"call": call, "path": path, "when": when, "act": act}
    outcome = lab.run(*order(lab, out), fault=fault)
    assert outcome.code == {"kill": -9, "interrupt": 130, "ENOSPC": 6}[act], outcome.err
    if act == "ENOSPC":
        assert "no space is left" in outcome.err
        assert str(out) in outcome.err
    if shards is None:
        assert not out.exists()
    elif shards < 6:
        with pytest.raises(CorpusError, match=f"{shards} of 6 shards"):
            TokenShards.open(out)
    # A shard with an intent and no record is committed by whoever writes next, and not tokenized.
    intents = list(out.glob("commits/.*.intent"))
    decided = sum(not intent.with_name(f"{intent.name[1:9]}.json").exists() for intent in intents)
    resumed = lab.run(*order(lab, out, "--json"))
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_samples"] == min(((shards or 0) + decided) * 5, 27)
    assert lab.tree(out) == lab.tree(whole)


def test_a_shard_without_its_record_is_made_again(lab: Lab, whole: Path, folder: Path) -> None:
    """Whatever a process that died had written of it; and files of others are left alone."""
    (folder / "commits/00000001.json").unlink()
    (folder / "tokens-00000001.npy").write_bytes(b"half")
    (folder / "mine.npy").write_bytes(b"mine")
    tokenize(lab, lab.corpus, folder, shard_samples=5)
    assert lab.tree(folder) == lab.tree(whole) | {"mine.npy": b"mine"}


def test_two_at_once(lab: Lab, whole: Path, folder: Path) -> None:
    (folder / "commits/00000001.json").unlink()
    with exclusive(folder, "it"):
        outcome = lab.run(*order(lab, folder))
        assert outcome.code == 5, outcome.err
        assert f"folder {folder} is being written by another process; wait for it, or choose another --out" in (
            outcome.err
        )
        with pytest.raises(BusyError):
            tokenize(lab, lab.corpus, folder, shard_samples=5)
    started = [lab.start(*order(lab, folder)) for _ in range(3)]
    outcomes = [lab.wait(pid) for pid in started]
    assert {outcome.code for outcome in outcomes} <= {0, 5}, [outcome.err for outcome in outcomes]
    assert lab.tree(folder) == lab.tree(whole)


def workers_of(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


def until(condition: Callable[[], Any], what: str) -> Any:
    """The first true value of ``condition``, within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError(what)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
@pytest.mark.kill
@linux
def test_workers(lab: Lab, whole: Path, tmp_path: Path) -> None:
    """Two workers: the same bytes. Both are killed with the process that started them, or one alone: an error that
    names it; and the same command resumes.
    """
    words = order(lab, tmp_path / "out", "--workers", "2", "--json")
    killed = lab.start(*words)
    pids = until(lambda: len(workers_of(killed)) == 2 and workers_of(killed), "no workers")
    os.kill(pids[1], signal.SIGKILL)
    outcome = lab.wait(killed)
    assert outcome.code == 1
    assert f"worker 1 (process {pids[1]}) was killed by SIGKILL" in outcome.err
    assert "the same command resumes" in outcome.err
    assert "Traceback" not in outcome.err

    parent = lab.start(*words)
    until(lambda: (tmp_path / "out/commits/00000000.json").exists(), "no shard")
    pids = workers_of(parent)
    os.kill(parent, signal.SIGKILL)
    assert lab.wait(parent).code == -9
    until(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids), "a worker outlived its parent")
    outcome = lab.run(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.json["resumed_samples"] > 0
    assert lab.tree(tmp_path / "out") == lab.tree(whole)


@pytest.mark.slow
@linux
def test_standard_input(lab: Lab, tmp_path: Path) -> None:
    """Workers share what was spooled, and their errors are raised as they are."""
    data = lab.write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 4)
    words = [
        "tokenize",
        "--data",
        "-",
        "--tokenizer",
        lab.checkpoint,
        "--out",
        tmp_path / "out",
        "--shard-samples",
        "2",
    ]
    outcome = lab.run(*words, "--workers", "2", "--quiet", stdin=str(data))
    assert outcome.code == 2, outcome.err
    assert "no chat template" in outcome.err
    outcome = lab.run(*words, "--text-field", "messages", "--quiet", stdin=str(data))
    assert outcome.code == 2, outcome.err
    shutil.rmtree(tmp_path / "out")
    lab.write(data, lab.rows)
    outcome = lab.run(*words, "--workers", "1", "--json", "--quiet", stdin=str(data))
    assert outcome.code == 0, outcome.err
    shards = TokenShards.open(tmp_path / "out", verify=True)
    assert (shards.source["data"], shards.samples) == ("-", 27)
