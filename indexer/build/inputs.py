"""The inputs of a build, each opened once: the checkpoint, the corpus, and the part if it exists already."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ghoststore.checkpoint.find import Checkpoint
from ghoststore.checkpoint.in_memory import LoadedCheckpoint
from ghoststore.checkpoint.load import (
    AnyCheckpoint,
    find_tokenizer,
    load_model,
    load_tokenizer,
    recorded_tokenizer,
    resolve_device,
)
from ghoststore.checkpoint.same_model import checkpoint_section, refuse_incomplete
from ghoststore.corpus import Corpus, Fields, ResolvedFields, Sample, open_corpus, part_word
from ghoststore.errors import MismatchError, UsageError
from ghoststore.progress import Progress
from ghoststore.settings.build import BuildOptions
from ghoststore.settings.shared import in_memory
from ghoststore.software import versions_of
from ghoststore.store import Manifest, Part, Store
from ghoststore.store.base.names import check_name, safe_name
from ghoststore.store.base.object_path import location
from ghoststore.store.base.writable import check_writable
from indexer.build.kept_fields import checked_names
from indexer.build.like import fields_like, part_like
from indexer.build.named_part import checkpoint_of, existing_part
from indexer.encode.pairs import loss_definition, tokenizer_for
from indexer.encode.tokens import TAKEN, Tokenizer, TokenSettings, longest_row
from indexer.projection.adam import learning_rate_of

DEFAULT_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True, kw_only=True)
class BuildInputs:
    """The open inputs of a build. :func:`open_inputs` makes them."""

    options: BuildOptions
    checkpoint: AnyCheckpoint
    model: Any
    tokenizer: Tokenizer
    corpus: Corpus
    part_name: str
    existing: Part | None
    """The part, if it exists already."""
    device: str
    batch_tokens: int
    tokens: TokenSettings
    like: Part | None = None
    """The part whose projection and settings this one shares."""
    repairing: bool = False
    """Whether ``existing`` is being repaired: its own scales are then used, whatever else it has lost."""
    head: Iterable[Sample] | None = None
    """Of a stream the samples at its beginning, or where it goes on, each time anew; None for other corpora."""
    most_samples: int | None = None
    """Samples of the corpus that are read at most: those that are asked for, or those of a part that is completed or
    repaired, whose corpus may have grown since. None for all.
    """

    @cached_property
    def identity(self) -> Manifest:
        """The sections of the manifest that identify the model and the tokenizer."""
        before = self.existing or self.like
        stored = None if before is None else before.manifest
        return {
            "checkpoint": checkpoint_section(self.checkpoint.identity(), self.model, stored),
            "tokenizer": self.tokenizer.identity,
        }

    @property
    def keeps_texts(self) -> bool:
        """Whether the part keeps texts: by default those of a corpus that cannot be read again."""
        asked = self.options.store_text
        return self.corpus.recorded == "-" if asked is None else asked

    @property
    def loss(self) -> Manifest:
        """The section of the manifest that says what is differentiated."""
        return {
            "definition": loss_definition(self.model),
            "reduction": self.options.loss_reduction,
        }

    @property
    def _from_hub(self) -> bool:
        return self.corpus.stream_form is not None and not in_memory(self.options.data)

    def description(self) -> Manifest:
        """The sections of the manifest that say where the inputs are, and which hardware and software compute."""
        options, checkpoint, state = self.options, self.checkpoint, self.options.optimizer_state
        in_memory = isinstance(checkpoint, LoadedCheckpoint)
        base = None if isinstance(checkpoint, Checkpoint) else checkpoint.recorded_base
        like = None if self.like is None else {"part": self.like.name, "hash": self.like.manifest["projection"]["hash"]}
        return {
            "source": {
                "checkpoint": checkpoint.recorded,
                "tokenizer": recorded_tokenizer(options.tokenizer),
                "data": self.corpus.recorded,
                "form": self.corpus.form,
                **({"stream": self.corpus.source} if self._from_hub else {}),
                "optimizer_state": None if state is None else str(Path(state).resolve()),
                "learning_rate": None if in_memory else learning_rate_of(checkpoint.folder),
                **({} if base is None else {"base": base}),
                **({} if like is None else {"like": like}),
            },
            "compute": {
                "device": torch.device(self.device).type,
                "attn_implementation": getattr(self.model.config, "_attn_implementation", None),
                "threads": torch.get_num_threads(),
                "gradient_checkpointing": options.gradient_checkpointing,
            },
            "software": versions_of("ghoststore", "torch", "transformers", "tokenizers", "numpy", "zarr"),
        }


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model of a build, and the checkpoint that it was loaded from."""

    checkpoint: AnyCheckpoint
    model: Any

    @classmethod
    def of(cls, options: BuildOptions, progress: Progress, checkpoint: AnyCheckpoint | None = None) -> LoadedModel:
        """The model that ``options`` name; ``checkpoint`` is theirs, if it was found already."""
        if checkpoint is None:
            checkpoint = checkpoint_of(options, progress)
        model = load_model(
            checkpoint,
            dtype=options.model_dtype,
            device=resolve_device(options.device, options.model),
            attn_implementation=options.attn_implementation,
            encoder_decoder=True,
            progress=progress,
        )
        return cls(checkpoint, model)


