"""Runs beside parts in a store: choosing one, ``info`` and ``verify``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import CorruptError, UsageError
from ghoststore.store import Store
from tests.support.runs import LAYOUT, expected, make, train

if TYPE_CHECKING:
    from tests.conftest import Lab

STEPS = list(range(LAYOUT.steps))
ARRAYS = [spec.name for spec in LAYOUT.arrays()]
COLUMNS = [spec.name.removeprefix("rows/") for spec in LAYOUT.row_arrays()]


def test_choosing_a_run(run_store: Path, tmp_path: Path) -> None:
    opened = Store.open(run_store)
    with pytest.raises(UsageError, match="has no run 'other'; it has: run"):
        opened.run("other")
    with pytest.raises(UsageError, match=r"'\.\./run' cannot name a run"):
        opened.run("../run")
    make(run_store, "second")
    assert opened.run_names() == ["run", "second"]
    with pytest.raises(UsageError, match="has several runs; choose one with `run`: run, second"):
        opened.run()
    with pytest.raises(UsageError, match="has no runs; `ghoststore train --store"):
        Store.create(tmp_path / "empty").run()
    (run_store / "runs/second/zarr.json").unlink()
    with pytest.raises(CorruptError, match=r"zarr\.json is missing"):
        opened.run("second")


def test_a_store_of_parts_is_as_it_was(lab: Lab, built: Path) -> None:
    info = ghoststore.info(built)
    assert (len(info.parts), info.runs) == (1, [])
    report = ghoststore.verify(built)
    assert (report.sound, report.parts, report.runs, report.spans) == (True, ["part"], [], 5)
    for command in ("info", "verify"):
        assert (
            "run" not in lab.run(command, "--store", built, "--quiet" * (command == "verify") or "--json").out.split()
        )
        assert lab.run(command, "--store", built, "--run", "x").code == 2
    assert "run(s)" not in lab.run("info", "--store", built).out


def test_info_and_verify_of_runs(lab: Lab, built: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(built, tmp_path / "store"))
    train(store, stop=12)
    table = lab.run("info", "--store", store)
    assert table.code == 0, table.err
    for word in ("1 part(s)", "1 run(s)", "10 of 23", "2 × 3", "run", "40"):
        assert word in table.out
    (run,) = lab.run("info", "--store", store, "--json").json["runs"]
    scores = expected("score", list(range(10)))
    assert run["negative"] == pytest.approx((scores < 0).sum() / np.isfinite(scores).sum())
    assert run["train_loss"] == float(expected("train_loss", [9])[0])
    assert run["val_loss"] == float(expected("val_loss", [8])[0])
    assert (run["steps"], run["committed"], run["ranks"], run["batch"], run["rows"]) == (23, 10, 2, 3, 40)
    assert (run["statuses"]["scored"], run["tokens"]) == (56, sum(96 + step for step in range(10)))
    chunks = [file for name in ARRAYS for file in (store / "runs/run" / name / "c").rglob("*") if file.is_file()]
    assert run["bytes"] == sum(file.stat().st_size for file in chunks)
    full = lab.run("info", "--store", store, "--run", "run")
    for word in ("10 of 23 committed", "training.seed", "GPT2-Tiny", "law, code", "scored"):
        assert word in full.out
    assert "27 of 27" not in full.out
    assert "27 of 27" in lab.run("info", "--store", store, "--part", "part").out
    only = lab.run("verify", "--store", store, "--run", "run", "--json").json
    assert (only["parts"], only["runs"], only["spans"], only["sound"]) == ([], ["run"], 2, True)
    only = lab.run("verify", "--store", store, "--part", "part", "--json").json
    assert (only["parts"], only["runs"], only["spans"]) == (["part"], [], 5)
    assert lab.run("verify", "--store", store).out.startswith("sound: 1 part(s), 1 run(s), 7 spans")
