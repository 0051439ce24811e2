"""Writing the exact gradients of rows to a folder: the space they need, the files that are missing, and the report.

Legend: B rows of a file, P numbers of a gradient.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghoststore.errors import StorageError, UsageError
from ghoststore.progress import Progress
from ghoststore.store import Status
from ghoststore.store.base.manifest import Manifest
from indexer.encode.tokens import Row
from query.exact.files import GradientFiles, file_name
from query.exact.gradients import ExactGradients


@dataclass(frozen=True, slots=True, kw_only=True)
class FullGradientsReport:
    """What ``ghoststore.full_gradients`` has written or, after a dry run, would write."""

    out: str
    samples: int
    rows: int
    tokens: int
    numbers: int
    """Numbers of one gradient."""
    parameters: int
    """Number of parameters (tensors) in one gradient."""
    dtype: str
    files: int
    resumed_files: int
    """Number of files that existed before this call."""
    bytes_on_disk: int
    """Bytes of all gradients together."""
    memory_bytes: int
    """Memory beside the model and its activations: the gradients of a file twice, and one gradient in the model's
    dtype.
    """
    dry_run: bool
    statuses: dict[str, int] = field(default_factory=dict)
    """Number of rows by status. A row that is not usable has a gradient of zeros."""
    seconds: float = 0.0
    manifest: Manifest = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore full-gradients --json`` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RowsRead:
    """The rows to write, and the number and the fingerprint of their samples."""

    rows: list[Row]
    samples: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class GradientsJob:
    """A resolved request: the rows, the parameters, and the manifest of the folder."""

    exact: ExactGradients
    read: RowsRead
    manifest: Manifest
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored gradient."""
        return self.exact.numbers * self.dtype.itemsize

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first row, one past the last) of each file."""
        rows, size = len(self.read.rows), self.manifest["rows_per_file"]
        return [(start, min(start + size, rows)) for start in range(0, rows, size)]

    def report(self, out: Path, *, dry_run: bool, resumed: int, seconds: float = 0.0) -> FullGradientsReport:
        """The report, as far as it is known without the files."""
        widest = max(stop - start for start, stop in self.blocks)
        gradient_bytes = self.exact.numbers * next(iter(self.exact.parameters.values())).dtype.itemsize
        return FullGradientsReport(
            out=str(out),
            samples=self.read.samples,
            rows=len(self.read.rows),
            tokens=sum(len(row.tokens) for row in self.read.rows),
            numbers=self.exact.numbers,
            parameters=len(self.exact.parameters),
            dtype=self.manifest["dtype"]["stored"],
            files=len(self.blocks),
            resumed_files=resumed,
            bytes_on_disk=len(self.read.rows) * self.row_bytes,
            memory_bytes=2 * widest * self.row_bytes + gradient_bytes,
            dry_run=dry_run,
            statuses=dict(Counter(row.status.name.lower() for row in self.read.rows)),
            seconds=seconds,
            manifest=self.manifest,
        )

    def write(self, out: Path, progress: Progress, begun: float) -> FullGradientsReport:
        """Write every missing file to the folder ``out``. ``begun`` is the time of the start, for the report."""
        self._refuse_too_large(self.report(out, dry_run=False, resumed=0).memory_bytes)
        size = self.manifest["rows_per_file"]
        with GradientFiles.writing(out, self.manifest) as files:
            finished = set(files.finished)
            missing = [(start, stop) for start, stop in self.blocks if file_name(start, size) not in finished]
            self._refuse_full_disk(out, sum(stop - start for start, stop in missing))
            rows = len(self.read.rows)
            todo = sum(stop - start for start, stop in missing)
            with closing(progress.task("exact gradients", rows, done=rows - todo)) as task:
                for start, stop in missing:
                    batch = self.read.rows[start:stop]
                    files.write((start, stop), *self._gradients(batch))
                    task.advance(stop - start, sum(len(row.tokens) for row in batch))
            statuses = Counter(status for entry in files.manifest["files"].values() for status in entry["statuses"])
            report = self.report(out, dry_run=False, resumed=len(finished), seconds=time.perf_counter() - begun)
            return replace(report, statuses=dict(statuses), manifest=files.manifest)

    def _gradients(self, rows: Sequence[Row]) -> tuple[Tensor, list[float | None], list[str]]:
        """((B, P) gradients in the stored dtype, losses, statuses). An unusable row has zeros and no loss (None)."""
        gradients = torch.zeros(len(rows), self.exact.numbers, dtype=self.dtype)
        losses: list[float | None] = [None] * len(rows)
        statuses = [row.status for row in rows]
        for place, row in enumerate(rows):
            if not row.status.usable:
                continue
            gradient = self.exact(row)
            if not gradient.finite:
                statuses[place] = Status.NOT_FINITE
                continue
            losses[place] = gradient.loss
            for part in self.exact.slices:
                gradients[place, part.start : part.stop] = gradient.parts[part.name].flatten()
            if not bool(torch.isfinite(gradients[place]).all()):
                statuses[place] = Status.OUT_OF_RANGE
                gradients[place] = 0
        return gradients, losses, [fate.name.lower() for fate in statuses]

    def _refuse_too_large(self, needed: int) -> None:
        available = physical_memory()
        if available is not None and needed > available:
            raise UsageError(
                f"gradients of {self.exact.numbers:,} numbers need {needed:,} bytes of memory beside the model; this "
                f"machine has {available:,}. Give `parameters=projected` with fewer `proj_layers`, or `dtype=bfloat16`"
            )

    def _refuse_full_disk(self, out: Path, rows: int) -> None:
        needed, free = rows * self.row_bytes, shutil.disk_usage(out).free
        if needed > free:
            raise StorageError(
                f"cannot write {out}: {rows} gradients take {needed:,} bytes, {free:,} are free there; nothing was "
                "written. Give `out` another disk, a smaller `max_samples`, or `parameters=projected`"
            )


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
