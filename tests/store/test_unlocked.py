"""Two writers that nothing holds apart: in their processes flock does nothing, as on many network file systems, and no
record of the other is seen, as where a machine's view of a folder lags behind. What is committed stays what it was.
"""

from __future__ import annotations

import os
import shlex
import signal
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.store.base.records import seal, unseal
from ghoststore.store.part.indexes import MANIFEST
from tests.support.made_parts import clustered, make_part
from tests.support.runs import LAYOUT, SPANS
from tests.support.runs import train as train_run

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

Fault = dict[str, Any]
Stamps = dict[str, tuple[int, int]]
NO_LOCK = "import fcntl\nfcntl.flock = lambda *_: None\n"
UNSEEN = """
from ghoststore.store.base import writers
everyone = writers.living
writers.living = lambda folder: [writer for writer in everyone(folder) if writer.id == writers.own_id()]
"""
TRAIN = """
import pathlib, runs
real = runs.values
def values(step, layout):
    return {{k: v + {shift} if k not in ("sample", "tokens") else v for k, v in real(step, layout).items()}}
runs.values = values
runs.train(pathlib.Path({store!r}))
"""


def train(store: Path, shift: int) -> str:
    """Python that trains a run without locks; runs of another ``shift`` have other bits in every array of floats."""
    return NO_LOCK + UNSEEN + TRAIN.format(shift=shift, store=str(store))


def command(*words: str | Path, unseen: bool = True) -> str:
    """Python that runs a command without locks."""
    return NO_LOCK + UNSEEN * unseen + f"import ghoststore.cli\nghoststore.cli.main({[str(word) for word in words]!r})"


def at(call: str, path: str, when: str = "before", number: int = 1) -> Fault:
    return {"call": call, "path": path, "when": when, "number": number, "act": "stop"}


def stamps(folder: Path) -> Stamps:
    """Which file each is, and when it was written: those that have their names."""
    named = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    named = (path for path in named if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in named}


def busy(outcome: Outcome) -> bool:
    return outcome.code == 5 or outcome.err.strip().splitlines()[-1].startswith("ghoststore.errors.BusyError")


def whole_spans(lab: Lab, store: Path, wholes: list[dict[str, bytes]]) -> list[int]:
    """Whose each span is; every byte that is committed is that of the same writer."""
    found = lab.tree(store)
    assert ghoststore.verify(store).sound
    assert found.keys() == wholes[0].keys()  # nothing is lost, and nothing left behind
    owners = []
    for span in range(SPANS):
        keys = [f"runs/run/{key}" for spec in LAYOUT.arrays() for key in LAYOUT.chunk_keys(spec, span)]
        (owner,) = [n for n, whole in enumerate(wholes) if all(found[key] == whole[key] for key in keys)]
        owners.append(owner)
    return owners


