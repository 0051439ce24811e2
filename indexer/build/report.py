"""The report of a build."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ghoststore.store import Manifest

BUILDING = "building"
"""What a task of progress is called whose rows are those of spans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What ``ghoststore.build`` returns: what the build has done or, after a dry run, would do."""

    store: str
    part: str
    rows: int
    """Rows of the part."""
    tokens: int | None
    """Tokens in all rows; None if they were not counted."""
    layers: int
    coverage: float
    """Share of the model's parameters that are in the projected layers, 0 to 1."""
    dimension: int
    bytes_on_disk: int
    """Bytes of the part's chunks, without texts and ids."""
    memory_bytes: int
    """Estimate of the build's memory beside the model: matrices, span buffers (or what learning takes, if that is
    more), and the logits of a batch."""
    dry_run: bool
    resumed_rows: int = 0
    """Rows that were committed before this call."""
    rows_built: int = 0
    """Rows that this call has built; in a dry run with ``worker`` those that it would build, with ``workers`` the most
    that one of them would if all are equally fast."""
    worker: str | None = None
    """The share of this process, "I/N"; None if it built all that was missing."""
    workers: int | None = None
    """Of a dry run with ``workers``: how many of them would have a span to build."""
    head: int | None = None
    """Of a stream: rows at its beginning that were held while the projection was learned from them; None for other
    corpora."""
    new_rows: str | None = None
    """The command that builds what follows in a corpus that has grown since the part was begun; None where it has not,
    or where nobody looked (workers do not)."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Committed rows by status: fewer than ``rows`` together where other workers are still building theirs."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time in seconds: ``total``, ``learning`` (of the projection), ``compute``, ``corpus`` (waiting for it) and
    ``write`` (in the background). Of a dry run estimates of ``learning`` and ``compute``."""
    manifest: Manifest = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The document that ``ghoststore build --json`` prints."""
        return asdict(self)
