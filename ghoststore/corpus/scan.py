"""One pass over samples: how many, which domains, how much text, and the fingerprint of it all."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from ghoststore.corpus.fields import Sample
from ghoststore.errors import CorpusError

MAX_DOMAINS = 10_000


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


class SampleScan:
    """A pass over the first ``max_rows`` samples (None: all): iterate it for the samples, then :meth:`finish` it.

    Raises CorpusError for more than MAX_DOMAINS distinct domains.
    """

    def __init__(self, samples: Iterable[Sample], *, max_rows: int | None = None) -> None:
        self._hash = hashlib.sha256()
        self._domains: set[str] = set()
        self._rows = self._text_bytes = 0
        self._pass = self._scanned(islice(samples, max_rows))

    def __iter__(self) -> Iterator[Sample]:
        return self._pass

    def finish(self) -> Scan:
        """Read what is left, and say what the pass found."""
        deque(self._pass, maxlen=0)
        return Scan(
            rows=self._rows,
            fingerprint=f"sha256:{self._hash.hexdigest()}",
            domains=sorted(self._domains) if self._domains else None,
            text_bytes=self._text_bytes,
        )

    def _scanned(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            canonical = sample.canonical()
            self._hash.update(len(canonical).to_bytes(8, "little") + canonical)
            for text in sample.texts():
                self._text_bytes += len(text) if text.isascii() else len(text.encode())
            self._rows += 1
            if sample.domain is not None:
                self._domains.add(sample.domain)
                # An id taken for a domain would fill memory, and the manifest, with one name a sample.
                if len(self._domains) > MAX_DOMAINS:
                    raise CorpusError(
                        f"more than {MAX_DOMAINS:,} distinct domains in the first {self._rows:,} rows "
                        f"(the last: {sample.domain!r:.80}): is the field of `fields.domain` an id?"
                    )
            yield sample