@pytest.fixture(scope="module")
def wholes(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Every file of two runs of other bits."""
    trees = []
    for shift in range(2):
        store = tmp_path_factory.mktemp("whole") / "store"
        outcome = lab.run(code=train(store, shift))
        assert outcome.code == 0, outcome.err
        trees.append(lab.tree(store))
    return trees


MOMENTS: dict[str, tuple[Fault, int]] = {
    # Where the slow writer stands still, and how many spans are its own then: committed, or decided.
    "arrays": (at("name", r"/score/zarr\.json$"), 0),
    "unnamed": (at("name", r"runs/run$"), 0),
    "staging": (at("fsync", r"\.00000001\.score\.|run/score/c/1/0/0$"), 1),
    "undecided": (at("name", r"\.00000001\.intent$|run/sample/c/1/0/0$"), 1),
    "decided": (at("name", r"\.00000001\.intent$", "after"), 2),
    "moving": (at("name", r"run/loss/c/1/0/0$"), 2),
    "moved": (at("name", r"run/score_seconds/c/1$", "after"), 2),
    "flushing": (at("fsync", r"run/loss/c$", number=2), 2),
    "unrecorded": (at("name", r"commits/00000001\.json$"), 2),
    "recorded": (at("name", r"commits/00000001\.json$", "after"), 2),
    "intent-stands": (at("unlink", r"\.00000001\.intent$"), 2),
}


@pytest.mark.kill
@pytest.mark.thin(2)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_slow_writer(lab: Lab, wholes: list[dict[str, bytes]], moment: str, tmp_path: Path) -> None:
    """It wakes up when another has written everything: no committed byte changes, not even to the same."""
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    fault, own = MOMENTS[moment]
    slow = lab.start(code=train(store, 0), fault=fault)
    lab.stopped(slow)
    other = lab.run(code=train(store, 1))
    assert other.code == 0, other.err
    before = stamps(store)
    os.kill(slow, signal.SIGCONT)
    outcome = lab.wait(slow)
    assert outcome.code == 0 or busy(outcome), outcome.err
    assert stamps(store) == before
    assert whole_spans(lab, store, wholes) == [0] * own + [1] * (SPANS - own)


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("moment", ["decided", "moving", "unrecorded"])
def test_two_meet_at_a_span(lab: Lab, wholes: list[dict[str, bytes]], moment: str, tmp_path: Path) -> None:
    """A writer with its own files of a span ready finds the intent of a slow one: it finishes that."""
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    late = lab.start(code=train(store, 1), fault=at("name", r"\.00000001\.intent$"))
    lab.stopped(late)
    slow = lab.start(code=train(store, 0), fault=MOMENTS[moment][0])
    lab.stopped(slow)
    os.kill(late, signal.SIGCONT)
    outcome = lab.wait(late)
    assert busy(outcome), outcome.err
    assert "span 1 of" in outcome.err
    assert "was committed by another process, with other content" in outcome.err
    os.kill(slow, signal.SIGCONT)
    assert lab.wait(slow).code == 0
    assert whole_spans(lab, store, wholes) == [1, 0, 0, 0, 0]


@pytest.mark.kill
def test_a_disk_that_loses_a_staged_file(lab: Lab, wholes: list[dict[str, bytes]], tmp_path: Path) -> None:
    """An intent that cannot be finished is followed by another, and its maker cannot move what is left of it."""
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    slow = lab.start(code=train(store, 0), fault=MOMENTS["decided"][0])
    lab.stopped(slow)
    (lost,) = (store / "runs/run/commits").glob(".00000001.loss.*.tmp")
    lost.unlink()
    assert lab.run(code=train(store, 1)).code == 0
    before = stamps(store)
    os.kill(slow, signal.SIGCONT)
    assert busy(lab.wait(slow))
    assert stamps(store) == before
    assert whole_spans(lab, store, wholes) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("intent", ["cut", "of other files", "of another span"])
def test_an_intent_that_cannot_be_followed(
    wholes: list[dict[str, bytes]], intent: str, lab: Lab, tmp_path: Path
) -> None:
    """A power cut left it half, or somebody made it to have files moved: it is passed over, and removed at the end."""
    store = tmp_path / "store"
    run = train_run(store, stop=5)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run.path / "commits/.x.tmp").write_text("x")
    record = unseal((run.path / "commits/00000000.json").read_bytes())
    files = {key.replace("/0", "/1", 1): value for key, value in record["files"].items()}
    commit = {**record, "span": 1, "rows": [5, 10], "files": files}
    staged = dict.fromkeys(files, ".x.tmp")
    if intent == "of other files":
        commit["files"], staged = {**files, str(victim): next(iter(files.values()))}, {**staged, str(victim): ".x.tmp"}
    if intent == "of another span":
        commit["span"] = 0
    data = seal({"commit": commit, "staged": staged})
    (run.path / "commits/.00000001.intent").write_bytes(data[: len(data) // 2] if intent == "cut" else data)
    train_run(store)
    assert victim.read_text() == "mine"
    (run.path / "commits/.x.tmp").unlink()
    assert whole_spans(lab, store, wholes) == [0] * SPANS


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["fsync", "name", "unlink"])
def test_killed_at_every_step(lab: Lab, wholes: list[dict[str, bytes]], call: str, when: str, tmp_path: Path) -> None:
    """Of one span: the next writer ends with the same bytes, and nothing beside them.

    Before the third call is after the second: every second one is struck, before and after it.
    """
    for number in count(1, 2):
        store = tmp_path / str(number)
        fault = {"call": call, "path": r"\b00000001\.|/c/1(/0)*$", "number": number, "when": when, "act": "kill"}
        outcome = lab.run(code=train(store, 0), fault=fault)
        if outcome.code != -signal.SIGKILL:
            break
        assert ghoststore.verify(store).sound
        train_run(store)
        assert whole_spans(lab, store, wholes) == [0] * SPANS
    assert outcome.code == 0, outcome.err
    assert number > (3 if call == "unlink" else len(LAYOUT.arrays()) + 1)


@pytest.mark.kill
@pytest.mark.parametrize("race", [pytest.param(n, marks=[pytest.mark.slow] * (n > 0)) for n in range(5)])
def test_races(lab: Lab, wholes: list[dict[str, bytes]], race: int, tmp_path: Path) -> None:
    """Both make the run and write its spans, at once."""
    store = tmp_path / "store"
    ghoststore.Store.create(store)
    started = [lab.start(code=train(store, shift)) for shift in range(2)]
    for pid in started:
        outcome = lab.wait(pid)
        assert outcome.code == 0 or busy(outcome), outcome.err
    assert lab.run(code=train(store, 0)).code == 0  # whatever both left to the next
    assert set(whole_spans(lab, store, wholes)) <= {0, 1}


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.parametrize("race", range(5))
def test_builds(lab: Lab, built: Path, race: int, tmp_path: Path) -> None:
    """Of one part that is not there yet, in a store that is not there yet."""
    store = tmp_path / "store"
    words = ["build", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--store", store, "--span-rows", "6"]
    outcomes = [lab.wait(pid) for pid in [_start(lab, *words, "--name", "part", "--quiet") for _ in range(2)]]
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert lab.tree(store) == lab.tree(built)


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("race", range(5))
def test_tokenizing(lab: Lab, race: int, tmp_path: Path) -> None:
    """Both at once; and one that is slow overwrites nothing."""
    words = ["tokenize", "--data", lab.corpus, "--tokenizer", lab.checkpoint, "--shard-samples", "5", "--quiet"]
    assert lab.run(*words, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    outcomes = [lab.wait(pid) for pid in [_start(lab, *words, "--out", out) for _ in range(2)]]
    assert [outcome.code for outcome in outcomes] == [0, 0], [outcome.err for outcome in outcomes]
    assert lab.tree(out) == lab.tree(tmp_path / "whole")

    slow_out = tmp_path / "slow"
    place = at("name", [r"/slow$", r"2\.intent$|tokens-00000002\.npy$", r"samples-00000002\.npy$"][race % 3])
    slow = _start(lab, *words, "--out", slow_out, fault=place)
    lab.stopped(slow)
    assert lab.run(code=command(*words, "--out", slow_out)).code == 0
    before = stamps(slow_out)
    os.kill(slow, signal.SIGCONT)
    outcome = lab.wait(slow)
    assert outcome.code == 0, outcome.err
    assert stamps(slow_out) == before
    assert lab.tree(slow_out) == lab.tree(tmp_path / "whole")


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("race", range(5))
def test_indexing(lab: Lab, race: int, tmp_path: Path) -> None:
    """Without the lock the record refuses the second: an index is there and sound, and nothing lies beside it."""
    store = tmp_path / "store"
    make_part(store, clustered())
    words = ["index", "--store", store, "--name", "mine", "--quiet"]
    slow = _start(lab, *words, unseen=False, fault=at("fsync", r"begun\.faiss"))
    lab.stopped(slow)
    other = lab.run(code=command(*words, unseen=False))
    assert other.code == 5, other.err
    assert f"It is process {slow} on " in other.err
    os.kill(slow, signal.SIGCONT)
    outcome = lab.wait(slow)
    assert outcome.code == 0, outcome.err
    for pid in [_start(lab, *words, "--rebuild", unseen=False) for _ in range(2)]:
        outcome = lab.wait(pid)
        assert outcome.code in (0, 5), outcome.err
    assert ghoststore.verify(store).sound
    names = sorted(path.suffix for path in (store / "parts/part/index/mine").iterdir())
    assert names == [".faiss", ".json", ".json", ".rows"], shlex.join(names)
    assert (store / "parts/part/index/mine" / MANIFEST).exists()


def _start(lab: Lab, *words: str | Path, unseen: bool = True, **order: Any) -> int:
    return lab.start(code=command(*words, unseen=unseen), **order)
