"""Results of a query: what they hold, and the forms they are written in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from query.common.output import columns_of, write_result


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One row of a ranking. ``rank`` counts from 1."""

    rank: int
    score: float
    id: str
    source_row: int
    domain: str | None
    text: str | None
    """The sample's whole text; None where the source is gone or has changed."""
    window_start: int
    """First token of the row in its sample; 0 unless long samples were split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedHit(Hit):
    """A row of a ranking by ``--with-scores``: ``score`` is the blend of these two."""

    similarity: float
    """The cosine or dot product."""
    value: float | None
    """Σ η·score in the training run; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryHits:
    """The rankings of one query: ``"mean"``, or the id of a val sample."""

    query: str
    val_row: int | None = None
    """Place of the val sample in the val set, from 0, which its id need not tell; None for a mean."""
    hits: list[Hit]
    bottom: list[Hit]
    """Lowest scores, lowest first; empty unless asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """What ``ghoststore.query`` returns."""

    store: str
    settings: dict[str, Any]
    results: list[QueryHits]

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore query --json`` prints; ``bottom`` only where it was asked for."""
        results = [asdict(result) for result in self.results]
        for result in results:
            if not self.settings.get("bottom_k"):
                del result["bottom"]
        return {"store": self.store, "settings": self.settings, "results": results}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Flat rows: query, its val row, list (top or bottom) and the fields of a hit."""
        for result in self.results:
            for name, hits in (("top", result.hits), ("bottom", result.bottom)):
                for hit in hits:
                    yield {"query": result.query, "val_row": result.val_row, "list": name, **asdict(hit)}

    def write(self, path: str | Path) -> None:
        """Write to a new file: ``.json``, or flat rows as ``.jsonl``, ``.csv`` or ``.parquet``."""
        columns = {"query": str, "val_row": int, "list": str, **columns_of(self._hit)}
        write_result(path, self.to_json, columns, self.rows())

    @property
    def _hit(self) -> type[Hit]:
        """What the hits are."""
        return next((type(hit) for result in self.results for hit in (*result.hits, *result.bottom)), Hit)
