"""Result files appear whole or not at all, whatever kills the command or refuses its writing; and it can run again."""

from __future__ import annotations

import errno
import json
import os
import re
import select as waiting
import shutil
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghoststore.errors import BusyError, UsageError
from ghoststore.processes import this_process
from ghoststore.store.base.disk import publish
from ghoststore.store.base.new_files import check_new, new_file, new_files
from ghoststore.store.base.records import seal
from tests.support.score_runs import whole

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

QUERY = ["query", "--store", "{built}", "--val-set", "{val}", "--device", "cpu"]
SCORES = ["scores", "--store", "{scored}", "--no-text"]
SELECT = ["select", "--store", "{built}", "--val-set", "{val}", "--device", "cpu", "--count", "3"]
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "query-csv": ([*QUERY, "--out", "a.csv"], ["a.csv"]),
    "query-parquet": ([*QUERY, "--out", "a.parquet"], ["a.parquet"]),
    "query-both": ([*QUERY, "--report", "a.html", "--out", "a.jsonl"], ["a.html", "a.jsonl"]),
    "self-influence": (["self-influence", "--store", "{built}", "--out", "a.csv"], ["a.csv"]),
    "scores-both": ([*SCORES, "--plot", "a.png", "--out", "a.json"], ["a.png", "a.json"]),
    "select": ([*SELECT, "--out", "a.jsonl"], ["a.jsonl", "a.jsonl.report.rows.jsonl", "a.jsonl.report.json"]),
    "select-dataset": ([*SELECT, "--out", "a", "--report", "b.json"], ["a", "b.rows.jsonl", "b.json"]),
    "plot-error": (
        ["plot-error", "--store", "{built}", "--out", "a.png", "--rows", "12", "--val-samples", "2", "--device", "cpu"],
        ["a.png", "a.json"],
    ),
}
"""What is run, in a folder of its own, and the names that it gives; the last one says that all are there. Every command
that writes is struck at any call of the system in ``tests/faults/``.
"""


