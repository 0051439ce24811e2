"""Steps that the writer of a run gave up, because the store could not be written for a while."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ghoststore.errors import CorruptError
from ghoststore.store.base.records import read_record, write_record
from ghoststore.store.run.layout import RunLayout
from ghoststore.store.run.ranges import Steps, merged

SKIPPED = "journal/skipped.json"
"""Path in the run."""
LARGEST_SKIPPED = 16 << 20
_ADVICE = "`ghoststore verify` lists what is damaged"


def read_skipped(folder: Path, layout: RunLayout) -> list[Steps]:
    """Ranges of the steps that the run in ``folder`` gave up. CorruptError if the file is damaged."""
    path = folder / SKIPPED
    if layout.save_steps is None:
        return []
    try:
        value = read_record(path, LARGEST_SKIPPED, advice=_ADVICE)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        ranges = merged((int(start), int(stop)) for start, stop in value["steps"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a list of steps ({error!r}); {_ADVICE}") from error
    if ranges and not 0 <= ranges[0][0] <= ranges[-1][1] <= layout.steps:
        raise CorruptError(f"{path} names steps beyond the {layout.steps} of the run; {_ADVICE}")
    return ranges


def write_skipped(folder: Path, skipped: Sequence[Steps]) -> None:
    """Write the steps that the run in ``folder`` gave up, in place of the earlier list."""
    write_record(folder / SKIPPED, {"steps": [list(steps) for steps in skipped]})
