"""Results of a query: what they hold, and the forms they are written in."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.store.disk import storage_errors

FORMS = (".json", ".jsonl", ".csv", ".parquet")


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
class QueryHits:
    """The rankings of one query: ``"mean"``, or the id of a val sample."""

    query: str
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
        """Flat rows: query, list (top or bottom) and the fields of a hit."""
        for result in self.results:
            for name, hits in (("top", result.hits), ("bottom", result.bottom)):
                for hit in hits:
                    yield {"query": result.query, "list": name, **asdict(hit)}

    def write(self, path: str | Path) -> None:
        """Write to a new file: ``.json``, or flat rows as ``.jsonl``, ``.csv`` or ``.parquet``."""
        target = check_output(path)
        with storage_errors(str(target)):
            if target.suffix == ".parquet":
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(self.rows()), _schema()), target)
                return
            with open(target, "x", encoding="utf-8", newline="") as file:
                if target.suffix == ".json":
                    json.dump(self.to_json(), file, ensure_ascii=False, indent=1)
                    file.write("\n")
                elif target.suffix == ".jsonl":
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
                else:
                    writer = csv.DictWriter(file, ["query", "list", *Hit.__dataclass_fields__])
                    writer.writeheader()
                    writer.writerows(self.rows())


def _schema() -> Any:
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    return pyarrow.schema(
        {
            "query": text, "list": text, "rank": number, "score": pyarrow.float32(), "id": text, "source_row": number,
            "domain": text, "text": text, "window_start": number,
        }
    )  # fmt: skip


def check_output(path: str | Path) -> Path:
    """``path`` if results can be written there; UsageError for an unknown form or a file that exists."""
    target = Path(path)
    if target.suffix not in FORMS:
        raise UsageError(f"--out {target}: results are written as {', '.join(FORMS)}")
    if target.exists():
        raise UsageError(f"--out {target} exists; nothing was written. Give another path, or remove it")
    if not target.resolve().parent.is_dir():
        raise UsageError(f"--out {target}: the folder {target.resolve().parent} does not exist")
    return target
