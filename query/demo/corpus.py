"""The demo's corpus: four learnable domains, with planted facts and questions that ask for them.

It is the file beside this one, written by ``benchmarks/demo_corpus.py``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ghoststore.errors import UsageError
from ghoststore.store.base.disk import replace

DOMAINS = ("recipe", "arithmetic", "python", "shiplog")
"""The ordinary ones; ``facts`` is the fifth."""
MOST_ROWS = 2400
"""Ordinary rows in the file, as many of each domain."""

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCorpus:
    """Training rows and four validation sets; every ``id`` is unique in all five.

    ``train`` and ``val_domains`` hold ``{"id", "text", "domain"}``. The three sets of questions hold
    ``{"id", "prompt", "completion", "domain", "source_id"}``: ``prompt + completion`` is the text (the
    completion begins with its space), and ``source_id`` names the one training row that states it.
    """

    train: list[Row]
    val_domains: list[Row]
    val_facts: list[Row]
    val_facts_paraphrased: list[Row]
    val_facts_inflected: list[Row]
    """As the paraphrased ones, each invented name with an ending: no word of content stands in the source."""


def read_corpus(rows: int = MOST_ROWS) -> DemoCorpus:
    """The corpus with the first ``rows`` ordinary training rows, as many of each domain (the first domains have one
    more where that does not divide), and all planted facts, in the order of the file.

    Raises UsageError if ``rows`` is negative or more than the file has.
    """
    if not 0 <= rows <= MOST_ROWS:
        raise UsageError(f"`rows` must be at least 0 and at most {MOST_ROWS}, not {rows}")
    share, more = divmod(rows, len(DOMAINS))
    room = {domain: share + (place < more) for place, domain in enumerate(DOMAINS)}
    sets: dict[str, list[Row]] = {}
    with gzip.open(Path(__file__).with_name("corpus.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            sets.setdefault(row.pop("set"), []).append(row)
    # An id ends in the number of the row in its domain.
    sets["train"] = [row for row in sets["train"] if int(row["id"][-5:]) < room.get(row["domain"], MOST_ROWS)]
    return DemoCorpus(**sets)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line (UTF-8), replacing the file in one step."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace(Path(path), "".join(lines).encode())
