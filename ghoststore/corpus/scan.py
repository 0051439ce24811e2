"""One pass over samples: how many, which domains, how much text, and the fingerprint of it all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from ghoststore.corpus.fields import Sample
from ghoststore.errors import CorpusError

MAX_DOMAINS = 10_000
ROWS_PER_PROGRESS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What a pass found.

    ``fingerprint`` is "sha256:" and the hex digest over the canonical bytes of all samples, in order,
    each preceded by its length (8 bytes, little endian): equal for equal samples in any form of file.
    ``domains`` are distinct and sorted; None where no sample has one. ``text_bytes`` counts UTF-8.
    """

    rows: int
    fingerprint: str
    domains: list[str] | None
    text_bytes: int


def scan_samples(
    samples: Iterable[Sample],
    *,
    max_rows: int | None = None,
    on_sample: Callable[[Sample], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scan:
    """Scan the first ``max_rows`` samples (None: all).

    ``on_sample`` gets every one of them; ``progress`` gets the number of rows so far, every 4096 rows
    and at the end. Raises CorpusError for more than MAX_DOMAINS distinct domains.
    """
    hashed = hashlib.sha256()
    domains: set[str] = set()
    rows = text_bytes = 0
    for sample in islice(samples, max_rows):
        canonical = sample.canonical()
        hashed.update(len(canonical).to_bytes(8, "little") + canonical)
        for text in sample.texts():
            text_bytes += len(text) if text.isascii() else len(text.encode())
        if sample.domain is not None:
            domains.add(sample.domain)
            if len(domains) > MAX_DOMAINS:
                raise CorpusError(
                    f"more than {MAX_DOMAINS:,} distinct domains in the first {rows + 1:,} rows "
                    f"(the last: {sample.domain!r:.80}): is the field of --domain-field an id?"
                )
        rows += 1
        if on_sample is not None:
            on_sample(sample)
        if progress is not None and rows % ROWS_PER_PROGRESS == 0:
            progress(rows)
    if progress is not None:
        progress(rows)
    return Scan(
        rows=rows,
        fingerprint=f"sha256:{hashed.hexdigest()}",
        domains=sorted(domains) if domains else None,
        text_bytes=text_bytes,
    )
