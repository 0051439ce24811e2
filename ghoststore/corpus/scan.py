"""One pass over the samples of a corpus: their number, domains, bytes of text, and fingerprint."""

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
    """The result of a pass.

    ``fingerprint`` is "sha256:" and the hex digest of the canonical bytes of all samples in order, each after its
    length (8 bytes, little endian). Equal samples in any form of file have equal fingerprints. ``domains`` are distinct
    and sorted; None if no sample has a domain. ``text_bytes`` counts bytes of UTF-8.
    """

    rows: int
    fingerprint: str
    domains: list[str] | None
    text_bytes: int
    known: str | None = None
    """The fingerprint of the known first samples, if there are more than these."""


class Fingerprint:
    """The hash of samples in order: :meth:`add` each, :meth:`text` at any time.

    With ``link`` it is a chain: after every ``link`` samples the hash of the hash before and of theirs, so that it can
    go on from the text that it had after whole links, ``begun``.
    """

    def __init__(self, link: int | None = None, begun: str = "") -> None:
        self.link = link
        self._before = begun.rpartition(":")[2]
        self._hash = hashlib.sha256()
        self._count = 0

    def add(self, canonical: bytes) -> None:
        """Add the canonical bytes of the next sample."""
        self._hash.update(len(canonical).to_bytes(8, "little") + canonical)
        self._count += 1
        if self._count == self.link:
            self._before, self._count, self._hash = self._digest(), 0, hashlib.sha256()

    def _digest(self) -> str:
        """Of all samples so far."""
        if self.link is None:
            return self._hash.hexdigest()
        if not self._count:
            return self._before
        return hashlib.sha256(f"{self._before}:{self._hash.hexdigest()}".encode()).hexdigest()

    def text(self) -> str:
        """The fingerprint of the samples so far."""
        return f"sha256{'' if self.link is None else f'/{self.link}'}:{self._digest()}"

    @staticmethod
    def link_of(text: str) -> int | None:
        """The length of a link of a fingerprint that was made so; None for one that is no chain."""
        name, _, link = text.partition(":")[0].partition("/")
        return int(link) if name == "sha256" and link.isdecimal() and len(link) < 10 and int(link) else None


class SampleScan:
    """A pass over the first ``max_rows`` samples (None: all). Iterate over it for the samples, then call
    :meth:`finish`. The first ``known`` samples have a fingerprint of their own. With ``link`` fingerprints are chains,
    as those of streams.

    Raises CorpusError for more than MAX_DOMAINS distinct domains.
    """

    def __init__(
        self, samples: Iterable[Sample], *, max_rows: int | None = None, known: int = 0, link: int | None = None
    ) -> None:
        self._fingerprint = Fingerprint(link)
        self._domains: set[str] = set()
        self._rows = self._text_bytes = 0
        self._count = known
        self._known: str | None = None
        self._pass = self._scanned(islice(samples, max_rows))

    def __iter__(self) -> Iterator[Sample]:
        return self._pass

    def finish(self) -> Scan:
        """Read the remaining samples, and return the result of the pass."""
        deque(self._pass, maxlen=0)
        return Scan(
            rows=self._rows,
            fingerprint=self._fingerprint.text(),
            domains=sorted(self._domains) if self._domains else None,
            text_bytes=self._text_bytes,
            known=self._known,
        )

    def _scanned(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if self._rows == self._count > 0:
                self._known = self._fingerprint.text()
            self._fingerprint.add(sample.canonical())
            for text in sample.texts():
                self._text_bytes += len(text) if text.isascii() else len(text.encode())
            self._rows += 1
            if sample.domain is not None:
                self._domains.add(sample.domain)
                # With an id field as the domain, memory and manifest would hold one name for each sample.
                if len(self._domains) > MAX_DOMAINS:
                    raise CorpusError(
                        f"more than {MAX_DOMAINS:,} distinct domains in the first {self._rows:,} rows "
                        f"(the last: {sample.domain!r:.80}): is the field of `fields.domain` an id?"
                    )
            yield sample
