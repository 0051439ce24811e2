"""What the tests of `ghoststore select` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import ghoststore


def select(store: Path, val: Path, out: Path, **options: Any) -> ghoststore.SelectReport:
    """``ghoststore.select`` on the CPU."""
    return ghoststore.select(store=store, val_set=val, out=out, device="cpu", **options)


def listed(report: ghoststore.SelectReport) -> list[dict[str, Any]]:
    """The list of rows that lies beside the report."""
    return [json.loads(line) for line in Path(report.rows_file).read_text().splitlines()]


def source_rows(report: ghoststore.SelectReport) -> list[int]:
    """The rows that were written, in their order."""
    return [entry["source_row"] for entry in listed(report)]


def score_of(store: Path, val: Path, **options: Any) -> np.ndarray:
    """(samples,): the score of each by ``ghoststore.query``, the largest of its windows; NaN without one."""
    found = ghoststore.query(store=store, val_set=val, top_k=10**6, text=False, device="cpu", **options)
    part = ghoststore.Store.open(store).part(options.get("part"))
    score = np.full(int(part.read("source_row", 0, part.layout.rows).max()) + 1, -np.inf)
    for hit in found.results[0].hits:
        score[hit.source_row] = max(score[hit.source_row], hit.score)
    return np.where(np.isfinite(score), score, np.nan)


def top(score: np.ndarray, count: int) -> list[int]:
    """The ``count`` samples with the highest scores, in the order of the corpus; equal scores by lower row."""
    usable = np.flatnonzero(np.isfinite(score))
    return sorted(usable[np.lexsort((usable, -score[usable]))][:count].tolist())
