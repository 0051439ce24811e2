"""``ghoststore.tokenize``: a corpus to token shards, in parallel, resumed by itself. Format: ``docs/shards.md``."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ghoststore.checkpoint.load import find_tokenizer, load_tokenizer, quiet_transformers
from ghoststore.checkpoint.objects import place_of
from ghoststore.checkpoint.same_model import tokenizer_lines
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.cluster import on_actors, ray_cluster, room
from ghoststore.corpus import Corpus, Fields, absolute, open_corpus
from ghoststore.errors import CheckpointError, UsageError
from ghoststore.hidden_errors import own_errors
from ghoststore.machine import CORES
from ghoststore.progress import Progress, Silent
from ghoststore.settings.build import TokenizeOptions
from ghoststore.settings.keywords import takes
from ghoststore.settings.shared import in_memory
from ghoststore.software import versions_of
from ghoststore.store.base.disk import create_whole, exclusive, storage_errors, sweep
from ghoststore.store.base.manifest import refuse_differences
from ghoststore.store.base.own import remember
from ghoststore.store.base.records import digests
from ghoststore.store.spans.committing import settle
from ghoststore.store.walk import size_of
from ghoststore.tokens.manifest import (
    MANIFEST,
    SHARDS,
    TOKENIZER,
    ShardLayout,
    committed_shards,
    date_in,
    layout_of,
    read_manifest,
    read_shard_commit,
    seal_shards,
    shard_files,
)
from ghoststore.tokens.shards import TokenShards
from indexer.build.corpus_plan import CorpusPlan, plan_corpus
from indexer.encode.tokens import TAKEN, Tokenizer
from indexer.tokenize.workers import write_side_by_side
from indexer.tokenize.writer import WHOLE, ShardActor, ShardJob, ShardWriter, Written

DEFAULT_SHARD_SAMPLES = 4096
TEXT_A_WORKER = 16 << 20
"""Bytes of text below which another process takes longer to start than it saves."""
PIECES_A_WORKER = 8
"""Runs of shards that a worker gets, one after another: enough that all end at about the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCount:
    """One domain's share; ``domain`` None: samples without one."""

    domain: str | None
    samples: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeReport:
    """What is in the folder, and what this call did for it."""

    out: str
    samples: int
    tokens: int
    shards: int
    domains: list[DomainCount]
    """By name; samples without a domain last."""
    empty_samples: int
    """Samples without tokens: they keep their place."""
    token_dtype: str
    vocabulary: int
    tokenizer_fingerprint: str
    corpus_fingerprint: str
    repeated_ids: dict[str, int] | None
    """``ids`` that occur more than once, and the ``samples`` that have them; None where every id is unique."""
    bytes_on_disk: int
    resumed_samples: int
    """Samples that were committed before this call."""
    written_tokens: int
    """Tokens that this call wrote."""
    workers: int
    """Processes that wrote; 1 is this one."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time: total, loading the tokenizer, scanning the corpus, tokenizing and writing."""

    def to_json(self) -> dict[str, Any]:
        """The JSON that ``ghoststore tokenize --json`` prints."""
        return asdict(self)


@takes(TokenizeOptions)
def tokenize(options: TokenizeOptions) -> TokenizeReport:
    """The tokens of every sample of ``data``, whole, into the folder ``out``, with where each sample comes from.

    Parameters have the names of the command's options. ``tokenizer`` is a folder with a saved tokenizer or a hub
    id; ``domains`` keeps only the samples of these domains, and ``max_samples`` the first of those. A shard holds
    ``shard_samples`` samples (default 4,096). ``workers`` processes write shards side by side (default: one for
    every 16 MiB of text, at most one a core); 1 is this process. The folder is byte-identical for any number.

    A folder that is there and is of the same tokenizer, corpus and settings is continued. Read it with
    :class:`ghoststore.TokenShards`, or give it wherever a corpus is asked for.

    Raises UsageError, CorpusError or CheckpointError for inputs that cannot be used, MismatchError if the folder
    that is there is of another tokenizer, corpus or settings, BusyError if another process is writing it,
    WorkerError if a worker dies, StorageError if the disk refuses. What was committed stays committed.
    """
    return tokenize_as_of(options, None)


