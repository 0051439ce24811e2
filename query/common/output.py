"""The forms that results are written in: a document as JSON, or flat rows as jsonl, csv or parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.store.base.disk import storage_errors

FORMS = (".json", ".jsonl", ".csv", ".parquet")


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


def check_output(path: str | Path, parameter: str = "path", forms: Sequence[str] = FORMS) -> Path:
    """``path`` if results can be written there; UsageError for an unknown form or a file that exists."""
    target = Path(path)
    if target.suffix not in forms:
        raise UsageError(f"`{parameter}={target}`: results are written as {', '.join(forms)}")
    if target.exists():
        raise UsageError(f"`{parameter}={target}` exists; nothing was written. Give another path, or remove it")
    if not target.resolve().parent.is_dir():
        raise UsageError(f"`{parameter}={target}`: the folder {target.resolve().parent} does not exist")
    return target
