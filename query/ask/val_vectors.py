"""The vectors of a question's val sets: computed by the model of a part, or kept from an earlier question.

They are kept in the user's folder for caches. They are used where the part, the val set, the settings, the files of the
model and of the tokenizer, and the software are what they were: the answer has the same bits, and no model is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ghoststore.checkpoint.adapter import AdapterCheckpoint
from ghoststore.checkpoint.load import resolve_device
from ghoststore.checkpoint.nanogpt import is_checkpoint_file
from ghoststore.checkpoint.same_model import find_as_built
from ghoststore.corpus import Corpus
from ghoststore.errors import CorpusError, GhostStoreError
from ghoststore.progress import Progress, Task
from ghoststore.settings.option import in_objects
from ghoststore.settings.shared import Checkpoint
from ghoststore.software import versions_of
from ghoststore.store import Part
from ghoststore.store.base.disk import appearing
from ghoststore.store.base.object_path import cache_folder
from ghoststore.store.base.own import source_path
from query.ask.encoder import PartEncoder, ValVectors, tokenizer_folder
from query.ask.question import Grouping, Question

NEWEST, MOST = 256, 256 << 20
"""Val sets whose vectors are kept, and bytes of them all."""
SOFTWARE = ("ghoststore", "torch", "transformers", "tokenizers", "peft", "numpy")


@dataclass(frozen=True, slots=True)
class _ValSet:
    """A corpus, and what of it is asked with."""

    corpus: Corpus
    grouping: Grouping
    max_samples: int | None = None
    phrase: str | None = None

    def encoded(self, encoder: PartEncoder) -> ValVectors:
        return encoder.encode_val_set(self.corpus, self.grouping, self.max_samples, self.phrase)


def val_vectors(
    question: Question,
    part: Part,
    checkpoint: Checkpoint | None,
    val_set: Corpus,
    minus: Corpus | None,
    progress: Progress,
    *,
    encoder: PartEncoder | None = None,
    keep: bool = False,
) -> tuple[ValVectors, ValVectors | None, PartEncoder | None]:
    """(vectors of ``val_set``, those of ``minus``, the encoder that made them: None where none was needed).

    ``encoder`` is one that is open already. With ``keep`` vectors are those of an earlier question where they are kept,
    and new ones are. Raises what :class:`PartEncoder` and its ``encode_val_set`` raise.
    """
    wanted = [_ValSet(val_set, question.grouping, question.max_samples, question.phrase)]
    wanted += [] if minus is None else [_ValSet(minus, "mean")]
    cache = _Kept(part, question, checkpoint, progress) if keep else None
    if cache is not None and not cache.possible:
        cache = None
    heard = _Heard(progress)
    found = [None if cache is None else cache.read(one) for one in wanted]
    if cache is not None and all(found):
        cache.repeat_notes()
    elif encoder is None:
        encoder = PartEncoder(
            part,
            checkpoint=checkpoint,
            base=question.base,
            tokenizer=question.tokenizer,
            data=question.data,
            device=question.device,
            progress=progress if cache is None else heard,
        )
    vectors: list[ValVectors] = []
    for one, kept in zip(wanted, found, strict=True):
        if (val := kept) is None:
            assert encoder is not None
            val = one.encoded(encoder)
            if cache is not None:
                cache.keep(one, val, heard.notes)
        val.note_left_out(progress, "val" if not vectors else "`minus`")
        vectors.append(val)
    return vectors[0], None if minus is None else vectors[1], encoder


class _Heard:
    """A listener that hands everything on, and remembers the notes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.notes: list[str] = []

    def task(self, description: str, total: int | None, done: int = 0, unit: str = "rows") -> Task:
        return self._progress.task(description, total, done, unit)

    def note(self, message: str) -> None:
        self.notes.append(message)
        self._progress.note(message)


