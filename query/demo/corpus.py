"""The demo's corpus: four learnable domains, planted facts, and questions about these facts.

It is read from the file beside this module, which ``benchmarks/demo_corpus.py`` wrote.
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
"""The domains of ordinary rows. Planted facts are in a fifth domain, ``facts``."""
MOST_ROWS = 2400
"""Number of ordinary rows in the file, the same for each domain."""

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoCorpus:
    """Training rows and four validation sets. An ``id`` is unique in all five together.

    ``train`` and ``val_domains`` hold ``{"id", "text", "domain"}``. The three sets of questions hold
    ``{"id", "prompt", "completion", "domain", "source_id"}``: ``prompt + completion`` is the text (the
    completion begins with its space), and ``source_id`` names the one training row that states it.
    """

    train: list[Row]
    val_domains: list[Row]
    val_facts: list[Row]
    val_facts_paraphrased: list[Row]
    val_facts_inflected: list[Row]
    """The paraphrased questions with inflected names, so that they share no content word with the source row."""


def read_corpus(rows: int = MOST_ROWS) -> DemoCorpus:
    """The corpus with ``rows`` ordinary training rows and all planted facts, in the order of the file.

    Each domain has the same number of ordinary rows; if ``rows`` does not divide evenly, the first domains have one
    more. Raises UsageError if ``rows`` is negative or more than the file has.
    """
    if not 0 <= rows <= MOST_ROWS:
        raise UsageError(f"`rows` must be at least 0 and at most {MOST_ROWS}, not {rows}")
    share, remainder = divmod(rows, len(DOMAINS))
    room = {domain: share + (place < remainder) for place, domain in enumerate(DOMAINS)}
    sets: dict[str, list[Row]] = {}
    with gzip.open(Path(__file__).with_name("corpus.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            sets.setdefault(row.pop("set"), []).append(row)
    # An id ends in the number of the row in its domain.
    sets["train"] = [row for row in sets["train"] if int(row["id"][-5:]) < room.get(row["domain"], MOST_ROWS)]
    return DemoCorpus(**sets)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line (UTF-8). The file is replaced atomically."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace(Path(path), "".join(lines).encode())