@contextmanager
def open_inputs(
    options: BuildOptions,
    progress: Progress,
    repaired: Part | None = None,
    checked: Callable[[int], Collection[int]] | None = None,
    ahead: LoadedModel | None = None,
) -> Iterator[BuildInputs]:
    """Open all inputs. Those that cannot be used are refused before the model is loaded (unless it was, ``ahead``), and
    so is a damaged part, unless it is ``repaired``: of its committed spans those that ``checked`` names by their
    number, by default all, are read for that.
    """
    device = resolve_device(options.device, options.model)
    checkpoint = checkpoint_of(options, progress) if ahead is None else ahead.checkpoint
    given = options.tokenizer
    text_tokenizer = load_tokenizer(checkpoint.tokenizer_folder if given is None else find_tokenizer(given, progress))
    name = check_name(options.name) if options.name else safe_name(checkpoint.name, part_word(options.data))
    Store.refuse_others(location(options.store))
    like = None if options.like is None else part_like(options)
    if like is not None and like.name == name:
        raise UsageError(f"`name` is {name!r}, that of the part that the new one is like: give another `name`")
    existing = repaired or existing_part(options.store, name, progress, checked)
    if existing is not None:
        refuse_incomplete(existing)
    if not options.dry_run and not (existing is not None and existing.complete):
        check_writable(location(options.store) / "parts" if existing is None else existing.path)
    if existing is not None and (existing.layout.stream is not None) != options.streams:
        was, give = ("no stream", "leave `stream` out") if options.streams else ("a stream", "give `stream`")
        raise MismatchError(
            f"part {name!r} of {options.store} was built from {was}: {give} to continue it, or give another `name` for "
            "a new one"
        )
    with open_corpus(options.data, _fields(options, repaired, like), progress, stream=options.streams) as corpus:
        corpus = corpus.keeping(checked_names(options.keep_fields, corpus))
        model = (ahead or LoadedModel.of(options, progress, checkpoint)).model
        before = existing or like
        tokenizer = tokenizer_for(
            model,
            text_tokenizer,
            note=progress.note,
            # The date in the rows that exist, so that a build that continues on another day makes the same tokens.
            takes_ids=given is not None,
            template_date=corpus.template_date if before is None else before.manifest["tokens"]["template_date"],
        )
        max_length = longest_row(model, options.max_length)
        corpus.cut_stream(max_length)
        if corpus.nameless and given is not None:
            progress.note(f"{corpus.source}: {TAKEN}")
        yield BuildInputs(
            options=options,
            checkpoint=checkpoint,
            model=model,
            tokenizer=tokenizer,
            corpus=corpus,
            part_name=name,
            existing=existing,
            device=device,
            batch_tokens=options.batch_tokens or DEFAULT_BATCH_TOKENS[torch.device(device).type],
            tokens=TokenSettings(
                max_length=max_length,
                overlong=options.overlong,
                template_date=tokenizer.template_date,
            ),
            like=like,
            repairing=repaired is not None,
            most_samples=_most_samples(options, existing, repairing=repaired is not None),
        )


def _most_samples(options: BuildOptions, existing: Part | None, *, repairing: bool) -> int | None:
    """See :attr:`BuildInputs.most_samples`. Where another ``max_samples`` is asked for, the part is not continued."""
    asked = options.max_samples
    if options.streams:
        return asked
    if existing is None or (existing.complete and not repairing) or existing.manifest["corpus"]["max_samples"] != asked:
        return asked
    return int(existing.manifest["corpus"]["samples"])


def _fields(options: BuildOptions, repaired: Part | None, like: Part | None) -> Fields | ResolvedFields:
    if repaired is not None:
        return ResolvedFields.from_json(repaired.manifest["corpus"]["fields"])
    if like is not None and options.fields is None:
        return fields_like(like, options.data, stream=options.streams)
    return options.fields or Fields()