class _Kept:
    """The kept vectors of ``part`` for val sets that are asked about as ``question`` asks."""

    def __init__(self, part: Part, question: Question, checkpoint: Checkpoint | None, progress: Progress) -> None:
        self._part, self._question, self._checkpoint, self._progress = part, question, checkpoint, progress
        self._keys: dict[int, str] = {}
        self._notes: dict[str, None] = {}

    @property
    def possible(self) -> bool:
        """Whether it can be told what vectors depend on."""
        return self._made_with is not None

    @cached_property
    def _made_with(self) -> dict[str, Any] | None:
        """What vectors depend on besides the val set; None where that cannot be told without opening the model."""
        files = self._files()
        if files is None:
            return None
        return {
            "part": self._part.identity,
            "files": sorted(files),
            "device": resolve_device(self._question.device, self._checkpoint),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "precision": torch.get_float32_matmul_precision(),
            "software": versions_of(*SOFTWARE),
        }

    def _files(self) -> list[tuple[str, int, int, int]] | None:
        """(path, bytes, time of the last change, inode) of every file beside weights and tokenizer."""
        member, question = self._part.members[0], self._question
        try:
            path = source_path(member.manifest, "checkpoint", "the part", "checkpoint", self._checkpoint)
            if not _is_local(path) or is_checkpoint_file(path):
                return None
            if question.tokenizer is not None and not _is_local(question.tokenizer):
                return None
            found = find_as_built(member, path, question.base)
            tokenizer = tokenizer_folder(member, question.tokenizer, found)
            if not isinstance(tokenizer, Path):
                return None
            folders = {found.folder, tokenizer, *([found.base.folder] if isinstance(found, AdapterCheckpoint) else [])}
            return [entry for folder in folders for entry in _entries(folder)]
        except (GhostStoreError, OSError):
            return None  # it is told when the model is opened

    def _key(self, one: _ValSet) -> str | None:
        """A hash of the val set and of all that its vectors depend on; None where it cannot be kept."""
        if self._made_with is None or one.corpus.stream_form is not None:
            return None
        if id(one) not in self._keys:
            one.corpus.cut_stream(int(self._part.manifest["tokens"]["max_length"]))
            how = {"grouping": one.grouping, "phrase": one.phrase}
            digest = hashlib.sha256(orjson.dumps([self._made_with, how]))
            for sample in islice(one.corpus.samples(), one.max_samples):
                digest.update(f"\n{sample.source_row} {len(canonical := sample.canonical())}\n".encode() + canonical)
            self._keys[id(one)] = digest.hexdigest()[:32]
        return self._keys[id(one)]

    def _path(self, one: _ValSet) -> Path | None:
        key = self._key(one)
        return None if key is None else cache_folder() / "val-sets" / f"{key}.safetensors"

    def read(self, one: _ValSet) -> ValVectors | None:
        """The kept vectors of a val set, or None: also where the file is damaged. CorpusError for a row that is no
        sample.
        """
        try:
            path = self._path(one)
            if path is None or not path.is_file():
                return None
            with safe_open(path, framework="pt") as file:
                vectors, record = file.get_tensor("vectors"), (file.metadata() or {})["facts"]
                if (file.metadata() or {})["sha256"] != _sha256(vectors, record):
                    return None
            facts = orjson.loads(record)
            notes = facts.pop("notes")
            val = ValVectors(vectors=vectors, **facts)
            os.utime(path)  # the newest are kept
        except CorpusError:
            raise  # before a model is loaded
        except (GhostStoreError, OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None
        self._notes |= dict.fromkeys(notes)
        return val

    def repeat_notes(self) -> None:
        """Say what was said when the vectors were computed."""
        for note in self._notes:
            self._progress.note(note)

    def keep(self, one: _ValSet, val: ValVectors, notes: list[str]) -> None:
        """Keep the vectors of a val set, and the newest others. Nothing is lost where they cannot be written."""
        size = val.vectors.numel() * val.vectors.element_size()
        with suppress(GhostStoreError, OSError, SafetensorError):
            path = self._path(one)
            if path is None or size > MOST:
                return
            record = orjson.dumps({name: getattr(val, name) for name in _FACTS} | {"notes": notes}).decode()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with appearing(path, over=True) as begun:
                vectors = val.vectors.contiguous()
                save_file({"vectors": vectors}, begun, {"facts": record, "sha256": _sha256(vectors, record)})
            _keep_newest(path.parent)


def _sha256(vectors: Tensor, facts: str) -> str:
    return hashlib.sha256(vectors.numpy().tobytes() + facts.encode()).hexdigest()


def _keep_newest(folder: Path) -> None:
    """Remove all but the ``NEWEST`` files, and the oldest of those while all have more than ``MOST`` bytes."""
    files = [(path.stat(), path) for path in folder.glob("*.safetensors")]
    kept = 0
    for place, (state, path) in enumerate(sorted(files, key=lambda file: file[0].st_mtime_ns, reverse=True)):
        kept += state.st_size
        if place >= NEWEST or kept > MOST:
            path.unlink(missing_ok=True)


_FACTS = [field.name for field in fields(ValVectors) if field.name != "vectors"]


def _is_local(source: object) -> bool:
    return isinstance(source, str | Path) and not in_objects(source)


def _entries(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    for path in folder.iterdir():
        if path.is_file():
            state = path.stat()
            yield str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino
