"""Which ids of a run's row table do not tell samples apart."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ghoststore.store import Run


def repeated_among(run: Run, names: Collection[str]) -> set[str]:
    """Those of ``names`` that more than one sample of ``run`` has. Windows of one sample are one.

    One pass over the ids, a chunk in memory at a time; it ends where all are known to repeat.
    """
    first: dict[str, int] = {}
    found: set[str] = set()
    if run.repeated_ids is None:
        return found
    rows, size = len(run.rows), run.layout.row_arrays()[0].chunk_rows
    for start in range(0, rows, size):
        ids, sources = (run.rows.read(name, start, min(start + size, rows)) for name in ("sample_id", "source_row"))
        for name in [name for name in names if name not in found]:
            mine = sources[ids == name]
            if len(mine) and np.any(mine != first.setdefault(name, int(mine[0]))):
                found.add(name)
        if len(found) == len(names):
            break
    return found
