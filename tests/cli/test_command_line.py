"""The command line as a program: quick help, data on stdout alone, honest dry runs, no shadows."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zarr

import ghoststore
from ghoststore.cli import COMMANDS
from ghoststore.lazy import importing

if TYPE_CHECKING:
    from tests.conftest import Lab

HEAVY = ("torch", "transformers", "zarr", "pyarrow", "datasets", "numpy")

HELP = """
import contextlib, io, json, sys
from ghoststore.cli import main
said = {}
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main([*command, "--help"])
        except SystemExit as end:
            heavy = [name for name in sys.modules if name in json.loads(sys.argv[2])]
            said[" ".join(command)] = [end.code, heavy, out.getvalue()]
print(json.dumps(said))
"""


def test_help(tmp_path: Path) -> None:
    """Of the program and of each command: it works, and loads nothing heavy."""
    commands = [[], *([name] for name in COMMANDS)]
    words = [sys.executable, "-c", HELP, json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    said = json.loads(done.stdout)
    assert len(said) == len(commands)
    for command, (code, heavy, text) in said.items():
        assert (code, heavy) == (0, []), command
        assert text.startswith(f"Usage: ghoststore {command}".strip())
    for name, line in COMMANDS.items():
        assert name in said[""][2]
        assert line[:40] in said[""][2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    import importlib

    import click

    found = importlib.import_module(f"ghoststore.cli.{command.replace('-', '_')}").command
    assert isinstance(found, click.Command)
    assert found.help
    for parameter in found.params:
        assert isinstance(parameter, click.Option), f"{command}: {parameter.name} is no option"
        assert parameter.help, f"{command} {parameter.opts} has no help"


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    code = f"import ghoststore, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"


UNUSED = ("torch", "transformers", "pyarrow", "datasets", "pandas", "matplotlib", "faiss")


@pytest.mark.parametrize(
    ("functions", "unused"),
    [
        (("info", "scores", "watch", "verify", "export"), UNUSED),
        pytest.param(("query", "select"), UNUSED[2:], marks=pytest.mark.slow),
    ],
)
def test_what_a_function_imports(functions: tuple[str, ...], unused: tuple[str, ...], tmp_path: Path) -> None:
    """What it uses. The collector of garbage, which waits meanwhile, is as it was, and keeps nothing of the user's."""
    code = (
        "import gc, sys, ghoststore; frozen = gc.get_freeze_count(); "
        f"assert all(getattr(ghoststore, name) for name in {functions}); "
        f"print([name for name in {unused} if name in sys.modules], gc.isenabled(), gc.get_freeze_count() - frozen)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[] True 0"


def test_the_collector_waits_for_imports() -> None:
    for before in (True, False):
        gc.enable() if before else gc.disable()
        with importing(), importing():
            assert not gc.isenabled()
        with pytest.raises(ImportError), importing():
            raise ImportError
        assert gc.isenabled() is before
    gc.enable()


def test_a_command_looks_through_its_imports_once_at_most(built: Path) -> None:
    """What was imported is kept for as long as the process lives, which is as long as the command."""
    code = (
        "import gc, sys, ghoststore.cli\n"
        "try: ghoststore.cli.main(sys.argv[1:])\n"
        "except SystemExit: print(gc.isenabled(), gc.get_freeze_count() > 10_000)"
    )
    words = [sys.executable, "-c", code, "info", "--store", built]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True True"


@pytest.mark.parametrize("how", [["--version"], ["-m", "ghoststore", "--version"]], ids=["script", "module"])
def test_version(how: list[str], tmp_path: Path) -> None:
    start = [sys.executable] if how[0] == "-m" else [str(Path(sys.executable).parent / "ghoststore")]
    if not Path(start[0]).exists():
        pytest.skip("ghoststore is not installed as a script here")
    done = subprocess.run([*start, *how], capture_output=True, text=True, cwd=tmp_path, check=True)
    first, *rest = done.stdout.splitlines()
    assert first == f"ghoststore {ghoststore.__version__}"
    versions = dict(line.split(" ", 1) for line in rest)
    assert list(versions)[:5] == ["python", "torch", "transformers", "zarr", "numpy"]
    assert set(versions) - {"faiss-cpu", "faiss-gpu"} == set(list(versions)[:5])
    assert versions["zarr"] == zarr.__version__
    assert "not installed" not in done.stdout


@pytest.mark.parametrize(
    ("name", "command"), [("query.py", "query"), ("indexer.py", "build"), ("query/__init__.py", "info")]
)
def test_a_file_that_hides_a_package_of_ours(lab: Lab, name: str, command: str, tmp_path: Path) -> None:
    """The error names the user's file, which is not run."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise SystemExit('the file of the user was run')\n")
    words = {
        "query": ["--store", "s", "--val-set", "v"],
        "build": ["--store", "s", "--data", "d", "--checkpoint", "c"],
        "info": ["--store", "s"],
    }
    done = subprocess.run(
        [sys.executable, "-m", "ghoststore", command, *words[command]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert str(file) in done.stderr
    assert "rename that file or folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("use", ["ghoststore.query", "from ghoststore import build"])
def test_a_file_that_hides_a_package_of_ours_in_python(use: str, tmp_path: Path) -> None:
    """Beside a script, or as the script itself, which may have been imported by its user before."""
    (tmp_path / "query.py").write_text("raise SystemExit('the file of the user was run')\n")
    code = f"import ghoststore\ntry:\n    {use}\nexcept ImportError as error:\n    print(error)"
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert str(tmp_path / "query.py") in done.stdout
    (tmp_path / "query.py").write_text(code)
    for script in ("query.py", "imports.py"):
        (tmp_path / "imports.py").write_text("import query")
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert f"{tmp_path / 'query.py'} hides ghoststore's own package 'query'" in done.stdout


def test_the_console_script_does_not_look_in_the_folder(built: Path, tmp_path: Path) -> None:
    """Only where PYTHONPATH says so; then its error is that of the others."""
    script = Path(sys.executable).parent / "ghoststore"
    if not script.exists():
        pytest.skip("ghoststore is not installed as a script here")
    (tmp_path / "query.py").write_text("raise SystemExit('the file of the user was run')\n")
    words = [str(script), "info", "--store", str(built)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path / 'query.py'} hides ghoststore's own package 'query'" in done.stderr


def test_json_is_all_of_stdout(lab: Lab, built: Path, tmp_path: Path) -> None:
    """For every command that has it, progress bars and notes included: they are on stderr."""
    val = lab.write(tmp_path / "val.jsonl", [{"text": "the cat"}, {"text": ""}])
    store = tmp_path / "store"
    words = ["build", "--checkpoint", lab.checkpoint, "--data", lab.corpus, "--store", store, "--json"]
    dry, build = lab.run(*words, "--dry-run"), lab.run(*words)
    query = lab.run("query", "--store", store, "--val-set", val, "--json")
    info, one = (lab.run("info", "--store", store, "--json", *part) for part in ([], ["--part", "model-corpus"]))
    verify = lab.run("verify", "--store", store, "--json")
    for outcome in (dry, build, query, info, one, verify):
        assert outcome.code == 0, outcome.err
        assert isinstance(outcome.json, dict)
    assert "building" in build.err
    assert "note: val rows left out: 1 empty; 1 are used" in query.err
    assert build.json["statuses"] == {"ok": 27}
    assert info.json["parts"][0]["manifest"] == build.json["manifest"]
    assert verify.json["sound"] is True


def test_tables_are_on_stdout(lab: Lab, built: Path) -> None:
    quiet = lab.run("query", "--store", built, "--val-set", lab.corpus, "--top-k", "3", "--quiet")
    assert quiet.err == ""
    assert quiet.out.startswith("nearest to the val set's mean gradient\n")
    assert "row-" in quiet.out
    assert "27" in lab.run("info", "--store", built).out
    assert "sha256:" in lab.run("info", "--store", built, "--part", "part").out
    assert lab.run("verify", "--store", built, "--quiet").out.startswith("sound: 1 part(s), 5 spans")


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("options", "exists"),
    [([], True), (["--proj-dtype", "float16", "--span-rows", "10"], False), (["--proj-rank-total", "16"], True)],
)
def test_a_dry_run_says_what_would_be_and_writes_nothing(
    lab: Lab, tmp_path: Path, options: list[str], exists: bool
) -> None:
    """Rows, tokens, D, memory, and the bytes on the disk to the byte, ids and texts aside."""
    store = tmp_path / "store"
    if exists:
        assert lab.build(store, *options, "--dry-run").code == 0
        assert not store.exists()  # where there is none, none is made, whether or not something is learned
        ghoststore.Store.create(store)
    before = lab.tree(tmp_path)
    dry = lab.build(store, *options, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert lab.tree(tmp_path) == before
    assert store.exists() == exists
    said = dry.json
    assert said["dry_run"] is True
    assert said["memory_bytes"] > 0
    assert set(said["seconds"]) == {"learning", "compute"}
    assert min(said["seconds"].values()) > 0
    real = lab.build(store, *options, "--json").json
    assert real["seconds"]["total"] > real["seconds"]["learning"] > 0
    same = ("rows", "tokens", "dimension", "layers", "coverage", "bytes_on_disk", "part", "memory_bytes")
    assert {name: said[name] for name in same} == {name: real[name] for name in same}
    part = ghoststore.Store.open(store).part()
    assert (said["rows"], part.encoding.columns(said["dimension"])) == part.array("vectors").shape
    assert said["tokens"] == int(part.array("n_tokens")[...].sum())
    numeric = [spec.name for spec in part.layout.arrays() if spec.dtype is not str]
    assert "sample_id" not in numeric
    sizes = [path.stat().st_size for name in numeric for path in (part.path / name / "c").rglob("*") if path.is_file()]
    assert said["bytes_on_disk"] == sum(sizes)
    table = lab.build(store, *options, "--dry-run")
    for what in ("rows", "tokens", "dimension", "on disk", "memory"):
        assert what in table.out
    assert not re.search("^time", table.out, re.MULTILINE)  # all is built


@pytest.mark.slow
def test_the_time_is_said_by_kind_of_work(lab: Lab, tmp_path: Path) -> None:
    plain, number = ["--proj-precondition", "none"], r"[0-9.]+ s"
    split = f"{number}: learning the projection {number}, building {number}"
    assert re.search(f"time +about {split}", lab.build(tmp_path / "store", "--dry-run").out)
    assert re.search(f"time +about {number}: building", lab.build(tmp_path / "store", *plain, "--dry-run").out)
    assert re.search(f"time +{split}", lab.build(tmp_path / "store").out)
    assert "learning" not in lab.build(tmp_path / "store").out  # nothing is learned again
    assert "learning" not in lab.build(tmp_path / "other", *plain).out


def test_names_of_parts_by_default(lab: Lab, tmp_path: Path) -> None:
    """They say what the part is made of."""
    words = ["--checkpoint", lab.checkpoint, "--data", lab.corpus, "--store", tmp_path / "store", "--json"]
    outcome = lab.run("build", *words)
    assert outcome.json["part"] == "model-corpus"
    assert [name for name, _ in zarr.open_group(tmp_path / "store/parts", mode="r").groups()] == ["model-corpus"]
