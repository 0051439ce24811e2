"""Token shards as a form of corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ghoststore.corpus.formats.base import KeyedRow, NumberedForm
from ghoststore.tokens.shards import TokenShards


@dataclass(frozen=True, slots=True)
class ShardsForm(NumberedForm):
    """Rows of :meth:`TokenShards.row`, numbered from 0."""

    shards: TokenShards
    name: str = "token-shards"
    largest: int | None = None

    def rows(self, path: Path, columns: Sequence[str] | None, start: int) -> Iterator[KeyedRow]:
        for sample in range(start, self.shards.samples):
            yield sample, self.shards.row(sample)

    def pick(self, path: Path, columns: Sequence[str] | None, keys: Sequence[int]) -> Iterator[KeyedRow]:
        for key in keys:
            if key < self.shards.samples:
                yield key, self.shards.row(key)

    def count(self, path: Path) -> int:
        return self.shards.samples

    def where(self, path: Path, key: int) -> str:
        return f"{path}, sample {key}"
