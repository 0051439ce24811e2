"""What a build reads, each opened once: the checkpoint, the corpus, and the part where it is there already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ghoststore.checkpoint.load import Checkpoint, find_checkpoint, load_model, load_tokenizer, resolve_device
from ghoststore.checkpoint.same_model import checkpoint_section, refuse_incomplete
from ghoststore.corpus import Corpus, Fields, absolute, open_corpus
from ghoststore.corpus.locate import corpus_name
from ghoststore.errors import UsageError
from ghoststore.progress import Progress
from ghoststore.software import versions_of
from ghoststore.store import Manifest, Part, Store
from ghoststore.store.base.names import check_name, safe_name
from indexer.build.settings import BuildSettings
from indexer.encode.tokens import Tokenizer, TokenSettings, embedding_rows, longest_row
from indexer.projection.adam import learning_rate_of

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, kw_only=True)
class BuildInputs:
    """Made by :func:`open_inputs`."""

    settings: BuildSettings
    checkpoint: Checkpoint
    model: Any
    tokenizer: Tokenizer
    corpus: Corpus
    part_name: str
    there: Part | None
    """The part, if it is there already."""
    device: str
    batch_tokens: int
    tokens: TokenSettings

    @property
    def stdin(self) -> bool:
        """Whether the corpus comes on standard input, which cannot be read again."""
        return str(self.settings.data) == "-"

    @cached_property
    def identity(self) -> Manifest:
        """Sections of the manifest that say which model it is."""
        stored = None if self.there is None else self.there.manifest
        return {
            "checkpoint": checkpoint_section(self.checkpoint.fingerprint(), self.model, stored),
            "tokenizer": self.tokenizer.identity,
        }

    def description(self) -> Manifest:
        """Sections of the manifest that say where everything came from, and what computes."""
        settings, folder = self.settings, self.checkpoint.folder
        return {
            "source": {
                "checkpoint": str(folder.resolve()),
                "tokenizer": _resolved(settings.tokenizer),
                "data": "-" if self.stdin else absolute(self.corpus.source),
                "form": self.corpus.form,
                "optimizer_state": _resolved(settings.optimizer_state),
                "learning_rate": learning_rate_of(folder),
            },
            "compute": {
                "device": torch.device(self.device).type,
                "attn_implementation": getattr(self.model.config, "_attn_implementation", None),
                "threads": torch.get_num_threads(),
                "gradient_checkpointing": settings.gradient_checkpointing,
            },
            "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "zarr"),
        }


def _resolved(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


@contextmanager
def open_inputs(settings: BuildSettings, progress: Progress) -> Iterator[BuildInputs]:
    """Open everything; what cannot be used is refused before a model is loaded."""
    device = resolve_device(settings.device)
    for option, value in (("--batch-tokens", settings.batch_tokens), ("--max-samples", settings.max_samples)):
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, not {value}")
    if settings.dry_run and str(settings.data) == "-":
        raise UsageError("--dry-run cannot read standard input: the corpus would be used up; give a file")
    checkpoint = find_checkpoint(settings.checkpoint)
    text_tokenizer = load_tokenizer(checkpoint.folder if settings.tokenizer is None else Path(settings.tokenizer))
    by_default = safe_name(checkpoint.folder.resolve().name, corpus_name(str(settings.data)))
    part_name = check_name(settings.name) if settings.name else by_default
    Store.refuse_others(Path(settings.store))
    there = _existing(settings.store, part_name)
    if there is not None:
        refuse_incomplete(there)
    with open_corpus(str(settings.data), settings.fields or Fields(), progress) as corpus:
        model = load_model(
            checkpoint, dtype=settings.model_dtype, device=device, attn_implementation=settings.attn_implementation
        )
        yield BuildInputs(
            settings=settings,
            checkpoint=checkpoint,
            model=model,
            tokenizer=Tokenizer(text_tokenizer, vocabulary=embedding_rows(model), note=progress.note),
            corpus=corpus,
            part_name=part_name,
            there=there,
            device=device,
            batch_tokens=settings.batch_tokens or DEFAULT_BATCH_TOKENS[torch.device(device).type],
            tokens=TokenSettings(max_length=longest_row(model, settings.max_length), overlong=settings.overlong),
        )


def _existing(store: str | Path, name: str) -> Part | None:
    """The part, if it is there already."""
    if not (Path(store) / "zarr.json").exists():
        return None
    opened = Store.open(store)
    return opened.part(name) if name in opened.part_names() else None
