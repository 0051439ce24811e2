"""The inputs of a training: weights, tokenizer, tokens and val set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ghoststore.checkpoint.find import Checkpoint, find_folder
from ghoststore.checkpoint.in_memory import tokenizer_source
from ghoststore.checkpoint.load import (
    AnyTokenizer,
    find_tokenizer,
    load_model,
    load_tokenizer,
)
from ghoststore.checkpoint.same_model import tokenizer_lines
from ghoststore.checkpoint.tokenizer_identity import tokenizer_identity
from ghoststore.corpus import Fields, Source, open_corpus
from ghoststore.errors import BusyError, MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.build import TokenizeOptions
from ghoststore.settings.shared import TokenizerSource
from ghoststore.settings.train import TrainConfig
from ghoststore.tokens.manifest import MANIFEST, TOKENIZER
from ghoststore.tokens.shards import TokenShards
from indexer.encode.tokens import TAKEN, Tokenizer
from indexer.session.ranks import Ranks
from indexer.tokenize.tokenize import tokenize_as_of
from indexer.training.architectures import architecture, new_model, new_model_of
from indexer.training.data import Order, TrainingRows
from indexer.training.validation import ValSet


@dataclass(frozen=True, slots=True)
class Start:
    """Where the weights (None: a new model) and the tokenizer come from. Made by :meth:`find`."""

    checkpoint: Checkpoint | None
    tokenizer: Any
    tokenizer_folder: AnyTokenizer

    @classmethod
    def find(
        cls, checkpoint: str | Path | None, tokenizer: TokenizerSource | None, data: Source, progress: Progress
    ) -> Start:
        """The checkpoint, and the tokenizer of the folder given, of the checkpoint, or of the token shards."""
        source = None if checkpoint is None else find_folder(checkpoint, progress=progress)
        folder: AnyTokenizer
        if tokenizer is not None:
            folder = find_tokenizer(tokenizer, progress)
        elif source is not None:
            folder = source.folder
        elif is_shards(data):
            folder = Path(str(data)) / TOKENIZER
        else:
            raise UsageError("give `tokenizer`: a new model has none, and the data are not tokenized yet")
        return cls(source, load_tokenizer(folder), folder)

    def model(self, config: TrainConfig, device: str, resume_from: Path | None, progress: Progress) -> Any:
        """The model, every parameter trainable, in its dtype and on ``device``; of ``resume_from`` if there is one."""
        source = find_folder(resume_from) if resume_from is not None else self.checkpoint
        if source is not None:
            model = load_model(source, dtype=config.model_dtype, device=device, progress=progress)
        else:
            if config.architecture is not None:
                shape = architecture(config.architecture, self.tokenizer, dropout=config.dropout)
                model = new_model(shape, seed=config.seed)
            else:
                assert config.model_config is not None
                model = new_model_of(config.model_config, seed=config.seed)
            model = model.to(device=device, dtype=getattr(torch, config.model_dtype))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.loss_type = "ForCausalLM"
        if config.gradient_checkpointing:
            _checkpoint_activations(model)
        return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Model, rows and val set of a training, read once before the first step."""

    start: Start
    model: Any
    rows: TrainingRows
    domains: tuple[str, ...]
    """Those of the rows that were asked for; empty: all."""
    val: ValSet | None
    order: Order
    steps: int
    max_length: int


def _checkpoint_activations(model: Any) -> None:
    """Have every layer that can recompute its activations do so in training mode. Set by hand, without the hooks of
    transformers' own function.
    """
    able = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not able:
        raise UsageError(f"`gradient_checkpointing`: {type(model).__name__} does not support it")
    for module in able:
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def is_shards(data: Source) -> bool:
    """Whether ``data`` is a folder of token shards."""
    return isinstance(data, str) and (Path(data) / MANIFEST).is_file()


def read_val(
    source: Source,
    fields: Fields,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    max_samples: int | None,
    seed: int,
    progress: Progress,
) -> ValSet:
    """The val set, with a note on rows of it that cannot be used."""
    with open_corpus(source, fields, progress) as corpus:
        val = ValSet.read(corpus, tokenizer, max_length, max_samples=max_samples, seed=seed)
        if corpus.nameless:
            progress.note(f"{corpus.source}: {TAKEN}")
    if val.left_out:
        shown = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in sorted(val.left_out.items()))
        progress.note(f"val rows left out: {shown}; {len(val.rows):,} are used")
    return val


def token_shards(
    data: Source,
    start: Start,
    output_dir: Path,
    *,
    fields: Fields,
    max_samples: int | None,
    max_length: int,
    tokenizer: Tokenizer,
    ranks: Ranks,
    progress: Progress,
) -> TokenShards:
    """The token shards at ``data``, or those of the corpus there, made in ``output_dir/tokens`` by the rank that leads.

    The chat template writes the date of ``tokenizer`` into those that are made; rows of a stream of ids have
    ``max_length`` tokens. MismatchError for tokens of another tokenizer, or of another corpus than it was.
    """
    folder = Path(str(data))
    if is_shards(data):
        if max_samples is not None:
            raise UsageError("`max_samples` belongs to a corpus; token shards are taken whole")
    else:
        folder = output_dir / "tokens"
        options = TokenizeOptions(
            data=data,
            tokenizer=tokenizer_source(start.tokenizer_folder),
            out=folder,
            fields=fields,
            max_samples=max_samples,
            progress=progress,
        )
        ranks.led(lambda: _tokenize(options, tokenizer, max_length))
    shards = TokenShards.open(folder)
    identity = tokenizer_identity(start.tokenizer)
    if shards.tokenizer_identity != identity:
        raise MismatchError(
            f"the tokens in {folder} are of another tokenizer than that in {start.tokenizer_folder}:\n"
            f"{tokenizer_lines(shards.tokenizer_identity, identity)}\n"
            "Give `tokenizer` the one that made them, or tokenize the corpus again"
        )
    return shards


def _tokenize(options: TokenizeOptions, tokenizer: Tokenizer, max_length: int) -> None:
    try:
        tokenize_as_of(options, tokenizer.template_date, stream_rows=max_length, takes_ids=tokenizer.takes_ids)
    except (MismatchError, BusyError, UsageError) as error:
        # The parameter with which to choose another folder is not that of `tokenize` here.
        raise type(error)(re.sub(r"`out\b", "`output_dir", str(error))) from error
