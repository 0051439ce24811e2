"""The model, tokenizer and projection of a part, opened to encode a val set and to recompute rows of the part.

Legend: D numbers of a vector.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ghoststore.checkpoint.load import (
    AnyCheckpoint,
    AnyTokenizer,
    find_tokenizer,
    load_model,
    load_tokenizer,
    resolve_device,
)
from ghoststore.checkpoint.same_model import find_as_built, refuse_incomplete, refuse_other_model
from ghoststore.corpus import Corpus, Position, Sample
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress, Silent, Task
from ghoststore.settings.shared import Checkpoint as CheckpointSource
from ghoststore.settings.shared import Data, TokenizerSource
from ghoststore.store import Part, Status
from ghoststore.store.base.own import is_own, is_place, source_path
from ghoststore.store.base.records import reading
from ghoststore.store.part.status import FIRST_UNUSABLE, counted
from indexer.encode.encoder import RowEncoder, encode_rows
from indexer.encode.pairs import tokenizer_for
from indexer.encode.positions import position_scores
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, rows_of
from indexer.projection.matrices import Projection
from indexer.projection.stored import projection_of
from query.ask.phrase import Phrase
from query.ask.question import Grouping
from query.common.texts import corpus_behind

ROWS_AT_ONCE = 1024
BYTES_AT_ONCE = 128 << 20
"""Bytes of vectors in memory beside those that are returned."""


@dataclass(slots=True, kw_only=True)
class ValVectors:
    """The vectors of a val set: one for each val sample, for each domain, or one for all."""

    vectors: Tensor
    """(M, D) float32 on the CPU."""
    ids: list[str]
    """M names of the vectors: the sample's id, the domain, or ``mean``."""
    used: int
    """Val rows that have a vector."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of val rows without a vector, by status."""
    rows_of: dict[str, int] = field(default_factory=dict)
    """Number of val rows in each mean, by its name."""
    places: list[int] = field(default_factory=list)
    """With ``each``: for each vector the place of its sample in the val set, counted from 0, because ids may repeat."""
    samples_of: list[list[int]] = field(default_factory=list)
    """For each vector the places in the val set of the samples behind it, once for each of their rows."""
    row_places: list[int] = field(default_factory=list)
    """The places, among the rows of the val set, of those that have a vector."""
    digest: int = 0
    """Hash of which val rows have a vector: their samples' places and first tokens."""

    def note_left_out(self, progress: Progress, whose: str = "val") -> None:
        """Say how many val rows have no vector, and why."""
        if self.left_out:
            shown = ", ".join(f"{count} {status}" for status, count in sorted(self.left_out.items()))
            progress.note(f"{whose} rows left out: {shown}; {self.used} are used")


