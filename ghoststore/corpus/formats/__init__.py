"""The forms of corpus files, one module for each family. :func:`form_of` gives the form of a file by its suffix."""

from __future__ import annotations

from pathlib import Path

from ghoststore.corpus.formats.arrow_file import ArrowForm
from ghoststore.corpus.formats.base import Form
from ghoststore.corpus.formats.delimited import table_rows
from ghoststore.corpus.formats.json_document import json_forms
from ghoststore.corpus.formats.parquet import ParquetForm
from ghoststore.corpus.formats.text import json_rows, text_forms, text_rows

FORMS: dict[str, Form] = {
    **text_forms("jsonl", json_rows, ".jsonl", ".ndjson"),
    **json_forms(),
    **text_forms("csv", table_rows, ".csv", delimiter=","),
    **text_forms("tsv", table_rows, ".tsv", ".tab", delimiter="\t"),
    **text_forms("txt", text_rows, ".txt"),
    ".parquet": ParquetForm(),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), ArrowForm()),
}


def form_of(path: Path) -> Form | None:
    """The form of a file by its suffix, in any case; None for another suffix."""
    name = path.name.lower()
    return next((form for suffix, form in FORMS.items() if name.endswith(suffix)), None)
