"""A build that was interrupted, and whose corpus grew at its end before it went on: it finishes what it had begun, with
the bytes of a build that was not interrupted, and names the command for the new rows.
"""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import ghoststore
from ghoststore.errors import MismatchError
from ghoststore.store import Store
from tests.support.parts import unbuild, vectors_of

if TYPE_CHECKING:
    from tests.conftest import Lab, Outcome

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("corpus.jsonl", ()),
    "packed": ("corpus.jsonl.gz", ("--keep-fields", "source", "--store-text")),
    "windows": ("corpus.jsonl", ("--max-length", "6", "--overlong", "window", "--proj-dtype", "int8")),
    "limited": ("corpus.jsonl", ("--skip-samples", "3", "--max-samples", "100")),
}
KILLED = {"call": "name", "path": r"00000002\.json$", "when": "before", "act": "kill"}
MORE = [{"id": f"new-{i}", "text": f"the new river {i} runs", "domain": "sea", "source": "s9"} for i in range(5)]


def write(lab: Lab, data: Path, rows: list[dict[str, Any]]) -> None:
    lab.write(data, rows)
    if data.suffix == ".gz":
        data.write_bytes(gzip.compress(data.read_bytes()))


def rows_of(lab: Lab) -> list[dict[str, Any]]:
    return [row | {"source": f"s{place % 3}"} for place, row in enumerate(lab.rows)]


def build(lab: Lab, folder: Path, case: str, store: str = "store", **order: Any) -> Outcome:
    name, options = CASES[case]
    return lab.build(folder / store, "--data", folder / name, *options, **order)


@pytest.mark.kill
@pytest.mark.thin(1)
@pytest.mark.parametrize("case", CASES)
def test_finishes_what_it_had_begun(lab: Lab, tmp_path: Path, case: str) -> None:
    data = tmp_path / CASES[case][0]
    write(lab, data, rows_of(lab))
    assert build(lab, tmp_path, case, "whole").code == 0
    killed = build(lab, tmp_path, case, fault=KILLED)
    assert killed.code == -9, killed.err
    write(lab, data, [*rows_of(lab), *MORE])
    finished = build(lab, tmp_path, case)
    assert finished.code == 0, finished.err
    assert lab.tree(tmp_path / "store") == lab.tree(tmp_path / "whole")
    assert "has grown" in finished.out
    (command,) = [line for line in finished.out.splitlines() if "build --like part" in line]
    added = lab.run(*shlex.split(command)[1:])
    assert added.code == 0, added.err
    part = Store.open(tmp_path / "store").part("part-from-27")
    assert {part.read_rows("sample_id", [row])[0] for row in range(part.rows)} == {row["id"] for row in MORE}
    # What is named for the part that is now complete is the same.
    refused = build(lab, tmp_path, case)
    assert refused.code == MismatchError.exit_code
    (again,) = [line for line in refused.err.splitlines() if "build --like part" in line]
    assert again.split(" --max")[0].strip() == command.split(" --max")[0].strip()


def test_a_row_that_is_being_written_does_not_hinder(lab: Lab, tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    write(lab, data, rows_of(lab))
    assert build(lab, tmp_path, "plain").code == 0
    unbuild(Store.open(tmp_path / "store").part(), 1, 3)
    with data.open("a") as file:
        file.write('{"id": "half", "te')
    report = ghoststore.build(
        checkpoint=lab.checkpoint, data=data, store=tmp_path / "store", name="part", span_rows=6, device="cpu"
    )
    assert (report.resumed_rows, report.rows_built) == (15, 12)
    assert "--skip-samples 27" in str(report.new_rows)


def test_a_corpus_that_did_not_grow_offers_nothing(lab: Lab, tmp_path: Path) -> None:
    data = tmp_path / "corpus.jsonl"
    write(lab, data, rows_of(lab))
    told = json.loads(lab.build(tmp_path / "store", "--data", data, "--max-samples", "20", "--json").out)
    assert told["new_rows"] is None
    unbuild(Store.open(tmp_path / "store").part(), 1)
    completed = lab.build(tmp_path / "store", "--data", data, "--max-samples", "20", "--json")
    assert completed.json["new_rows"] is None  # no more was asked for
    assert completed.json["rows_built"] == 6


def test_another_corpus_or_number_of_samples_is_refused(lab: Lab, tmp_path: Path) -> None:
    """Nothing is written, and the advice helps."""
    data, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    write(lab, data, rows_of(lab))
    assert lab.build(store, "--data", data, "--max-samples", "20").code == 0
    unbuild(Store.open(store).part(), 1)
    before = lab.tree(store)
    more = lab.build(store, "--data", data)
    assert more.code == MismatchError.exit_code
    assert "part 'part' is not complete: with --max-samples 20 this build completes it" in more.err
    changed = rows_of(lab)
    changed[19]["text"] = "other words"
    write(lab, data, [*changed, *MORE])
    other = lab.build(store, "--data", data, "--max-samples", "20")
    assert other.code == MismatchError.exit_code
    assert "corpus.fingerprint" in other.err
    assert lab.tree(store) == before
    write(lab, data, [*rows_of(lab), *MORE])
    assert lab.build(store, "--data", data, "--max-samples", "20").code == 0


@pytest.mark.thin(1)
@pytest.mark.parametrize("learned", [False, True])
def test_a_part_is_repaired_where_its_corpus_grew(lab: Lab, tmp_path: Path, learned: bool) -> None:
    """Its rows, and what its projection has learned from them, are those of then."""
    data, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    write(lab, data, rows_of(lab))
    assert lab.build(store, "--data", data).code == 0
    before, part = lab.tree(store), Store.open(store).part()
    vectors = np.array(vectors_of(part))
    lost = ["vectors/c/2/0", *(name for name in part.files if learned and name.startswith("preconditioner_in/c"))]
    for name in lost:
        (part.path / name).unlink()
    write(lab, data, [*rows_of(lab), *MORE])
    report = ghoststore.repair(store=store, device="cpu")
    assert report.sound, report.unmended
    np.testing.assert_array_equal(vectors_of(Store.open(store).part()), vectors)
    assert lab.tree(store) == before
