"""The model, tokens and projection of a part once more: what its rows are compared with, and its rows again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ghoststore.checkpoint.load import find_checkpoint, load_model, load_tokenizer
from ghoststore.checkpoint.same_model import refuse_incomplete, refuse_other_model
from ghoststore.corpus import Sample
from ghoststore.progress import Task
from ghoststore.store import Part
from indexer.encode.encoder import RowEncoder, encode_rows
from indexer.encode.tokens import Row, Tokenizer, TokenSettings, embedding_rows, rows_of
from indexer.projection.plan import ProjectionPlan
from indexer.projection.stored import projection_of


class PartEncoder:
    """Samples to vectors, as the build of ``part`` makes them: ``with PartEncoder(part, device="cpu") as encoder``.

    With ``blocks`` a vector is the Kronecker blocks before the sketch, :attr:`groups` their columns. MismatchError if
    checkpoint, tokenizer or projection are not the part's; ``checkpoint`` is another place of the same weights.
    """

    def __init__(self, part: Part, *, checkpoint: str | Path | None = None, device: str, blocks: bool = False) -> None:
        model, self._tokenizer = load_for(part, checkpoint, device)
        projection = projection_of(part, model)
        if blocks:
            projection = projection.unsketched()
        self.groups = projection.plan.groups
        """(name, first column, one past the last) of each block of a vector."""
        self.dimension = projection.plan.dimension
        self._settings = TokenSettings(**part.manifest["tokens"])
        self._batch_tokens = int(part.manifest["batching"]["batch_tokens"])
        self._encoder = RowEncoder(
            model,
            projection,
            reduction=part.manifest["loss"]["reduction"],
            padding=part.manifest["batching"]["padding"],
        )

    @property
    def model(self) -> Any:
        """The model itself; free for other uses while the encoder is not entered."""
        return self._encoder.engine.model

    @property
    def plan(self) -> ProjectionPlan:
        """Layers and ranks of the projection."""
        return self._encoder.engine.projection.plan

    def __enter__(self) -> PartEncoder:
        self._encoder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._encoder.__exit__(kind, error, trace)

    def rows(self, samples: Iterable[Sample], note: Callable[[str], None] | None = None) -> Iterator[Row]:
        """The rows of ``samples``, in order, tokenized some hundred at a time; all of them at once where the tokenizer
        has tokens that the model's embedding lacks, so that a row with one is refused (UsageError) before any work.
        ``note`` is told what the chat template leaves out.
        """
        self._tokenizer.note = note
        rows = rows_of(samples, self._tokenizer, self._settings)
        return iter(list(rows)) if self._tokenizer.exceeds else rows

    def vectors(self, rows: Sequence[Row], task: Task) -> Tensor:
        """(rows, D) float32 on the CPU; zeros for rows without a usable status."""
        return encode_rows(self._encoder, rows, self._batch_tokens, task).vectors


def load_for(part: Part, checkpoint: str | Path | None, device: str) -> tuple[Any, Tokenizer]:
    """The model and tokenizer of ``part``, from where it was built or from another path to the same weights.

    MismatchError naming every field that is not the same, with both values, and for a part of an unreleased version,
    which does not say what it is of.
    """
    refuse_incomplete(part)
    source = part.manifest["source"]
    found = find_checkpoint(checkpoint if checkpoint is not None else source["checkpoint"])
    with ThreadPoolExecutor(1) as pool:  # every byte is read while tokenizer and model load
        fingerprint = pool.submit(found.fingerprint)
        folder = Path(source["tokenizer"]) if source["tokenizer"] else found.folder
        tokenizer = load_tokenizer(folder)
        model = load_model(
            found,
            dtype=part.manifest["dtype"]["model"],
            device=device,
            attn_implementation=part.manifest["compute"]["attn_implementation"],
        )
        weights = fingerprint.result()
    refuse_other_model(part, found, weights, model, tokenizer, folder)
    return model, Tokenizer(tokenizer, vocabulary=embedding_rows(model))