@pytest.fixture(scope="module")
def places(lab: Lab, built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    whole(folder / "scored")
    val = lab.write(folder / "val.jsonl", [row | {"id": f"v{i}"} for i, row in enumerate(lab.sample_rows(3, 5))])
    shutil.copytree(built, folder / "built")  # commands keep caches in it
    return {"built": str(folder / "built"), "scored": str(folder / "scored"), "val": str(val)}


def run(lab: Lab, name: str, places: dict[str, str], folder: Path, **order: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    return lab.run(*(word.format(**places) for word in COMMANDS[name][0]), "--quiet", cwd=folder, **order)


def named(folder: Path) -> dict[str, bytes]:
    """Files without those that begin with a dot."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


def struck(lab: Lab, name: str, places: dict[str, str], folder: Path, **fault: Any) -> Iterator[tuple[Path, Outcome]]:
    """Runs with a fault before the first, the second, … call of an order, until there are no more; if it is a kill,
    then one after the last: after each other one is before the next.
    """

    def at(number: int, when: str) -> tuple[Path, Outcome]:
        place = folder / f"{fault['call']}-{when}-{number}"
        path = rf"{re.escape(str(place))}|^\.?a|^\.$|^\.b"
        return place, run(lab, name, places, place, fault=fault | {"path": path, "number": number, "when": when})

    for number in count(1):
        place, outcome = at(number, "before")
        if outcome.code == 0:
            break
        yield place, outcome
    assert number > 1, "the fault was never reached"
    if fault["act"] == "kill":
        yield at(number - 1, "after")


FAST_REFUSALS = [("query-csv", "fsync")]
KILLS = [*((name, "name") for name in COMMANDS), ("select", "fsync")]
REFUSALS = [*KILLS, ("query-csv", "fsync")]


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), KILLS)
def test_killed_anywhere(lab: Lab, places: dict[str, str], tmp_path: Path, name: str, call: str) -> None:
    """What has a name is whole, and all of it where the last one is there; the same command then works."""
    assert run(lab, name, places, tmp_path / "whole").code == 0
    expected = named(tmp_path / "whole")
    last = COMMANDS[name][1][-1]
    assert {path.split("/")[0] for path in expected} == set(COMMANDS[name][1])
    for folder, outcome in struck(lab, name, places, tmp_path, call=call, act="kill"):
        assert outcome.code == -9, outcome.err
        left = named(folder)
        assert left.items() <= expected.items()
        assert left == expected or last not in left
        again = run(lab, name, places, folder)
        # A single file that was complete when the process died is refused, as any file that is there.
        assert again.code == 0 or (again.code == 2 and left == expected and "exists" in again.err), again.err
        assert named(folder) == expected
        if again.code == 0:
            assert not [path for path in os.listdir(folder) if path.startswith(".")], "strays are swept"


@pytest.mark.kill
@pytest.mark.parametrize(
    ("name", "call"),
    [pytest.param(*refusal, marks=[] if refusal in FAST_REFUSALS else [pytest.mark.slow]) for refusal in REFUSALS],
)
def test_refused_anywhere(lab: Lab, places: dict[str, str], tmp_path: Path, name: str, call: str) -> None:
    """A full disk is one sentence and exit code 6, and leaves nothing at all."""
    act = "ENOSPC" if call == "name" else "EIO"
    for folder, outcome in struck(lab, name, places, tmp_path, call=call, act=act):
        assert outcome.code == 6, outcome.err
        *notes, error = outcome.err.splitlines()
        assert error.startswith(("Error: cannot write a", "Error: cannot write b.json"))
        assert all(note.startswith("note: ") for note in notes)
        assert os.listdir(folder) == []
        assert run(lab, name, places, folder).code == 0


LIMITED = """
import resource
import ghoststore.cli
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
ghoststore.cli.main({words})
"""


@pytest.mark.kill
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "query-parquet" else [pytest.mark.slow]) for name in COMMANDS]
)
def test_the_system_refuses_to_write_more(lab: Lab, places: dict[str, str], tmp_path: Path, name: str) -> None:
    """No hook: the kernel refuses bytes beyond a size, whichever library writes them."""
    words = [word.format(**places) for word in COMMANDS[name][0]]
    outcome = lab.run(code=LIMITED.format(limit=300, words=[*words, "--quiet"]), cwd=tmp_path)
    assert outcome.code == 6, outcome.err
    assert re.search(r"^Error: cannot write a[\w.]*: File too large", outcome.err, re.MULTILINE)
    assert os.listdir(tmp_path) == []


FOLDERS: dict[str, tuple[list[str], int]] = {
    "full-gradients": (["--checkpoint", "{model}", "--max-samples", "2"], 60_000),
    "tokenize": (["--tokenizer", "{model}", "--workers", "1"], 3000),
}


@pytest.mark.kill
@pytest.mark.parametrize("command", FOLDERS)
def test_libraries_that_hide_what_the_system_said(lab: Lab, tmp_path: Path, command: str) -> None:
    """safetensors and tokenizers raise their own kinds of error."""
    options, limit = FOLDERS[command]
    words = [command, "--data", str(lab.corpus), "--out", "a", "--quiet"]
    words += [word.format(model=lab.checkpoint) for word in options]
    outcome = lab.run(code=LIMITED.format(limit=limit, words=words), cwd=tmp_path)
    assert outcome.code == 6, outcome.err
    assert re.match(r"Error: cannot write a[\w./-]*: File too large", outcome.err)
    assert lab.run(*words, cwd=tmp_path).code == 0


NAMED = r"/a\.jsonl -> a\.jsonl$"


def interrupted(lab: Lab, places: dict[str, str], folder: Path, path: str) -> None:
    """A select that is killed once what is called with ``path`` (a regular expression) was done."""
    fault = {"call": "name", "path": path, "when": "after", "act": "kill"}
    assert run(lab, "select", places, folder, fault=fault).code == -9


@pytest.mark.kill
def test_what_a_killed_select_left_is_replaced_and_nothing_else(
    lab: Lab, places: dict[str, str], tmp_path: Path
) -> None:
    interrupted(lab, places, tmp_path, NAMED)
    assert named(tmp_path).keys() == {"a.jsonl"}
    words = [word.format(**places) for word in COMMANDS["select"][0]]
    changed = [*words, "--order", "score", "--quiet"]
    assert lab.run(*changed, cwd=tmp_path).code == 0
    assert json.loads((tmp_path / "a.jsonl.report.json").read_text())["settings"]["order"] == "score"
    second = tmp_path / "second"
    interrupted(lab, places, second, NAMED)
    with open(second / "a.jsonl", "a") as file:
        file.write("mine\n")
    before = named(second)
    outcome = lab.run(*words, cwd=second)
    assert outcome.code == 2
    assert "--out a.jsonl exists; nothing was written" in outcome.err
    assert named(second) == before


@pytest.mark.kill
def test_a_select_that_was_complete_when_it_was_killed(lab: Lab, places: dict[str, str], tmp_path: Path) -> None:
    """The same call finds the same; another is refused, as by any file that is there."""
    interrupted(lab, places, tmp_path, r" -> a\.jsonl\.report\.json$")
    before = named(tmp_path)
    assert before.keys() == set(COMMANDS["select"][1])
    words = [word.format(**places) for word in COMMANDS["select"][0]]
    outcome = lab.run(*words, "--order", "score", cwd=tmp_path)
    assert outcome.code == 2, outcome.err
    assert "exists; nothing was written" in outcome.err
    assert named(tmp_path) == before
    assert lab.run(*words, cwd=tmp_path).code == 2, "its mark is gone: it is as any other"
    again = tmp_path / "again"
    interrupted(lab, places, again, r" -> a\.jsonl\.report\.json$")
    assert run(lab, "select", places, again).code == 0
    assert named(again) == before
    assert [name for name in os.listdir(again) if name.endswith(".unfinished")] == []


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("name", ["select", "query-csv"])
def test_two_at_once(lab: Lab, places: dict[str, str], tmp_path: Path, name: str) -> None:
    """One has all of it, the other is refused in a sentence."""
    words = [word.format(**places) for word in COMMANDS[name][0]]
    at = words.index("--out") + 1
    words[at] = str(tmp_path / words[at])
    fault = {"call": "fsync", "path": re.escape(str(tmp_path)), "act": "stop"}
    slow = lab.start(*words, *({"select": ["--order", "score"]}.get(name, ["--top-k", "2"])), fault=fault)
    lab.stopped(slow)
    assert lab.run(*words).code == 0
    before = named(tmp_path)
    os.kill(slow, signal.SIGCONT)
    outcome = lab.wait(slow)
    assert outcome.code == 2, outcome.err
    assert "exists" in outcome.err
    assert named(tmp_path) == before
    assert [path for path in os.listdir(tmp_path) if path.startswith(".")] == []


def test_a_mark_of_a_living_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flock does nothing, the process that is named in the mark is left alone."""
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    first, second = tmp_path / "a", tmp_path / "b"

    def write() -> None:
        with new_files(first, second) as staged:
            for path in staged:
                path.write_text("x")
            # As the other, between its mark and its names.
            publish(tmp_path / ".a.unfinished", seal({"by": this_process(), "files": {}}))

    with pytest.raises(BusyError, match=rf"is being written by process {os.getpid()} on"):
        write()
    assert os.listdir(tmp_path) == [".a.unfinished"]


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    paths = (tmp_path / "a.txt", tmp_path / "b.txt")
    with pytest.raises(UsageError, match=f"^{re.escape(str(paths[0]))} is wrong$"), new_files(*paths) as (first, _):
        raise UsageError(f"{first} is wrong")
    assert os.listdir(tmp_path) == []

    def two() -> None:
        with new_file(tmp_path / "a") as path:
            path.write_text("mine")
            (tmp_path / "a").write_text("theirs")

    with pytest.raises(UsageError, match="exists by now; nothing was written"):
        two()
    assert (tmp_path / "a").read_text() == "theirs"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists; nothing was written"):
        check_new("`out`", tmp_path / "link")


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT, and mounted buckets."""

    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    paths = (tmp_path / "a", tmp_path / "b")
    with new_files(*paths) as staged:
        for file in staged:
            file.write_text("x")
    with new_file(tmp_path / "c") as file:
        file.write_text("x")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]

    def again() -> None:
        with new_file(tmp_path / "c") as file:
            file.write_text("y")

    with pytest.raises(UsageError, match=f"^{re.escape(str(tmp_path / 'c'))} exists by now"):
        again()
    assert (tmp_path / "c").read_text() == "x"


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 120 + ".txt")
    with new_files(path, tmp_path / "b") as staged:
        for file in staged:
            file.write_text("x")
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "b"])


DEMO = """
from pathlib import Path
from query.demo.demo import _claim, _clear
_claim(Path({out!r}), {overwrite})
_clear(Path({out!r}))
"""


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_folder_of_a_demo_that_was_killed(lab: Lab, tmp_path: Path, when: str) -> None:
    """It can be told again, with the same command: a folder that is no demo's is never touched."""
    for number in count(1):
        out = tmp_path / f"demo-{number}"
        fault = {"call": "name", "path": re.escape(f"demo-{number}"), "number": number, "when": when, "act": "kill"}
        if lab.run(code=DEMO.format(out=str(out), overwrite=False), fault=fault).code == 0:
            break
        assert lab.run(code=DEMO.format(out=str(out), overwrite=False)).code == 0
        assert os.listdir(out) == ["demo.json"]
        (out / "demo.json").write_text('{"rows": 1}')
        (out / "scores.png").write_text("x")
        assert lab.run(code=DEMO.format(out=str(out), overwrite=False)).code == 1
        assert (out / "scores.png").exists()
        again = lab.run(code=DEMO.format(out=str(out), overwrite=True), fault=fault | {"number": 1})
        assert again.code == -9
        assert lab.run(code=DEMO.format(out=str(out), overwrite=True)).code == 0
    assert number > 2
    (tmp_path / "mine").mkdir()
    assert lab.run(code=DEMO.format(out=str(tmp_path / "mine"), overwrite=True)).code == 1


WORKERS = """
import os, signal
from ghoststore.piped import PipedProcess
workers = [PipedProcess("indexer.tokenize.workers") for _ in range(2)]
os.kill(os.getpid(), signal.SIGSTOP)
"""


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started, with theirs."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(child for one in found for child in children(one))]


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("command", ["evaluate", "tokenize"])
def test_workers_end_with_the_process_that_started_them(
    lab: Lab, places: dict[str, str], tmp_path: Path, command: str
) -> None:
    if command == "evaluate":
        words = ["evaluate", "--store", places["built"], "--val-set", places["val"], "--out", str(tmp_path / "out")]
        words += ["--halves", "40", "--max-steps", "200", "--method", "random", "--workers", "2", "--device", "cpu"]
        pid = lab.start(*words, fault={"call": "name", "path": "half-0", "act": "stop"})
    else:
        pid = lab.start(code=WORKERS)
    lab.stopped(pid)
    handles = [os.pidfd_open(child) for child in children(pid)]
    assert len(handles) >= 2
    os.kill(pid, signal.SIGKILL)
    assert lab.wait(pid).code == -9
    for handle in handles:
        ended, _, _ = waiting.select([handle], [], [], 60)
        os.close(handle)
        assert ended, "a worker outlives the process that started it"
