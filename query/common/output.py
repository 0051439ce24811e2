"""Writing results: a document as JSON, or flat rows as jsonl, csv or parquet; and pictures."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ghoststore.errors import UsageError
from ghoststore.settings.option import refuse_remote
from ghoststore.shown import json_text, spreadsheet_cell
from ghoststore.store.base.new_files import check_new, new_file

FORMS = (".json", ".jsonl", ".csv", ".parquet")
PICTURES = (".png", ".pdf", ".svg")


def columns_of(kind: Any, leave_out: Sequence[str] = ()) -> dict[str, type]:
    """Name and type of each field of a dataclass whose fields, but for those to ``leave_out``, are strings, numbers, or
    None.
    """
    types = {"str": str, "int": int, "float": float}
    return {
        field.name: types[str(field.type).removesuffix(" | None")]
        for field in fields(kind)
        if field.name not in leave_out
    }


def arrow_table(columns: Mapping[str, type], rows: Iterable[Mapping[str, Any]]) -> Any:
    """A `pyarrow.Table` of flat ``rows``."""
    import pyarrow

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema({name: kinds[kind] for name, kind in columns.items()})
    return pyarrow.Table.from_pylist(list(rows), schema)


def write_result(
    path: str | Path,
    document: Callable[[], dict[str, Any]],
    columns: Mapping[str, type],
    rows: Iterable[dict[str, Any]],
) -> None:
    """Write a new file: the ``document`` as ``.json``, or flat ``rows`` as ``.jsonl``, ``.csv`` or ``.parquet``.

    It appears whole or not at all. In csv a text that a spreadsheet would take for a formula begins with an apostrophe.
    UsageError for another suffix, or if the file exists.
    """
    target = check_output(path)
    with new_file(target) as temporary:
        if target.suffix == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(arrow_table(columns, rows), temporary)
            return
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            if target.suffix == ".json":
                file.write(json_text(document(), indent=1) + "\n")
            elif target.suffix == ".jsonl":
                file.writelines(json_text(row) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, list(columns))
                writer.writeheader()
                writer.writerows({name: spreadsheet_cell(value) for name, value in row.items()} for row in rows)


def check_output(
    path: str | Path,
    parameter: str = "path",
    forms: Sequence[str] = FORMS,
    *,
    beside: Sequence[Path] = (),
    what: str = "results",
) -> Path:
    """``path`` as a Path, if a new file with one of the suffixes ``forms`` can be written there; else UsageError.

    ``parameter`` is what the error calls the path, and ``what`` the things that are written. ``beside`` are files that
    are written together with it, see `check_new`.
    """
    refuse_remote(parameter, path)
    target = Path(path)
    if target.suffix.lower() not in forms:
        raise UsageError(f"`{parameter}={target}`: {what} are written as {', '.join(forms)}")
    check_new(f"`{parameter}={target}`", target, *beside)
    return target


def check_picture(path: str | Path, parameter: str, *, beside: Sequence[Path] = ()) -> Path:
    """``path`` if a new picture can be written there; UsageError for an unknown form or a file that exists."""
    return check_output(path, parameter, PICTURES, beside=beside, what="pictures")


def save_picture(figure: Any, path: Path, *, dpi: int, over: bool = False) -> None:
    """Save a matplotlib figure in the format that the suffix of ``path`` names. It appears whole or not at all.

    A file that exists is replaced with ``over``, and is an error without.
    """
    with new_file(path, over=over) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())
