"""The command lines that say what the explorer says."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ghoststore.settings.flags import entries_of, flag_words
from ghoststore.settings.question import QueryOptions, QuotaOption, SelectOptions
from ghoststore.settings.serve import ServeOptions
from ghoststore.settings.shared import in_memory
from ghoststore.settings.store import ExportOptions
from ghoststore.shown import json_text

MOST_CHARACTERS = 2000
"""Of a val set that stands in the command itself."""
OF_SERVER = ("checkpoint", "base", "tokenizer", "data", "device")
OF_ROWS = ("data", "device")
"""Of a question that needs no model."""


def command_line(options: ServeOptions, question: Mapping[str, Any], kind: type = QueryOptions) -> str:
    """``ghoststore query …`` for a shell, or ``select`` with ``kind=SelectOptions``. A short val set stands in it; a
    long one is the file ``val.jsonl``, as a second one is ``minus.jsonl``.
    """
    rows = [json_text(row if isinstance(row, dict) else {"text": row}) for row in question.get("val_set", ())]
    short = sum(map(len, rows)) <= MOST_CHARACTERS
    served = {name: getattr(options, name) for name in (OF_SERVER if rows else OF_ROWS)}
    given = {
        "store": options.store,
        **({"val_set": "-" if short else "val.jsonl"} if rows else {}),
        **({"minus": "minus.jsonl"} if "minus" in question else {}),
        **{name: value for name, value in served.items() if not in_memory(value)},
        **{name: value for name, value in question.items() if name not in ("val_set", "minus")},
    }
    quotas = given.pop("quotas") if isinstance(given.get("quotas"), Mapping) else {}
    words = _words("select" if kind is SelectOptions else "query", kind, given)
    (entry,) = entries_of(QuotaOption)
    words += flag_words(entry, [f"{domain}={quota}" for domain, quota in quotas.items()])
    line = " ".join(map(shlex.quote, words))
    return f"printf '%s\\n' {' '.join(map(shlex.quote, rows))} | {line}" if rows and short else line


def _words(command: str, kind: type, given: Mapping[str, Any]) -> list[str]:
    """The words of a command line with the options ``given``, by parameter, which are of the class ``kind``."""
    words = ["ghoststore", command]
    for entry in entries_of(kind):
        name = entry.spec.name
        if len(entry.path) > 1 or name not in given or given[name] in (None, entry.spec.default):
            continue
        words += flag_words(entry, given[name])
    return words


def run_commands(options: ServeOptions, run: str) -> list[str]:
    """The commands for a shell that say what the page of a run says."""
    store, name = shlex.quote(str(options.store)), shlex.quote(run)
    return [
        f"ghoststore watch --store {store} --run {name}",
        f"ghoststore scores --store {store} --run {name} --top-k 20 --bottom-k 20",
    ]


def sample_commands(options: ServeOptions, part: str, source_row: int, text: str | None) -> tuple[str, str]:
    """The commands for a shell that write a sample, with its text, fields and status; and that find its
    near-duplicates, itself among them.
    """
    data = None if in_memory(options.data) else options.data
    row = {"where": f"source_row = {source_row}", "out": f"row-{source_row}"}
    wanted = {"store": options.store, "part": part, "data": data, "format": "datasets", "unusable": True, **row}
    export = shlex.join(_words("export", ExportOptions, wanted))
    duplicates = {"val_set": [text or ""], "part": part, "count": 1, "leaks": "keep", "out": "nearest.jsonl"}
    return export, command_line(options, duplicates, SelectOptions)


def sample_command(options: ServeOptions, run: str, sample_id: str) -> str:
    """The command for a shell that says what a run says of a sample."""
    store, name, sample = (shlex.quote(word) for word in (str(options.store), run, sample_id))
    return f"ghoststore scores --store {store} --run {name} --sample={sample}"
