"""A build of a stream, killed at commits and while its end is written: the same command goes on, to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ghoststore
from tests.conftest import sample_rows, tree, write_jsonl

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

pytestmark = pytest.mark.kill
ROWS = sample_rows(30, seed=5)
STREAM = """
import datasets
import ghoststore

stream = datasets.load_dataset("json", data_files={files!r}, split="train", streaming=True)
ghoststore.build(
    checkpoint={checkpoint!r}, data=stream, store={store!r}, name="part", span_rows=4, device="cpu", progress=Notes(),
    projection=ghoststore.ProjectionConfig(precondition="none", rank_total=64),
)
"""
NOTES = """
from ghoststore.progress import Silent

class Notes(Silent):
    def note(self, message):
        print(message)
"""
KILLS: dict[str, dict[str, Any]] = {
    "before a state": {"call": "name", "path": r"stream\.json$", "number": 3},
    "after a state": {"call": "name", "path": r"stream\.json$", "number": 4, "when": "after"},
    "before an intent": {"call": "name", "path": r"\.00000002\.intent$"},
    "before a record": {"call": "name", "path": r"commits/00000003\.json$"},
    "after a record": {"call": "name", "path": r"commits/00000003\.json$", "when": "after"},
    "after the first record": {"call": "name", "path": r"commits/00000000\.json$", "when": "after"},
    "before the last record": {"call": "name", "path": r"commits/00000007\.json$"},
    "after the last record": {"call": "name", "path": r"commits/00000007\.json$", "when": "after"},
    "between lengths of arrays": {"call": "name", "path": r"parts/part/norm/zarr\.json$", "when": "after"},
    "within the table of spans": {"call": "name", "path": r"parts/part/span_start/zarr\.json$", "when": "after"},
    "before the states are gone": {"call": "unlink", "path": r"stream\.json$"},
    "before the manifest": {"call": "name", "path": r"parts/part/zarr\.json$"},
    "after the manifest": {"call": "name", "path": r"parts/part/zarr\.json$", "when": "after"},
}

OF_FILES = [("files", moment) for moment in ("after the first record", "before a record", "before the manifest")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return [str(write_jsonl(folder / f"{at}.jsonl", ROWS[at * 10 : at * 10 + 10])) for at in range(3)]


def build(lab: Lab, files: list[str], store: Path, kind: str, **order: Any) -> Outcome:
    if kind == "stream":
        code = STREAM.format(files=files, checkpoint=str(lab.checkpoint), store=str(store))
        return lab.run(code=NOTES + code, **order)
    pattern = f"{Path(files[0]).parent}/*.jsonl"
    words = ["--stream", "--span-rows", 4, "--proj-precondition", "none", "--proj-rank-total", 64]
    return lab.build(store, "--data", pattern, *map(str, words), **order)


@pytest.fixture(scope="module")
def whole(lab: Lab, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    trees = {}
    for kind in ("stream", "files"):
        folder = tmp_path_factory.mktemp(kind)
        outcome = build(lab, files, folder / "store", kind)
        assert outcome.code == 0, outcome.err
        trees[kind] = tree(folder / "store")
    return trees


@pytest.mark.thin(3)
@pytest.mark.parametrize(("kind", "moment"), [*(("stream", moment) for moment in KILLS), *OF_FILES])
def test_killed(
    lab: Lab, files: list[str], whole: dict[str, dict[str, bytes]], tmp_path: Path, kind: str, moment: str
) -> None:
    killed = build(lab, files, tmp_path / "store", kind, fault={"act": "kill", "when": "before", **KILLS[moment]})
    assert killed.code == -9, killed.err
    (part,) = ghoststore.info(store=tmp_path / "store").parts
    assert part.committed in range(0, 31)
    assert ghoststore.verify(store=tmp_path / "store").sound
    again = build(lab, files, tmp_path / "store", kind)
    assert again.code == 0, again.err
    assert "read again" not in again.out + again.err
    ghoststore.gc(store=tmp_path / "store")
    assert tree(tmp_path / "store") == whole[kind]
