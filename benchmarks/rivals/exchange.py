"""What the scripts of this folder agree on: the files of a job, and how a script is called.

A script runs in the Python of its rival, so that this file imports nothing but the standard library and numpy, which
every rival has. ``python SCRIPT WAY PHASE JOB WORK`` runs one way of scoring: WAY is a name in the script's ``WAYS``,
JOB the folder of what all ways share, WORK a folder of its own. PHASE is

``start``
    import what the way needs, and load the model: what a process costs before it does anything;
``build``
    what can be done before there is a question, and is kept;
``query``
    from what ``build`` left, the scores of all rows for all val rows.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Step = Callable[["Job"], None]


class Phases(NamedTuple):
    """What one way does in each phase."""

    start: Step
    build: Step
    query: Step


class Job:
    """The files of one job, and the folder of one way.

    ``rows`` and ``val`` are JSON lines with ``id``, ``text``, ``input_ids`` and ``labels``: tokens that are cut to the
    longest row, and labels that are -100 where a token is no target (of a prompt). ``data`` and ``val_set`` are the
    corpora that they were made from.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self.rows, self.val = folder / "rows.jsonl", folder / "val_rows.jsonl"
        self.settings: dict[str, Any] = json.loads((folder / "job.json").read_text())
        self.checkpoint = Path(self.settings["checkpoint"])
        self.data, self.val_set = Path(self.settings["data"]), Path(self.settings["val_set"])

    def read(self, path: Path) -> list[dict[str, Any]]:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def count(self, path: Path) -> int:
        with path.open(encoding="utf-8") as lines:
            return sum(1 for _ in lines)

    def keep(self, row_bytes: float | None) -> None:
        """Say what is kept of a row; None where nothing is, and every query passes over the corpus."""
        (self.work / "kept.json").write_text(json.dumps({"row_bytes": row_bytes}))

    def seconds(self, *, query: float, build: float | None = None) -> None:
        """CPU seconds in the place of those of a process: of a way whose phases are not processes of their own."""
        (self.work / "told.json").write_text(json.dumps({"build": build, "query": query}))

    def answer(self, scores_VN: Any) -> None:
        """(val rows, rows): the more, the more a row helps."""
        np.save(self.work / "scores.npy", np.asarray(scores_VN, dtype=np.float64))


def folder_bytes(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(ways: Mapping[str, Phases], arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    way, phase, folder, work = arguments or sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    job = Job(Path(folder), Path(work))
    job.work.mkdir(parents=True, exist_ok=True)
    getattr(ways[way], phase)(job)
