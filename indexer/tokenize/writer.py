"""One shard of tokens: the rows of a span, tokenized, written, committed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ghoststore.corpus import Corpus, ResolvedFields, Source
from ghoststore.errors import BusyError, CheckpointError, GhostStoreError
from ghoststore.store.base.disk import storage_errors
from ghoststore.store.spans.commits import Commit
from ghoststore.store.spans.committing import commit_span
from ghoststore.tokens.manifest import SAMPLE, ShardLayout, npy_bytes, shard_files
from ghoststore.tokens.shards import load_own_tokenizer
from indexer.build.corpus_plan import CorpusPlan, rows_of_spans, sample_columns
from indexer.encode.tokens import NO_TOKENS, Row, Tokenizer, TokenSettings

WHOLE = TokenSettings(max_length=np.iinfo(np.int32).max)
"""Samples are never cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """What any process needs to write any shard of a folder."""

    folder: Path
    source: Source
    """Where the corpus can be read."""
    fields: ResolvedFields
    only_domains: tuple[str, ...] | None
    domains: tuple[str, ...]
    """Names that the ``domain`` column indexes."""
    plan: CorpusPlan
    layout: ShardLayout
    template_date: str | None
    """The date that the chat template writes."""
    compressed: bool
    """Whether the corpus is a file that can only be read from its beginning."""

    @classmethod
    def of(
        cls, folder: Path, corpus: Corpus, plan: CorpusPlan, layout: ShardLayout, template_date: str | None
    ) -> ShardJob:
        """For the samples of ``corpus`` that ``plan`` is of."""
        return cls(
            folder=folder,
            source=corpus.origin,
            fields=corpus.resolved,
            only_domains=None if corpus.domains is None else tuple(sorted(corpus.domains)),
            domains=tuple(plan.scan.domains or ()),
            plan=plan,
            layout=layout,
            template_date=template_date,
            compressed=corpus.form.endswith((".gz", ".zst")),
        )

    @property
    def in_memory(self) -> bool:
        """Whether the corpus is in memory."""
        return not isinstance(self.source, str)


@dataclass(frozen=True, slots=True)
class Written:
    """A shard that was committed."""

    shard: int
    samples: int
    tokens: int


class ShardWriter:
    """A job's corpus and tokenizer, opened once in the process that writes."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        corpus = Corpus.open(job.source, job.fields)
        self._corpus = corpus if job.only_domains is None else corpus.only(job.only_domains)
        self._tokenizer = Tokenizer(load_own_tokenizer(job.folder), template_date=job.template_date, takes_ids=True)
        self._sizes = [stop - start for start, stop in map(job.layout.span_of, range(job.layout.shards))]

    def write(self, shards: Sequence[int]) -> Generator[Written]:
        """Write and commit ``shards`` (ascending), each when the one before is on the disk.

        Raises MismatchError where the corpus is not the one that was planned, StorageError if the disk refuses,
        BusyError if another process wrote the same shard with other content.
        """
        spans = rows_of_spans(self._corpus, self._tokenizer, WHOLE, self.job.plan, self._sizes, shards)
        for shard, rows in spans:
            yield write_shard(self.job, shard, rows)


class ShardActor:
    """What a Ray actor of a job is."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job
        self._writer: ShardWriter | None = None

    def do(self, shards: Sequence[int]) -> list[Written] | GhostStoreError:
        """Write ``shards``."""
        try:
            self._writer = self._writer or ShardWriter(self._job)
            return list(self._writer.write(shards))
        except GhostStoreError as error:
            return error


def write_shard(job: ShardJob, shard: int, rows: Sequence[Row]) -> Written:
    """Write the files of one shard, and commit them."""
    tokens = np.concatenate([NO_TOKENS, *(row.tokens for row in rows)])
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < job.layout.vocabulary:
        raise CheckpointError(
            f"the tokenizer gives token {int(tokens.max())}, but its vocabulary ends at {job.layout.vocabulary}"
        )
    columns = sample_columns(rows, job.domains)
    ids = [name.encode() for name in columns["sample_id"]]
    samples = np.zeros(len(rows), dtype=SAMPLE)
    for name in ("source_row", "source_offset", "source_digest", "source_file", "domain"):
        samples[name] = columns[name]
    samples["length"] = columns["n_tokens"]
    samples["first_target"] = [row.first_target for row in rows]
    samples["start"] = np.cumsum(samples["length"], dtype=np.int64) - samples["length"]
    samples["id_stop"] = np.cumsum([len(name) for name in ids], dtype=np.int64)
    arrays = (tokens.astype(job.layout.token_dtype), samples, np.frombuffer(b"".join(ids), dtype=np.uint8))
    start, stop = job.layout.span_of(shard)
    statuses = Counter(row.status.name.lower() for row in rows)
    counted = dict(sorted(statuses.items()))
    commit = Commit(span=shard, start=start, stop=stop, statuses=counted, tokens=len(tokens))
    files = ((name, npy_bytes(array)) for name, array in zip(shard_files(shard), arrays, strict=True))
    with storage_errors(f"shard {shard} of {job.folder}"):
        if not commit_span(job.folder, commit, files):
            raise BusyError(
                f"shard {shard} of {job.folder} was committed by another process, with other content; what it wrote "
                "stands. Run again when it has ended"
            )
    return Written(shard, stop - start, len(tokens))
