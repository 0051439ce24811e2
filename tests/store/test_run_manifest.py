"""The manifest of a run: another run is refused, and so are damaged and hostile ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import CorruptError, GhostStoreError, MismatchError, UsageError
from ghoststore.store import Store, create_run
from ghoststore.store.base.records import json_digest
from tests.support.runs import LAYOUT, files, make, manifest, row_table

if TYPE_CHECKING:
    pass

STEPS = list(range(LAYOUT.steps))
ARRAYS = [spec.name for spec in LAYOUT.arrays()]
COLUMNS = [spec.name.removeprefix("rows/") for spec in LAYOUT.row_arrays()]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"model": {"architecture": "GPT2-Small", "layers": 2}}, "stored 'GPT2-Tiny', asked for 'GPT2-Small'"),
        ({"training": {"seed": 1, "learning_rate": 0.001}}, "training.seed: stored 0, asked for 1"),
        ({"training": {"seed": 0}}, "training.learning_rate: stored 0.001, asked for None"),
        ({"val": {"fingerprint": "sha256:w"}}, "val.fingerprint: stored 'sha256:v', asked for 'sha256:w'"),
        ({"storage": replace(LAYOUT, span_steps=4).to_json()}, "storage.span_steps: stored 5, asked for 4"),
        ({"storage": replace(LAYOUT, groups=("law",)).to_json()}, r"groups: stored .*'code'\], asked for \['law'\]"),
    ],
)
def test_another_run_of_the_same_name_is_refused(run_store: Path, section: dict[str, Any], words: str) -> None:
    before = files(run_store)
    with pytest.raises(MismatchError, match=words) as caught:
        make(run_store, **section)
    assert "run 'run' of" in str(caught.value)
    assert "was trained with other settings; nothing was changed" in str(caught.value)
    assert files(run_store) == before


def test_what_only_describes_a_run_may_differ(run_store: Path) -> None:
    before = files(run_store)
    storage = {**LAYOUT.to_json(), "groups": ("law", "code")}  # as JSON it is the same
    run = make(run_store, software={"python": "4"}, source={"data": "moved.jsonl"}, storage=storage)
    assert run.manifest == manifest()
    assert files(run_store) == before


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"training": {"seed": np.float32(1)}}, "not plain JSON"),
        ({"training": {"learning_rate": float("nan")}}, "not plain JSON"),
        ({"storage": {"steps": 1}}, "in its storage or corpus"),
        ({"corpus": {}}, "in its storage or corpus"),
    ],
)
def test_manifests_that_cannot_be(tmp_path: Path, section: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(tmp_path / "store", **section)
    lacking = {name: value for name, value in manifest().items() if name != "val"}
    with pytest.raises(UsageError, match=r"lacks the sections \['val'\]"):
        create_run(Store.open(tmp_path / "store").run_path("run"), lacking, row_table())


def reseal(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a run's attributes as one who knows the checksums would."""
    path = store / "runs/run/zarr.json"
    metadata = json.loads(path.read_text())
    attributes = metadata["attributes"]
    change(attributes)
    attributes["manifest_sha256"] = json_digest(attributes["manifest"])
    attributes["files_sha256"] = json_digest(attributes["files"])
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    "storage",
    [
        {"steps": 10**18},
        {"steps": 10**18, "span_steps": 10**18},
        {"steps": 10**18, "span_steps": 1},
        {"steps": -1},
        {"ranks": 10**15},
        {"dimension": 10**15},
        {"groups": "law"},
        {"blocks": None},
        {"steps": None},
        {"steps": float("inf")},
        {"batch": []},
        {"groups": ["x", "x"]},
    ],
)
def test_hostile_shapes(run_store: Path, storage: dict[str, Any]) -> None:
    """Refused when the run is opened or read, before memory is taken for them."""
    reseal(run_store, lambda attributes: attributes["manifest"]["storage"].update(storage))
    with pytest.raises((CorruptError, MismatchError)):
        Store.open(run_store).run().read("score", 0, 5)
    assert not ghoststore.verify(run_store).sound or "steps" in storage


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["manifest"].pop("scoring"),
        lambda a: a["manifest"].update(storage=[]),
        lambda a: a.update(files=[]),
        lambda a: a.update(manifest=3),
        lambda a: a.update(ghoststore_format=2),
    ],
)
def test_damaged_manifests(run_store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    reseal(run_store, change)
    with pytest.raises((CorruptError, MismatchError)):
        Store.open(run_store).run()


def test_a_part_is_not_a_run(run_store: Path, built: Path) -> None:
    shutil.copytree(built / "parts/part", run_store / "runs/other")
    with pytest.raises(CorruptError, match=r"lacks the sections .* of a run's manifest"):
        Store.open(run_store).run("other")


def test_files_outside_the_run(run_store: Path) -> None:
    """Neither named by a seal nor linked to are they read."""
    reseal(run_store, lambda attributes: attributes["files"].update({"../../../outside": "0" * 64}))
    assert any("outside the run" in damage.problem for damage in ghoststore.verify(run_store).damage)
    chunk = run_store / "runs/run/rows/domain/c/0"
    chunk.unlink()
    chunk.symlink_to("/dev/zero")
    with pytest.raises(CorruptError):
        Store.open(run_store).run().rows.read("domain", 0, 1)


@pytest.mark.thin
@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'{"attributes": 3}', b"[" * 100_000, b"\xff\xfe"])
@pytest.mark.parametrize("file", ["zarr.json", "commits/00000000.json"])
def test_hostile_json(run_store: Path, file: str, data: bytes) -> None:
    (run_store / "runs/run" / file).write_bytes(data)
    with pytest.raises(GhostStoreError):
        ghoststore.info(run_store)
    assert not ghoststore.verify(run_store).sound
