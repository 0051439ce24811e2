"""stdout that is closed, full, read by nobody or in ASCII; arguments that are no text; errors of the system; events."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.cli.events import FLAG
from ghoststore.shown import spreadsheet_cell

if TYPE_CHECKING:
    from tests.conftest import Lab

SHELL = ["bash", "-c"]
GHOST = f"{sys.executable} -m ghoststore"
ROOT = Path(__file__).resolve().parents[2]


def shell(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``script``, in which GHOST is the command line."""
    return subprocess.run(
        [*SHELL, script.replace("GHOST", GHOST)],
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def strange(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose ids, domains and texts would command a terminal and a spreadsheet."""
    folder = tmp_path_factory.mktemp("strange")
    rows = [dict(row) for row in lab.rows[:12]]
    rows[0] |= {"id": "\x1b]0;owned\x07\x1b[2J", "domain": "=1+1"}
    rows[1] |= {"id": "=cmd|' /C calc'!A0", "text": "the \x9b31mcat \u202etac\u2066 \x85 sees – ☃ 😀"}
    rows[2] |= {"id": "line\nbreak\ttab\u2028", "domain": "\x1b[31m"}
    rows[3] |= {"id": "[red]markup[/red]", "domain": "[link=http://x]d[/link]"}
    rows[4] |= {"id": "-5"}
    corpus = lab.write(folder / "corpus.jsonl", rows)
    assert lab.build(folder / "store", "--data", corpus).code == 0
    return folder


def words(folder: Path) -> list[str]:
    return ["query", "--store", str(folder / "store"), "--val-set", str(folder / "corpus.jsonl"), "--top-k", "12"]


UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200e\u200f]")


def test_nothing_commands_the_terminal(lab: Lab, strange: Path) -> None:
    outcome = lab.run(*words(strange), "--each", "--bottom-k", "2")
    assert outcome.code == 0, outcome.err
    assert not UNSAFE.search(outcome.out + outcome.err)
    for shown in (r"\x1b]0;owned\x07\x1b[2J", r"\u202etac\u2066", r"line\nbreak\ttab\u2028", "[red]markup[/red]"):
        assert shown in outcome.out
    refused = lab.run("query", "--store", strange / "\x1b[2Jnone", "--val-set", "v")
    assert refused.code == 2
    assert not UNSAFE.search(refused.err)
    assert r"\x1b[2Jnone" in refused.err
    unknown = lab.run("query", "--\x1b[2J")
    assert not UNSAFE.search(unknown.err)


def test_json_is_exact_and_safe(lab: Lab, strange: Path) -> None:
    outcome = lab.run(*words(strange), "--json")
    assert not UNSAFE.search(outcome.out)
    ids = {hit["id"] for hit in outcome.json["results"][0]["hits"]}
    assert {"\x1b]0;owned\x07\x1b[2J", "line\nbreak\ttab\u2028"} <= ids
    texts = [hit["text"] for hit in outcome.json["results"][0]["hits"]]
    assert "the \x9b31mcat \u202etac\u2066 \x85 sees – ☃ 😀" in texts


def test_csv_computes_nothing(lab: Lab, strange: Path, tmp_path: Path) -> None:
    import csv

    import pyarrow.parquet

    for form in ("csv", "jsonl", "parquet"):
        assert lab.run(*words(strange), "--out", tmp_path / f"a.{form}", "--bottom-k", "12").code == 0
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    marked = {row["id"] for row in rows}
    assert {"'=cmd|' /C calc'!A0", "'-5", r"\x1b]0;owned\x07\x1b[2J"} <= marked
    assert {row["domain"] for row in rows} >= {"'=1+1"}
    assert (spreadsheet_cell(-1.5), spreadsheet_cell("-1.5")) == (-1.5, "'-1.5")
    exact = [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert "=cmd|' /C calc'!A0" in exact
    assert pyarrow.parquet.read_table(tmp_path / "a.parquet").column("id").to_pylist() == exact


@pytest.mark.parametrize("command", ["info --store STORE --json", "info --store STORE", "--help", "query --help"])
@pytest.mark.parametrize(
    ("way", "code", "sentence"),
    [
        (">&-", 6, "Error: cannot write to standard output: Bad file descriptor"),
        (">/dev/full", 6, "Error: cannot write to standard output: no space is left on the device"),
        ("| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", None, ""),
    ],
    ids=["closed", "full", "reader-gone"],
)
@pytest.mark.thin(2)
def test_a_stdout_that_takes_nothing(
    built: Path, tmp_path: Path, command: str, way: str, code: int | None, sentence: str
) -> None:
    done = shell(f"GHOST {command.replace('STORE', str(built))} {way}", tmp_path)
    # What fits a pipe's buffer may be written before its reader has gone.
    assert done.returncode == code if code is not None else done.returncode in (0, 141), done.stderr
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") <= 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_the_reader_has_gone(built: Path, tmp_path: Path) -> None:
    """Before anything is written: the reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ghoststore", "info", "--store", str(built)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["2>&-", "2>/dev/full"])
def test_a_stderr_that_takes_nothing_ends_no_work(lab: Lab, tmp_path: Path, way: str) -> None:
    line = f"GHOST build --checkpoint {lab.checkpoint} --data {lab.corpus} --store store --json {way}"
    done = shell(line, tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["rows"] == len(lab.rows)


@pytest.mark.slow
def test_a_closed_handle_is_no_file_of_ours(lab: Lab, tmp_path: Path) -> None:
    """The first file that is opened would get the number of the handle that is closed, and what is printed to it."""
    line = f"GHOST build --checkpoint {lab.checkpoint} --data {lab.corpus} --store store --quiet"
    assert shell(f"{line} <&- >&- 2>&-", tmp_path).returncode == 6
    assert shell("GHOST verify --store store", tmp_path).stdout.startswith("sound:")


ASCII = """
import sys
import ghoststore.cli
sys.stdout.reconfigure(encoding="ascii", errors="strict")
ghoststore.cli.main({words})
"""


def test_a_stdout_in_ascii(lab: Lab, strange: Path) -> None:
    table = lab.run(code=ASCII.format(words=[*words(strange), "--quiet"]))
    assert (table.code, table.err) == (0, "")
    assert table.out.isascii()
    assert r"\u2013" in table.out
    document = lab.run(code=ASCII.format(words=[*words(strange), "--quiet", "--json"]))
    assert document.out.isascii()
    assert any("😀" in hit["text"] for hit in document.json["results"][0]["hits"])


@pytest.mark.slow
def test_a_locale_in_ascii(strange: Path, tmp_path: Path) -> None:
    """Tables and documents are compared above; here it is the environment that says what stdout takes.

    The table in the locale: there stdout has other error handling than above, and a file is opened by another encoding.
    """
    line = " ".join(["GHOST", *words(strange), "--quiet"])
    table = shell(line, tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert table.returncode == 0, table.stderr
    assert table.stdout.isascii()
    assert r"\u2013" in table.stdout
    document = shell(f"{line} --json", tmp_path, PYTHONIOENCODING="ascii")
    assert document.returncode == 0, document.stderr
    assert document.stdout.isascii()
    assert any("😀" in hit["text"] for hit in json.loads(document.stdout)["results"][0]["hits"])


def test_arguments_that_are_no_text(lab: Lab, built: Path, tmp_path: Path) -> None:
    done = shell(f"GHOST info --store $'{tmp_path}/\\xff\\xfe'", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert r"\udcff\udcfe' is not UTF-8" in done.stderr
    for argument in ("a\0b", "a\ud800b"):
        outcome = lab.run("query", "--store", built, "--val-set", argument)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert "the argument 'a\\" in outcome.err


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        ("OSError(errno.EIO, 'Input/output error', 'f')", 6, "cannot read or write f: Input/output error (errno 5)"),
        ("OSError(errno.ENOSPC, 'x', 'f')", 6, "cannot read or write f: no space is left on the device; free some"),
        ("FileNotFoundError(errno.ENOENT, 'No such file', 'f')", 2, "cannot open f: No such file"),
        ("PermissionError(errno.EACCES, 'Permission denied', 'f')", 6, "cannot read or write f: Permission denied"),
        ("OSError('words of a library')", 2, "words of a library"),
        ("MemoryError('7 TiB')", 1, "memory ran out (7 TiB)"),
        ('RuntimeError("[x] DefaultCPUAllocator: can\'t allocate memory")', 1, "memory ran out"),
        ("UnicodeEncodeError('utf-8', 'a\\udcff', 1, 2, 'surrogates not allowed')", 2, r"'a\\udcff' is not text"),
    ],
)
def test_errors_of_the_system_are_sentences(lab: Lab, error: str, code: int, sentence: str) -> None:
    outcome = lab.run(code=FAILING.format(error=error, flags=[]))
    assert outcome.code == code
    assert outcome.err.startswith(f"Error: {sentence}".replace("\\\\", "\\"))
    assert outcome.err.count("\n") == 1
    logged = lab.run(code=FAILING.format(error=error, flags=[FLAG]))
    events = [json.loads(line) for line in logged.err.splitlines()]
    assert [event["event"] for event in events] == ["start", "error", "end"]
    assert events[1]["exit_code"] == events[2]["exit_code"] == code


FAILING = """
import errno
import ghoststore.cli, ghoststore.store.info
from ghoststore.lazy import FACE
def fail(**keywords):
    raise {error}
ghoststore.store.info.info = fail
ghoststore.cli.main(["info", "--store", "x", *{flags}])
"""


def test_a_bug_keeps_its_traceback(lab: Lab) -> None:
    outcome = lab.run(code=FAILING.format(error="KeyError('x')", flags=[]))
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    logged = lab.run(code=FAILING.format(error="KeyError('x')", flags=[FLAG]))
    assert logged.code == 1
    event = json.loads(logged.err.splitlines()[1])
    assert (event["event"], event["type"]) == ("error", "KeyError")
    assert "Traceback" in event["traceback"]


def events_of(text: str) -> list[dict[str, Any]]:
    """Every line is an event."""
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
    return events


def test_events(lab: Lab, strange: Path, tmp_path: Path) -> None:
    store, plain = tmp_path / "store", tmp_path / "plain"
    arguments = ["--checkpoint", lab.checkpoint, "--data", strange / "corpus.jsonl", "--name", "p", "--json"]
    built = lab.run("build", "--store", store, *arguments, FLAG)
    assert built.code == 0
    events = events_of(built.err)
    assert events[0]["event"] == "start"
    assert events[0]["arguments"][:2] == ["build", "--store"]
    assert events[-1]["event"] == "end"
    assert events[-1]["exit_code"] == 0
    begun = {event["task"]: event for event in events if event["event"] == "task"}
    ended = {event["task"]: event for event in events if event["event"] == "task_end"}
    assert begun.keys() == ended.keys() != set()
    assert any(event["description"] == "building" and ended[task]["done"] == 12 for task, event in begun.items())
    (result,) = [event["result"] for event in events if event["event"] == "result"]
    assert result["rows"] == built.json["rows"] == 12
    without = lab.run("build", "--store", plain, *arguments, "--quiet")
    assert without.json.keys() == built.json.keys()
    asked = lab.run(*words(strange), FLAG, "--out", tmp_path / "a.json", "--report", tmp_path / "a.html")
    kinds = [event["event"] for event in events_of(asked.err)]
    assert kinds.count("wrote") == 2
    assert asked.out == ""
    refused = lab.run("query", "--store", tmp_path / "none", "--val-set", "v", FLAG)
    (error,) = [event for event in events_of(refused.err) if event["event"] == "error"]
    assert (error["type"], error["exit_code"], refused.code) == ("UsageError", 2, 2)
    unknown = lab.run("query", "--nonesuch", FLAG)
    assert [event["event"] for event in events_of(unknown.err)] == ["start", "error", "end"]


WARNING = """
import sys, warnings, logging
import ghoststore.cli, ghoststore.store.info
real = ghoststore.store.info.info
def info(**keywords):
    warnings.warn("mind the gap")
    print("words of a library", file=sys.stderr)
    logging.getLogger("a").warning("logged")
    return real(**keywords)
ghoststore.store.info.info = info
ghoststore.cli.main(["info", "--store", {store!r}, "--log-json"])
"""


def test_warnings_and_strange_lines_are_events(lab: Lab, built: Path) -> None:
    outcome = lab.run(code=WARNING.format(store=str(built)))
    events = events_of(outcome.err)
    assert [event["event"] for event in events] == ["start", "warning", "stderr", "stderr", "result", "end"]
    assert [event.get("message") for event in events[1:4]] == ["mind the gap", "words of a library", "logged"]


@pytest.mark.thin(3)
@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://b/x", "az://b", "file:///tmp/x", "hf://datasets/x"])
def test_addresses_are_no_paths(lab: Lab, built: Path, tmp_path: Path, address: str) -> None:
    """Of results; a store, and what is read, may be in a bucket (tests/store/objects), and nowhere else."""
    for line in (
        ["query", "--store", built, "--val-set", lab.corpus, "--out", f"{address}/a.json"],
        ["select", "--store", built, "--val-set", lab.corpus, "--count", "2", "--out", f"{address}/a.jsonl"],
        ["demo", "--out", address],
    ):
        outcome = lab.run(*line, cwd=tmp_path)
        assert outcome.code == 2, outcome.err
        assert "results are written to local folders and files" in outcome.err
        assert os.listdir(tmp_path) == []
    for line in (
        ["build", "--checkpoint", lab.checkpoint, "--data", address, "--store", "store"],
        ["build", "--checkpoint", address, "--data", lab.corpus, "--store", "store"],
        ["build", "--checkpoint", lab.checkpoint, "--tokenizer", address, "--data", lab.corpus, "--store", "store"],
    ):
        if address in ("s3://bucket/x", "gs://b/x"):
            continue  # these would be asked for
        outcome = lab.run(*line, cwd=tmp_path)
        assert outcome.code == 2, outcome.err
        assert "cannot be read" in outcome.err or "a bucket's name has 3 to 63 characters" in outcome.err
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("file:///tmp/x", "is no place for a store"),
        ("hf://datasets/x", "is no place for a store"),
        ("gs://b/x", "a bucket's name has 3 to 63 characters"),
        ("az://b", "a bucket's name has 3 to 63 characters"),
        ("s3://key:secret@bucket/x", "without credentials"),
    ],
)
def test_addresses_of_no_store(lab: Lab, tmp_path: Path, address: str, words: str) -> None:
    for line in (
        ["build", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--store", address],
        ["verify", "--store", address],
    ):
        outcome = lab.run(*line, cwd=tmp_path)
        assert outcome.code == 2, outcome.err
        assert words in outcome.err
        assert "secret" not in outcome.err
        assert os.listdir(tmp_path) == []
    with pytest.raises(ghoststore.errors.UsageError, match=words):
        ghoststore.Store.create(address)
