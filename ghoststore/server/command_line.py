"""The command line that gives the answer to a question of the explorer."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ghoststore.settings.flags import entries_of, flag_words
from ghoststore.settings.question import QueryOptions
from ghoststore.settings.serve import ServeOptions
from ghoststore.settings.shared import in_memory
from ghoststore.shown import json_text

MOST_CHARACTERS = 2000
"""Of a val set that stands in the command itself."""
OF_SERVER = ("checkpoint", "base", "tokenizer", "data", "device")


def command_line(options: ServeOptions, question: Mapping[str, Any]) -> str:
    """``ghoststore query …`` for a shell. A short val set stands in it; a long one is the file ``val.jsonl``, as a
    second one is ``minus.jsonl``.
    """
    rows = [json_text(row if isinstance(row, dict) else {"text": row}) for row in question["val_set"]]
    short = sum(map(len, rows)) <= MOST_CHARACTERS
    served = {name: getattr(options, name) for name in OF_SERVER}
    given = {
        "store": options.store,
        "val_set": "-" if short else "val.jsonl",
        **({"minus": "minus.jsonl"} if "minus" in question else {}),
        **{name: value for name, value in served.items() if not in_memory(value)},
        **{name: value for name, value in question.items() if name not in ("val_set", "minus")},
    }
    words = ["ghoststore", "query"]
    for entry in entries_of(QueryOptions):
        name = entry.spec.name
        if len(entry.path) > 1 or name not in given or given[name] in (None, entry.spec.default):
            continue
        words += flag_words(entry, given[name])
    line = " ".join(map(shlex.quote, words))
    return f"printf '%s\\n' {' '.join(map(shlex.quote, rows))} | {line}" if short else line
