"""A store from anywhere: special files, links, and sizes that it only says it has are refused, in bounded memory."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from ghoststore.errors import CorruptError
from ghoststore.store import Store
from ghoststore.store.base.opening import DEEPEST, MOST_VALUES, open_regular, parse_json, read_bounded
from ghoststore.store.base.records import FileRecord
from tests.support.bounded import refused, reseal, run_bounded
from tests.support.runs import make, train

if TYPE_CHECKING:
    from tests.conftest import Lab


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def plug(path: Path) -> None:
    """A socket, bound by a short name: one of a path has a hundred characters at most."""
    path.unlink()
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def linked(path: Path) -> None:
    """The same bytes, elsewhere."""
    elsewhere = path.parents[4] / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


FILES = [
    "zarr.json",
    "parts/part/zarr.json",
    "parts/part/commits/00000001.json",
    "parts/part/vectors/c/1/0",
    "parts/part/status/c/1",
    "parts/part/sample_id/c/1",
    "parts/part/sample_id/zarr.json",
]


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "a" / "store"))


@pytest.mark.thin(4)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [pipe, endless, folder, plug])
def test_special_files(lab: Lab, store: Path, file: str, harm: Callable[[Path], None]) -> None:
    """Neither waited for nor read without end."""
    harm(store / file)
    command = ["query", "--store", store, "--val-set", lab.corpus, "--checkpoint", lab.checkpoint, "--top-k", "100"]
    if "commits" in file:  # a query reads no record
        command = ["info", "--store", store]
    refused(run_bounded(lab, *command), str(store / file), codes=(4,))


@pytest.mark.parametrize("file", FILES[1:])
def test_no_link_inside_a_part_is_followed(lab: Lab, store: Path, file: str) -> None:
    linked(store / file)
    with pytest.raises(CorruptError, match="is a link"):
        read_all(store)


def read_all(store: Path) -> None:
    opened = Store.open(store).part()
    opened.fingerprint()
    opened.column("status")
    opened.read("vectors", 0, opened.rows)
    opened.read("sample_id", 0, opened.rows)


def test_a_folder_inside_a_part_is_no_link(store: Path) -> None:
    shutil.move(store / "parts/part/status", store.parent / "status")
    (store / "parts/part/status").symlink_to(store.parent / "status")
    with pytest.raises(CorruptError, match=r"part/status is a link"):
        Store.open(store).part().column("status")


def test_a_part_and_a_store_may_be_links(lab: Lab, store: Path, tmp_path: Path) -> None:
    shutil.move(store / "parts/part", tmp_path / "part")
    (store / "parts/part").symlink_to(tmp_path / "part")
    (tmp_path / "link").symlink_to(store)
    outcome = lab.run("query", "--store", tmp_path / "link", "--val-set", lab.corpus, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    assert len(outcome.json["results"][0]["hits"]) == 10


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a\0b", "\ud800", "n" * 5000, "", ".", "a/../../b"])
def test_names_that_no_file_of_a_part_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    part = tmp_path / "part"
    part.mkdir()
    with pytest.raises(CorruptError):
        FileRecord(bytes=1, sha256="0" * 64).check(part / name, within=part)


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(ValueError, match="too large: 5 bytes"):
        read_bounded(path, 4)
    with pytest.raises(ValueError, match="more bytes than its size says"):
        read_bounded(Path("/proc/self/status"), 1 << 20)
    with pytest.raises(CorruptError, match="a folder"):
        open_regular(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), '{"a":' * 500 + "1" + "}" * 500, "[]," * MOST_VALUES],
)
def test_json_that_nests_or_lists_too_much(text: str) -> None:
    with pytest.raises(ValueError, match=r"nests deeper|values"):
        parse_json(text.encode())


def test_json_as_deep_as_it_may_be() -> None:
    assert parse_json(("[" * DEEPEST + "]" * DEEPEST).encode())


@pytest.mark.thin(1)
@pytest.mark.parametrize("text", [b"[" * (60 << 20), b'{"attributes": {"manifest": [' + b"[]," * (20 << 20) + b"[]]}}"])
def test_a_large_metadata_file(lab: Lab, store: Path, text: bytes) -> None:
    (store / "parts/part/zarr.json").write_bytes(text)
    refused(run_bounded(lab, "info", "--store", store), "zarr.json", codes=(4,))


SECTIONS = [
    ("corpus", {}, "corpus.domains"),
    ("storage", [], "storage"),
    ("checkpoint", None, "checkpoint"),
    ("tokens", {}, "tokens.max_length"),
    ("projection", {}, "projection.layers"),
    ("layers", {}, "layers"),
    ("layers", [1], "layers"),
    ("batching", {"batch_tokens": "many", "padding": True}, "batching.batch_tokens"),
    ("source", {}, "source.checkpoint"),
    ("compute", 7, "compute"),
    ("coverage", {"share": "all"}, "coverage.share"),
    ("corpus", {"domains": None, "repeated_ids": {}}, "corpus.repeated_ids.ids"),
    ("software", [], "software"),
]


@pytest.mark.parametrize(("section", "value", "named"), SECTIONS)
def test_sections_of_a_manifest(lab: Lab, store: Path, section: str, value: Any, named: str) -> None:
    """Named when the part is opened, and no traceback later."""
    reseal(store / "parts/part", lambda attributes: attributes["manifest"].update({section: value}))
    with pytest.raises(CorruptError, match=rf"'{named}'|storage section"):
        Store.open(store).part()


def test_a_section_is_refused_by_every_command(lab: Lab, store: Path) -> None:
    reseal(store / "parts/part", lambda attributes: attributes["manifest"].update(corpus={}))
    for command in (["info", "--store", store], ["query", "--store", store, "--val-set", lab.corpus]):
        refused(lab.run(*command), "lacks 'corpus.", codes=(4,))


STORAGE: list[dict[str, Any]] = [
    {"rows": 10**9},
    {"rows": 10**9, "span_rows": 10**9, "dimension": 1, "groups": [["a", 0, 1]], "chunk_rows": 31_250_000},
    {"rows": 10**9, "span_rows": 10**9, "chunk_rows": 1},
    {"rows": 10**9, "span_rows": 10**9, "chunk_rows": 100_000},
    {"dimension": 10**12, "groups": [["a", 0, 10**12]]},
    {"dimension": 30_000_000, "groups": [["a", 0, 30_000_000]], "chunk_rows": 1, "span_rows": 6},
    {"dtype": "onebit", "dimension": 30_000_000, "groups": [["a", 0, 30_000_000]], "chunk_rows": 6},
    {"groups": [["a", 0, 10**8], ["b", 5, 9]]},
    {"groups": [["a", 0]]},
    {"groups": 5},
    {"rows": 10**30},
    {"span_rows": 0},
    {"rows": True, "span_rows": None},
]


@pytest.mark.thin(3)
@pytest.mark.parametrize("place", range(len(STORAGE)))
@pytest.mark.parametrize("command", ["self-influence", "query", "index"])
def test_sizes_that_nothing_bears_out(lab: Lab, store: Path, place: int, command: str) -> None:
    """A manifest of a gigabyte of rows over a kilobyte of files."""
    reseal(store / "parts/part", lambda attributes: attributes["manifest"]["storage"].update(STORAGE[place]))
    words: list[str | Path] = [command, "--store", store, "--quiet"]
    if command == "query":
        words += ["--val-set", lab.corpus, "--checkpoint", lab.checkpoint, "--precondition", "second-moment"]
    refused(run_bounded(lab, *words))


RUNS: list[dict[str, Any]] = [
    {"steps": 10**12},
    {"steps": 10**12, "span_steps": 10**12},
    {"steps": 10**12 + 39, "span_steps": 10**12 + 39},  # a prime
    {"steps": 10**8, "span_steps": 10**8},
    {"rows": 10**9},
    {"ranks": 10**9},
    {"batch": 10**6},
    {"dimension": 10**12},
    {"groups": ["law", *map(str, range(200_000))]},
]
SHOWN = {"scores": (8,), "watch": (8,), "info": (4,)}
"""Those of which enough is there, or which ask for little."""


@pytest.mark.thin(2)
@pytest.mark.parametrize("place", range(len(RUNS)))
@pytest.mark.parametrize("command", ["scores", "watch", "info"])
def test_runs_that_nothing_bears_out(lab: Lab, tmp_path: Path, place: int, command: str) -> None:
    store = tmp_path / "store"
    make(store)
    train(store)
    reseal(store / "runs/run", lambda attributes: attributes["manifest"]["storage"].update(RUNS[place]))
    words = {"scores": ["scores", "--store", store], "watch": ["watch", "--once", "--store", store]}
    outcome = run_bounded(lab, *words.get(command, ["info", "--store", store]))
    if place in SHOWN[command]:  # what is there may be all that a longer run has so far
        assert outcome.code == 0, outcome.err
        return
    refused(outcome, codes=(3, 4))


def test_an_array_that_was_made_with_the_part(lab: Lab, store: Path) -> None:
    """Its metadata tell of more numbers than its chunk holds, which would be zeros."""
    part = store / "parts/part"
    path = part / "span_start/zarr.json"
    path.write_text(path.read_text().replace('"shape": [\n    5,', '"shape": [\n    1000000000,', 1))
    assert "1000000000" in path.read_text()
    sha256 = FileRecord.of(path).sha256
    reseal(part, lambda attributes: attributes["files"].update({"span_start/zarr.json": sha256}))
    refused(
        run_bounded(
            lab,
            "build",
            "--checkpoint",
            lab.checkpoint,
            "--data",
            lab.corpus,
            "--store",
            store,
            "--span-rows",
            "6",
            "--name",
            "part",
            "--quiet",
        ),
        "span_start",
        codes=(4,),
    )


def test_strings_that_claim_to_be_many(lab: Lab, store: Path) -> None:
    """A chunk of ids says how many it has: 4 billion pointers."""
    path = store / "parts/part/sample_id/c/0"
    path.write_bytes(b"\xff\xff\xff\xff" + path.read_bytes()[4:])
    words = ["query", "--store", store, "--val-set", lab.corpus, "--checkpoint", lab.checkpoint, "--top-k", "100"]
    refused(run_bounded(lab, *words), str(path), "strings", codes=(4,))


def test_codecs_that_make_much_of_little(store: Path) -> None:
    part = store / "parts/part"
    path = part / "sample_id/zarr.json"
    path.write_text(path.read_text().replace('"crc32c"', '"gzip"'))
    reseal(part, lambda a: a["files"].update({"sample_id/zarr.json": FileRecord.of(path).sha256}))
    with pytest.raises(CorruptError, match="codecs that are not ours"):
        Store.open(store).part().read("sample_id", 0, 1)


def test_a_sound_store_stays_sound(built: Path) -> None:
    assert ghoststore.verify(built).sound
