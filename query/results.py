"""Results of a query: what they hold, and the forms they are written in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
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


def columns_of(kind: Any) -> dict[str, type]:
    """The fields of a dataclass of strings and numbers (or None), with their types."""
    known = {"str": str, "int": int, "float": float}
    return {field.name: known[str(field.type).removesuffix(" | None")] for field in fields(kind)}


def write_result(
    path: str | Path,
    document: Callable[[], dict[str, Any]],
    columns: Mapping[str, type],
    rows: Iterable[dict[str, Any]],
) -> None:
    """Write a new file: the ``document`` as ``.json``, or flat ``rows`` as ``.jsonl``, ``.csv`` or ``.parquet``."""
    target = check_output(path)
    with storage_errors(str(target)):
        if target.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
            schema = pyarrow.schema({name: kinds[kind] for name, kind in columns.items()})
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), target)
            return
        with open(target, "x", encoding="utf-8", newline="") as file:
            if target.suffix == ".json":
                json.dump(document(), file, ensure_ascii=False, indent=1)
                file.write("\n")
            elif target.suffix == ".jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows(rows)


def check_output(path: str | Path, option: str = "--out", forms: Sequence[str] = FORMS) -> Path:
    """``path`` if results can be written there; UsageError for an unknown form or a file that exists."""
    target = Path(path)
    if target.suffix not in forms:
        raise UsageError(f"{option} {target}: results are written as {', '.join(forms)}")
    if target.exists():
        raise UsageError(f"{option} {target} exists; nothing was written. Give another path, or remove it")
    if not target.resolve().parent.is_dir():
        raise UsageError(f"{option} {target}: the folder {target.resolve().parent} does not exist")
    return target