def tokenize_as_of(
    options: TokenizeOptions, template_date: str | None, *, stream_rows: int | None = None, takes_ids: bool = True
) -> TokenizeReport:
    """As :func:`tokenize`; the chat template writes ``template_date``, by default that of the folder that is there.

    Of a stream of token ids the rows have ``stream_rows`` tokens where nothing else is said. ``takes_ids``: see
    :class:`~indexer.encode.tokens.Tokenizer`.
    """
    progress = options.progress or Silent()
    for name, value in (
        ("max_samples", options.max_samples),
        ("shard_samples", options.shard_samples),
        ("workers", options.workers),
    ):
        if value is not None and value < 1:
            raise UsageError(f"`{name}` must be at least 1, not {value}")
    begun, folder = time.perf_counter(), Path(options.out)
    _refuse_others(folder)
    text_tokenizer = load_tokenizer(find_tokenizer(options.tokenizer, progress))
    loaded = time.perf_counter()
    with open_corpus(options.data, options.fields or Fields(), progress) as corpus:
        if stream_rows is not None:
            corpus.cut_stream(stream_rows)
        if corpus.nameless and takes_ids:
            progress.note(f"{corpus.source}: {TAKEN}")
        elif not corpus.nameless and corpus.resolved.kind == "tokens":
            raise UsageError(f"{corpus.source} holds tokens already; give the corpus that they were made of")
        if options.domains:
            corpus = corpus.only(options.domains)
        span_rows = options.shard_samples or DEFAULT_SHARD_SAMPLES
        own = Tokenizer(
            text_tokenizer, note=progress.note, template_date=template_date or date_in(folder), takes_ids=takes_ids
        )
        plan = plan_corpus(corpus, own, WHOLE, span_rows=span_rows, max_samples=options.max_samples, progress=progress)
        _refuse_unknown(corpus, plan, options.max_samples)
        scanned = time.perf_counter()
        manifest = _manifest(corpus, plan, own, span_rows, options.max_samples)
        manifest["source"] = {
            "data": corpus.recorded,
            "form": corpus.form,
            "tokenizer": "-" if in_memory(options.tokenizer) else absolute(place_of(Path(str(options.tokenizer)))),
        }
        _create(folder, manifest, text_tokenizer)
        _refuse_mismatch(folder, manifest, progress)
        if problem := remember(read_manifest(folder)[0], manifest["source"], folder):
            progress.note(problem)
        job = ShardJob.of(folder, corpus, plan, layout_of(manifest, folder), own.template_date)
        if _complete(folder, manifest) and not os.access(folder, os.W_OK):
            work = _Work(job.layout.samples, 0, 1)  # on a disk that is read alone nothing is to be written
        else:
            with exclusive(folder, f"folder {folder}", "out"):
                work = _write(job, options, progress)
    done = time.perf_counter()
    seconds = {"total": done - begun, "load": loaded - begun, "scan": scanned - loaded, "tokenize": done - scanned}
    return _report(TokenShards.open(folder), work, seconds)


def _refuse_others(folder: Path) -> None:
    """UsageError for a folder that holds something else."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = None
    if names is None or (names and MANIFEST not in names):
        raise UsageError(f"`out={folder}` is there and holds no token shards; give a new folder")


def _refuse_unknown(corpus: Corpus, plan: CorpusPlan, max_samples: int | None) -> None:
    """UsageError for a domain that was asked for and that no sample has."""
    lacking = sorted((corpus.domains or frozenset()) - set(plan.scan.domains or ()))
    if lacking and (max_samples is None or plan.scan.rows < max_samples):
        raise UsageError(f"`domains` {lacking[0]!r}: no sample of {corpus.source} has this domain")


def _manifest(
    corpus: Corpus, plan: CorpusPlan, tokenizer: Tokenizer, shard_samples: int, max_samples: int | None
) -> dict[str, Any]:
    """The manifest, ``source`` aside."""
    scan = plan.scan
    layout = ShardLayout(
        samples=scan.rows,
        shard_samples=shard_samples,
        vocabulary=max(tokenizer.size, 1),
        domains=len(scan.domains or ()),
    )
    return {
        "tokenizer": {
            **tokenizer.identity,
            "vocabulary": layout.vocabulary,
            "template_date": tokenizer.template_date,
        },
        "corpus": {
            "fingerprint": scan.fingerprint,
            "samples": scan.rows,
            "max_samples": max_samples,
            "only_domains": None if corpus.domains is None else sorted(corpus.domains),
            "domains": scan.domains,
            "repeated_ids": plan.repeated_ids,
            "fields": corpus.resolved.to_json(),
        },
        "storage": {
            "shard_samples": shard_samples,
            "shards": layout.shards,
            "token_dtype": layout.token_dtype.name,
            "spans_sha256": hashlib.sha256(plan.table.astype("<i8").tobytes()).hexdigest(),
        },
        "software": versions_of("ghoststore", "transformers", "tokenizers", "numpy"),
    }


def _create(folder: Path, manifest: dict[str, Any], tokenizer: Any) -> None:
    """The folder without a shard yet, unless it is there."""

    def fill(begun: Path) -> None:
        (begun / "commits").mkdir()
        with quiet_transformers():
            with own_errors():
                tokenizer.save_pretrained(begun / TOKENIZER)
            given, saved = tokenizer_identity(tokenizer), tokenizer_identity(load_tokenizer(begun / TOKENIZER))
        if saved != given:
            raise CheckpointError(
                "the tokenizer comes back otherwise after save_pretrained; give one that can be saved:\n"
                f"{tokenizer_lines(given, saved)}"
            )
        files = digests(begun, (begun / TOKENIZER).rglob("*"))
        (begun / MANIFEST).write_bytes(seal_shards(manifest, files))

    with storage_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_empty(folder)
    create_whole(folder, fill)


def _remove_empty(folder: Path) -> None:
    """Remove ``folder`` if it is an empty one; another process may be as far, and ahead of us."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _refuse_mismatch(folder: Path, manifest: dict[str, Any], progress: Progress) -> None:
    stored, _ = read_manifest(folder)
    refuse_differences(stored, manifest, f"the folder of token shards {folder}", SHARDS)
    if stored["software"] != manifest["software"] and not _complete(folder, stored):
        progress.note(
            f"continuing with other software than the folder was begun with (was {stored['software']}, is "
            f"{manifest['software']})"
        )


