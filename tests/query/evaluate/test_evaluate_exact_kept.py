"""Exact scores of an evaluation are computed once and kept: resumed after a kill; damage and other data refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import query.exact.products
from ghoststore.errors import CorruptError, MismatchError
from ghoststore.progress import Silent
from query.evaluate import exact
from query.exact.gradients import ExactGradients
from tests.support.exact_scores import METHODS, SAMPLES, VAL, exact_folder, scores_of

if TYPE_CHECKING:
    from tests.conftest import Lab


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact_folder(lab, tmp_path_factory.mktemp("exact"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the samples whose gradients were computed."""
    seen: list[str] = []
    original = ExactGradients.__call__

    def count(self: ExactGradients, row: Any) -> Any:
        seen.append(row.sample.id)
        return original(self, row)

    monkeypatch.setattr(ExactGradients, "__call__", count)
    return seen


def test_one_pass_for_all_methods_and_parts(folder: Path, tmp_path: Path, calls: list[str]) -> None:
    found = scores_of(folder, tmp_path / "out")
    assert len(calls) == VAL + SAMPLES - 1
    again = scores_of(folder, tmp_path / "out", part="ranks")
    assert len(calls) == VAL + SAMPLES - 1, "another projection of the same layers"
    assert all(np.array_equal(found[method], again[method]) for method in METHODS)
    scores_of(folder, tmp_path / "out", ["exact-dot"], part="windows")
    assert len(calls) > 2 * (VAL + SAMPLES)


class Bars(Silent):
    """Keeps what is told of progress bars."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int | None, int]] = []
        self.advanced = 0

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Any:
        if description != "exact gradients":
            return super().task(description, total, done, unit)
        self.begun.append((description, total, done))
        return self

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.advanced += rows

    def close(self) -> None:
        pass


@pytest.mark.kill
def test_goes_on_where_it_was_killed(
    lab: Lab, folder: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 4 rows and 2 val samples: 3 × 6. The third block of the second val samples is cut short."""
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(lab.checkpoint).parameters())
    monkeypatch.setattr(query.exact.products, "MEMORY", 2 * 4 * numbers)
    monkeypatch.setattr(exact, "ROWS_AT_ONCE", 4)
    rows = SAMPLES - 1
    whole = scores_of(folder, tmp_path / "whole")
    assert len(calls) == VAL + 3 * rows
    counted = ExactGradients.__call__

    def killed(self: ExactGradients, row: Any) -> Any:
        if len(calls) == VAL + 3 * rows + (2 + rows) + (2 + 9):
            raise KeyboardInterrupt
        return counted(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(ExactGradients, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            scores_of(folder, tmp_path / "out")
    calls.clear()
    bars = Bars()
    found = scores_of(folder, tmp_path / "out", progress=bars)
    assert len(calls) == (2 + rows - 8) + (1 + rows), "val gradients again, and rows that are missing"
    assert bars.begun == [("exact gradients", VAL + 3 * rows, 2 + rows + 8)]
    assert bars.advanced == len(calls)
    assert lab.tree(tmp_path / "out" / "exact") == lab.tree(tmp_path / "whole" / "exact")
    assert all(found[method].tobytes() == whole[method].tobytes() for method in METHODS)
    monkeypatch.undo()
    at_once = scores_of(folder, tmp_path / "at once")
    for method in METHODS:
        np.testing.assert_allclose(found[method], at_once[method], rtol=1e-5, atol=1e-6)


def test_damaged_and_foreign(lab: Lab, folder: Path, tmp_path: Path, calls: list[str]) -> None:
    out, method = tmp_path / "out", ["exact-cosine"]
    whole = scores_of(folder, out, method)
    (block,) = out.glob("exact/*/*.npz")
    kept = block.read_bytes()
    block.write_bytes(kept[:200] + b"?" + kept[201:])
    with pytest.raises(CorruptError, match=rf"{block} is damaged .* remove it"):
        scores_of(folder, out, method)
    record = block.with_suffix(".json")
    record.write_text(record.read_text().replace("sha256", "sha265", 1))
    with pytest.raises(CorruptError, match=rf"{record} is damaged .* remove it"):
        scores_of(folder, out, method)
    record.unlink()
    calls.clear()
    assert np.array_equal(scores_of(folder, out, method)["exact-cosine"], whole["exact-cosine"])
    assert len(calls) == VAL + SAMPLES - 1
    assert block.read_bytes() == kept
    block.unlink()
    assert np.array_equal(scores_of(folder, out, method)["exact-cosine"], whole["exact-cosine"])
    scores_of(folder, out, method, part="windows")
    (other,) = set(out.glob("exact/*/*.json")) - {*block.parent.iterdir()} - {*out.glob("exact/*/manifest.json")}
    shutil.copy(other, record)
    with pytest.raises(MismatchError, match=rf"{block} is of another evaluation"):
        scores_of(folder, out, method)
    val_set = lab.write(tmp_path / "val.jsonl", [{"text": "the moon gives"}, {"text": "a new song"}])
    with pytest.raises(MismatchError, match=r"exact/\w+ was computed with other settings(.|\n)*val.fingerprint"):
        scores_of(folder, out, method, part="windows", val_set=val_set)