class PartEncoder:
    """The model, tokenizer and projection of ``part``, opened once. Encodes samples, and rows of the part, as the build
    did. Between two calls the model is free for other uses.

    ``checkpoint``, ``base`` (of an adapter), ``tokenizer`` and ``data`` say where to read these (default: where the
    user's own build read them); ``corpus`` is the corpus of the part if it is open already. MismatchError if
    checkpoint, tokenizer or projection are not those of the part.
    """

    def __init__(
        self,
        part: Part,
        *,
        checkpoint: CheckpointSource | None = None,
        base: str | Path | None = None,
        tokenizer: TokenizerSource | None = None,
        data: Data | None = None,
        device: str = "auto",
        corpus: Corpus | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress or Silent()
        self.model, self._tokenizer = load_for(
            part.members[0],
            checkpoint,
            tokenizer,
            resolve_device(device, checkpoint),
            base=base,
            progress=self._progress,
        )
        self._tokenizer.note = self._progress.note
        self._corpora, self._data = {} if corpus is None else {part.name: corpus}, data
        self._project(part, projection_of(part, self.model))

    def _project(self, part: Part, projection: Projection) -> None:
        self.part, self.plan = part, projection.plan
        self._encoder = RowEncoder(
            self.model,
            projection,
            reduction=part.manifest["loss"]["reduction"],
            padding=part.manifest["batching"]["padding"],
        )

    def unsketched(self) -> PartEncoder:
        """An encoder with the same model whose vectors are the Kronecker blocks of the layers, before the sketch."""
        encoder = copy(self)
        encoder._project(self.part, self._encoder.engine.projection.unsketched())
        return encoder

    def for_part(self, part: Part) -> PartEncoder:
        """An encoder with the same model for another ``part``. MismatchError if that part is of another model."""
        encoder = copy(self)
        encoder._corpora = {}
        encoder._tokenizer = self._tokenizer.at(part.manifest["tokens"]["template_date"])
        encoder._project(part, projection_of(part, self.model))
        return encoder

    def at(self, part: Part, progress: Progress) -> PartEncoder:
        """This encoder for a later state of its part, with more rows, which tells ``progress``."""
        encoder = copy(self)
        encoder.part, encoder._progress = part, progress
        encoder._tokenizer = copy(self._tokenizer)
        encoder._tokenizer.note = progress.note
        return encoder

    @property
    def groups(self) -> list[tuple[str, int, int]]:
        """(name, first column, one past the last) of each block of a vector."""
        return self.plan.groups

    @property
    def dimension(self) -> int:
        """D."""
        return self.plan.dimension

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        """The rows of ``samples``, in order, tokenized some hundred at a time.

        Where the tokenizer has tokens that the model's embedding lacks, all samples are tokenized first: a row with
        such a token is then refused (UsageError) before any work.
        """
        with reading(self.part.path / "zarr.json", "does not say how rows are tokenized"):
            settings = TokenSettings(**self.part.manifest["tokens"])
        rows = rows_of(samples, self._tokenizer, settings)
        return iter(list(rows)) if self._tokenizer.exceeds else rows

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return int(self.part.manifest["tokens"]["max_length"])

    @property
    def exceeds(self) -> bool:
        """Whether the tokenizer has tokens that the model's embedding lacks."""
        return self._tokenizer.exceeds

    def refuse_beyond(self, samples: Iterable[Sample]) -> None:
        """UsageError for a row of ``samples`` with a token that the model's embedding lacks.

        Reads ``samples`` only if the tokenizer has such tokens.
        """
        if self.exceeds:
            deque(self.rows(samples), maxlen=0)

    def vectors(self, rows: Sequence[Row], task: Task | None = None) -> Tensor:
        """(rows, D) float32 on the CPU; zeros for rows that are not usable. Advances ``task``, or a task of its own."""
        if task is None:
            with closing(self._progress.task("gradients", len(rows))) as task:
                return self.vectors(rows, task)
        with self._encoder:
            return encode_rows(self._encoder, rows, int(self.part.manifest["batching"]["batch_tokens"]), task).vectors

    def val_rows(self, corpus: Corpus, max_samples: int | None, phrase: str | None = None) -> Iterator[Row]:
        """The rows of a val set; with ``phrase`` the one whose targets are its tokens: see :mod:`query.ask.phrase`."""
        if phrase is None:
            return self.rows(islice(corpus.samples(), max_samples))
        rows = list(self.rows(islice(corpus.samples(), min(2, max_samples or 2))))
        return iter(Phrase.of(phrase).rows(rows, self.token_texts))

    def encode_val_set(
        self, corpus: Corpus, grouping: Grouping, max_samples: int | None, phrase: str | None = None
    ) -> ValVectors:
        """The vectors of a val set: of each usable row of ``corpus``, or their mean over all rows or over each domain.

        Means are summed in float64. Rows that cannot be used (too short, masked, not finite) are left out and counted.
        ``max_samples`` limits how many samples are read; ``phrase`` is as in :meth:`val_rows`. UsageError if no row is
        usable, and with grouping ``domain`` for a sample without a domain.
        """
        corpus.cut_stream(self.max_length)
        sums: dict[str, NDArray[np.float64]] = {}
        counts: Counter[str] = Counter()
        ids: list[str] = []
        places: list[int] = []
        samples_of: dict[str, list[int]] = {}
        row_places: list[int] = []
        read_rows, digest = 0, xxhash.xxh3_64()
        pieces: list[Tensor] = []
        left_out: Counter[str] = Counter()
        rows = self.val_rows(corpus, max_samples, phrase)
        with closing(self._progress.task("val set", None)) as task:
            while batch := list(islice(rows, ROWS_AT_ONCE)):
                vectors = self.vectors(batch, task)
                finite = torch.isfinite(vectors).all(1)
                fates = [
                    row.status if finite[place] or not row.status.usable else Status.NOT_FINITE
                    for place, row in enumerate(batch)
                ]
                used = [place for place, fate in enumerate(fates) if fate.usable]
                row_places += [read_rows + place for place in used]
                read_rows += len(batch)
                for place in used:
                    digest.update(f"{batch[place].sample.source_row} {batch[place].window_start};".encode())
                left_out.update(fate.name.lower() for fate in fates if not fate.usable)
                if grouping == "each":
                    ids += [batch[place].sample.id for place in used]
                    places += [batch[place].sample.source_row for place in used]
                    pieces.append(vectors[used])
                    continue
                for label, members in _by_label([batch[place] for place in used], used, grouping).items():
                    sums[label] = sums.get(label, np.zeros(vectors.shape[1])) + vectors[members].double().sum(0).numpy()
                    counts[label] += len(members)
                    samples_of.setdefault(label, []).extend(batch[place].sample.source_row for place in members)
        if not ids and not counts:
            raise UsageError(f"no row of the val set {corpus.source} can be used: {counted(left_out)}")
        if grouping != "each":
            ids = sorted(sums)
            pieces = [torch.from_numpy((sums[label] / counts[label]).astype(np.float32)).unsqueeze(0) for label in ids]
        return ValVectors(
            vectors=torch.cat(pieces),
            ids=ids,
            used=len(row_places),
            left_out=dict(left_out),
            rows_of=dict(counts),
            places=places,
            samples_of=[[place] for place in places] if grouping == "each" else [samples_of[label] for label in ids],
            row_places=row_places,
            digest=digest.intdigest(),
        )

    def recompute(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """(rows, D) float32 on the CPU: the exact vectors of ``rows`` of the part, not rounded as the stored ones are.

        ``rows`` may be in any order and may repeat. The vector is zero where the part has none. Beside the result, some
        hundred samples and their vectors are in memory. A compressed corpus is read from its beginning for every 1,024
        rows. Raises what :meth:`source_rows` raises.
        """
        wanted, place = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        vectors = torch.zeros(len(wanted), self.dimension)
        at_once = max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // (4 * self.dimension)))
        with closing(self._progress.task("recomputing gradients", len(wanted))) as task:
            for start in range(0, len(wanted), at_once):
                batch = wanted[start : start + at_once]
                (usable,) = np.nonzero(np.asarray(self.part.read_rows("status", batch)) < FIRST_UNUSABLE)
                task.advance(len(batch) - len(usable))
                vectors[start + usable] = self.vectors(self.source_rows(batch[usable]), task)
        return vectors[place]

    def token_scores(self, rows: Sequence[Row], queries_QD: Tensor) -> list[Tensor]:
        """For each of ``rows``, which must be usable, (Q, T): see :func:`indexer.encode.positions.position_scores`."""
        batch_tokens = int(self.part.manifest["batching"]["batch_tokens"])
        return position_scores(self._encoder, rows, queries_QD, batch_tokens)

    def token_texts(self, row: Row) -> list[tuple[str, int | None, int | None]]:
        """(text, first character in the sample's text, one past its last) of each token of ``row``.

        The places are None for special tokens, and where the tokens of the text as a reader sees it are not those of
        the row: messages go through a template. They need a tokenizer of the tokenizers library.
        """
        tokenizer, text, ids = self._tokenizer.tokenizer, row.sample.preview(), row.tokens.tolist()
        for special in (True, False) if getattr(tokenizer, "is_fast", False) else ():
            encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            window = slice(row.window_start, row.window_start + len(ids))
            if encoded["input_ids"][window] == ids:
                offsets = encoded["offset_mapping"][window]
                return [
                    (text[start:stop], start, stop) if stop > start else (tokenizer.decode([token]), None, None)
                    for token, (start, stop) in zip(ids, offsets, strict=True)
                ]
        return [(tokenizer.decode([token]), None, None) for token in ids]

    def source_rows(self, rows: NDArray[np.int64]) -> list[Row]:
        """``rows`` of the part with their tokens, read from its corpus.

        UsageError if the corpus is gone, MismatchError for a sample that has changed since the build.
        """
        of_rows: dict[int, Row] = {}
        for part, places, own in self.part.located(rows):
            of_rows.update(zip(places.tolist(), self._rows_of(part, own), strict=True))
        return [of_rows[place] for place in range(len(rows))]

    def _rows_of(self, part: Part, rows: NDArray[np.int64]) -> list[Row]:
        """:meth:`source_rows` of the part, or of one of those that it unites."""
        if part.name not in self._corpora:
            self._corpora[part.name] = corpus_behind(part, self._data)
        corpus = self._corpora[part.name]
        columns = ("source_row", "source_file", "source_offset", "window_start", "source_digest")
        digests: dict[int, int] = {}
        places: list[Position] = []
        keys: list[tuple[int, int]] = []
        for source_row, file, offset, window_start, digest in zip(
            *(map(int, part.read_rows(name, rows)) for name in columns), strict=True
        ):
            if source_row not in digests:
                places.append(Position(source_row=source_row, file=file, offset=offset))
            digests[source_row] = digest
            keys.append((source_row, window_start))
        samples = corpus.fetch(places)
        changed = [row for row, digest in digests.items() if row not in samples or samples[row].digest() != digest]
        if changed:
            raise MismatchError(
                f"{corpus.source} has changed since part {part.name!r} was built: {len(changed)} of "
                f"{len(digests)} samples are not those that were built from, the first at row {min(changed)}. Restore "
                "the corpus, or build the part anew"
            )
        built = self.rows(samples[place.source_row] for place in places)
        by_key = {(row.sample.source_row, row.window_start): row for row in built}
        return [by_key[key] for key in keys]


def _by_label(rows: list[Row], places: list[int], grouping: Grouping) -> dict[str, list[int]]:
    """``places``, one for each of ``rows``, by the domain of the row; or all under ``mean``."""
    by_label: dict[str, list[int]] = {}
    for row, place in zip(rows, places, strict=True):
        label = "mean" if grouping == "mean" else row.sample.domain
        if label is None:
            raise UsageError(
                f"val sample {row.sample.id!r} (row {row.sample.source_row}) has no group: the field of `group_field` "
                "is null there"
            )
        by_label.setdefault(label, []).append(place)
    return by_label


def load_for(
    part: Part,
    checkpoint: CheckpointSource | None,
    tokenizer: TokenizerSource | None,
    device: str,
    *,
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Tokenizer]:
    """The model and tokenizer of ``part``, read from where the user says, or from where the user's own build read them.

    MismatchError if they are not those of the part (it shows every field that differs, with both values), and for a
    part of an unreleased version, whose manifest lacks what is compared.
    """
    refuse_incomplete(part)
    name = f"part {part.name!r}"
    path = source_path(part.manifest, "checkpoint", name, "checkpoint", checkpoint)
    if path is None:
        raise UsageError(
            f"{name} was built from a model in memory: give `checkpoint`, that model or the folder it was saved to"
        )
    files = find_as_built(part, path, base, progress)
    folder = tokenizer_folder(part, tokenizer, files, progress)
    with ThreadPoolExecutor(1) as pool:  # every byte is read while tokenizer and model load
        identity = pool.submit(files.identity)
        loaded = load_tokenizer(folder)
        model = load_model(
            files,
            dtype=part.manifest["dtype"]["model"],
            device=device,
            attn_implementation=part.manifest["compute"]["attn_implementation"],
            encoder_decoder=True,
        )
        weights = identity.result()
    refuse_other_model(part, files, weights, model, loaded, folder)
    return model, tokenizer_for(
        model,
        loaded,
        of_part=True,
        takes_ids=tokenizer is not None or part.manifest["source"]["tokenizer"] is not None,
        template_date=part.manifest["tokens"]["template_date"],
    )


def tokenizer_folder(
    part: Part, tokenizer: TokenizerSource | None, checkpoint: AnyCheckpoint, progress: Progress | None = None
) -> AnyTokenizer:
    """The folder of the tokenizer of ``part``: the one the user gives, else the one that the user's own build read,
    else that of the checkpoint. The caller compares the tokenizer with the part's in any case.
    """
    if tokenizer is not None:
        return find_tokenizer(tokenizer, progress)
    recorded = part.manifest["source"]["tokenizer"]
    if recorded is None or not (is_own(part.manifest) and is_place(recorded)):
        return checkpoint.tokenizer_folder
    return find_tokenizer(recorded, progress)