def _complete(folder: Path, manifest: dict[str, Any]) -> bool:
    layout = layout_of(manifest, folder)
    return len(committed_shards(folder, layout)) == layout.shards


class _Work(NamedTuple):
    """What one call did for the folder."""

    resumed_samples: int
    """Samples that were there before it."""
    tokens: int
    """Tokens that it wrote."""
    workers: int
    """Processes that wrote."""


def _write(job: ShardJob, options: TokenizeOptions, progress: Progress) -> _Work:
    """Write every shard without a record, by ``workers`` processes (None: as many as are worth their start), or by
    Ray's actors.
    """
    folder, layout, workers = job.folder, job.layout, options.workers
    with storage_errors(str(folder)):
        settle(folder, lambda shard: shard_files(shard) if shard < layout.shards else [])
        sweep(folder)
        present = committed_shards(folder, layout)
    commits = [read_shard_commit(folder, layout, shard) for shard in present]
    resumed = sum(commit.stop - commit.start for commit in commits)
    missing = sorted(set(range(layout.shards)) - set(present))
    if not missing:
        return _Work(resumed, 0, 1)
    if workers is None and job.in_memory:
        workers = 1  # each worker would get a copy of all rows
    if workers is None and options.engine == "ray":
        with ray_cluster(options.ray_address) as ray:
            workers = room(ray, 1, 0.0)
    if workers is None:
        workers = max(1, min(CORES, job.plan.scan.text_bytes // TEXT_A_WORKER))
    # A compressed file is read from its beginning for every piece.
    pieces = _pieces(missing, workers * (1 if job.compressed else PIECES_A_WORKER))
    workers = min(workers, len(pieces))
    if options.engine == "ray":
        shards = _on_ray(job, pieces, options)
    elif workers == 1:
        shards = ShardWriter(job).write(missing)
    else:
        shards = write_side_by_side(job, pieces, workers)
    tokens = 0
    with closing(progress.task("tokenizing", layout.samples, done=resumed)) as task, closing(shards):
        for written in shards:
            task.advance(written.samples, written.tokens)
            tokens += written.tokens
    return _Work(resumed, tokens, workers)


def _on_ray(job: ShardJob, pieces: Sequence[Sequence[int]], options: TokenizeOptions) -> Generator[Written]:
    with closing(on_actors(options.ray_address, ShardActor, [job], pieces, options.workers)) as results:
        for _, written in results:
            yield from written


def _pieces(shards: Sequence[int], count: int) -> list[Sequence[int]]:
    """``shards`` cut into at most ``count`` runs of about the same size."""
    size = -(-len(shards) // count)
    return [shards[start : start + size] for start in range(0, len(shards), size)]


def _report(shards: TokenShards, work: _Work, seconds: dict[str, float]) -> TokenizeReport:
    names: list[str | None] = [*shards.domains, None]
    codes = shards.domain.astype(np.int64) % len(names)  # -1, no domain, becomes the last
    samples = np.bincount(codes, minlength=len(names)).tolist()
    tokens = np.zeros(len(names), dtype=np.int64)
    np.add.at(tokens, codes, shards.length)
    counts = [
        DomainCount(domain=name, samples=some, tokens=many)
        for name, some, many in zip(names, samples, tokens.tolist(), strict=True)
        if some
    ]
    return TokenizeReport(
        out=str(shards.folder),
        samples=shards.samples,
        tokens=shards.tokens,
        shards=shards.layout.shards,
        domains=counts,
        empty_samples=int((shards.length == 0).sum()),
        token_dtype=shards.layout.token_dtype.name,
        vocabulary=shards.layout.vocabulary,
        tokenizer_fingerprint=shards.tokenizer_identity["fingerprint"],
        corpus_fingerprint=shards.corpus_fingerprint,
        repeated_ids=shards.repeated_ids,
        bytes_on_disk=size_of(shards.folder),
        resumed_samples=work.resumed_samples,
        written_tokens=work.tokens,
        workers=work.workers,
        seconds=seconds,
    )
