"""Vectors of val sets in the user's folder for caches, so that the same val set asks again without a model.

They are used where the part, the val set, the settings, the files of the model and of the tokenizer, and the software
are what they were. Then the answer has the same bits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, fields
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
from ghoststore.corpus import Corpus, Sample
from ghoststore.corpus.content import Messages, Tokenized
from ghoststore.errors import CorpusError, GhostStoreError
from ghoststore.settings.option import in_objects
from ghoststore.settings.shared import Checkpoint
from ghoststore.software import versions_of
from ghoststore.store import Part
from ghoststore.store.base.disk import appearing
from ghoststore.store.base.object_path import cache_folder
from ghoststore.store.base.own import source_path
from ghoststore.store.base.writers import left_behind
from ghoststore.store.walk import is_unfinished
from query.ask.encoder import PartEncoder, ValVectors, tokenizer_folder
from query.ask.question import Grouping, Question

NEWEST, MOST = 256, 256 << 20
"""Val sets whose vectors are kept, and bytes of them all."""
SOFTWARE = ("ghoststore", "torch", "transformers", "tokenizers", "peft", "numpy")
VARIABLES = ("ATEN_", "CUBLAS_", "CUDA_", "CUDNN_", "KMP_", "MKL_", "NVIDIA_", "OMP_", "ONEDNN_", "PYTORCH_", "TORCH_")
"""How variables of the environment begin that may change how numbers are computed."""
TEMPLATES = "additional_chat_templates"
NOT_KEPT = (GhostStoreError, OSError, SafetensorError, ValueError, KeyError, TypeError)
"""What a folder, a file of it or a val set may be that nothing is kept of."""
FACTS = [field.name for field in fields(ValVectors) if field.name != "vectors"]


@dataclass(frozen=True, slots=True)
class ValSet:
    """A corpus, and what of it is asked with."""

    corpus: Corpus
    grouping: Grouping
    max_samples: int | None = None
    phrase: str | None = None

    def encoded(self, encoder: PartEncoder) -> ValVectors:
        """Its vectors."""
        return encoder.encode_val_set(self.corpus, self.grouping, self.max_samples, self.phrase)

    def hashed(self) -> bytes | None:
        """A hash of all that is asked with, read now; None of token ids, for which a tokenizer has to answer, and of
        values of Python that have no one form. CorpusError for a row that is no sample.
        """
        most = self.max_samples if self.phrase is None else min(2, self.max_samples or 2)
        return _joined(map(_exactly, islice(self.corpus.samples(), most)))

    def encoded_and_hashed(self, encoder: PartEncoder) -> tuple[ValVectors, bytes | None]:
        """Its vectors, and the hash of those samples that they were computed of: a file may have changed meanwhile."""
        seen: list[bytes | None] = []

        def samples(*args: Any) -> Iterator[Sample]:
            for sample in self.corpus.samples(*args):
                seen.append(_exactly(sample))
                yield sample

        watched = copy(self.corpus)
        watched.samples = samples  # type: ignore[method-assign, assignment]
        val = encoder.encode_val_set(watched, self.grouping, self.max_samples, self.phrase)
        return val, _joined(seen)


class KeptVectors:
    """The kept vectors of ``part`` for val sets that are asked about as ``question`` asks."""

    def __init__(self, part: Part, question: Question, checkpoint: Checkpoint | None, made_with: bytes) -> None:
        self._part, self._question, self._checkpoint, self._made_with = part, question, checkpoint, made_with

    @classmethod
    def of(cls, part: Part, question: Question, checkpoint: Checkpoint | None) -> KeptVectors | None:
        """None where it cannot be told, without opening the model, what vectors depend on."""
        made_with = _made_with(part, question, checkpoint)
        return None if made_with is None else cls(part, question, checkpoint, made_with)

    def read(self, one: ValSet) -> tuple[ValVectors, list[str]] | None:
        """(the kept vectors of a val set, what was noted when they were computed), or None: also where the file is
        damaged. CorpusError for a row that is no sample.
        """
        try:
            if one.corpus.stream_form is not None:
                return None
            one.corpus.cut_stream(int(self._part.manifest["tokens"]["max_length"]))
            content = one.hashed()
            if content is None or not (path := self._path(one, content)).is_file():
                return None
            with safe_open(path, framework="pt") as file:
                vectors, told = file.get_tensor("vectors"), file.metadata()
            if told["sha256"] != _sha256(vectors, told["facts"]):
                return None
            facts = orjson.loads(told["facts"])
            notes = facts.pop("notes")
            val = ValVectors(vectors=vectors, **facts)
            os.utime(path)  # the newest are kept
        except CorpusError:
            raise  # before a model is loaded
        except NOT_KEPT:
            return None
        return val, notes

    def keep(self, one: ValSet, val: ValVectors, content: bytes | None, notes: list[str]) -> None:
        """Keep the vectors of a val set whose samples have the hash ``content``, and the newest others.

        Nothing is lost where they cannot be written, and nothing kept of a model whose files changed while it was read.
        """
        size = val.vectors.numel() * val.vectors.element_size()
        with suppress(*NOT_KEPT):
            if content is None or size > MOST or one.corpus.stream_form is not None:
                return
            if self._made_with != _made_with(self._part, self._question, self._checkpoint):
                return
            path = self._path(one, content)
            facts = orjson.dumps({name: getattr(val, name) for name in FACTS} | {"notes": notes}).decode()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with appearing(path, over=True) as begun:
                vectors = val.vectors.contiguous()
                save_file({"vectors": vectors}, begun, {"facts": facts, "sha256": _sha256(vectors, facts)})
            _keep_newest(path.parent)

    def _path(self, one: ValSet, content: bytes) -> Path:
        how = repr((one.grouping, one.phrase)).encode()
        name = hashlib.sha256(b"\n".join((self._made_with, how, content))).hexdigest()[:32]
        return cache_folder() / "val-sets" / f"{name}.safetensors"


def _made_with(part: Part, question: Question, checkpoint: Checkpoint | None) -> bytes | None:
    """What vectors depend on besides the val set; None where that cannot be told without opening the model."""
    cuda = torch.backends.cuda
    try:
        files = _files(part.members[0], question, checkpoint)
        if files is None:
            return None
        told = {
            "part": part.identity,
            "files": sorted(files),
            "device": resolve_device(question.device, checkpoint),
            "processor": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "precision": [torch.get_float32_matmul_precision(), str(torch.get_default_dtype())],
            "kernels": [
                *(getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in ("flash", "mem_efficient", "math", "cudnn")),
                cuda.matmul.allow_tf32,
                torch.backends.cudnn.allow_tf32,
                torch.backends.mkldnn.enabled,
                torch.are_deterministic_algorithms_enabled(),
            ],
            "environment": sorted(pair for pair in os.environ.items() if pair[0].startswith(VARIABLES)),
            "software": versions_of(*SOFTWARE),
        }
        return repr(told).encode(errors="surrogatepass")
    except NOT_KEPT:
        return None  # what is wrong is told when the model is opened


def _files(part: Part, question: Question, checkpoint: Checkpoint | None) -> list[tuple[str, tuple[int, ...]]] | None:
    """(path, bytes, times of the last change, inode) of every file beside weights and tokenizer."""
    path = source_path(part.manifest, "checkpoint", "the part", "checkpoint", checkpoint)
    if not _is_local(path) or is_checkpoint_file(path):
        return None
    if question.tokenizer is not None and not _is_local(question.tokenizer):
        return None
    found = find_as_built(part, path, question.base)
    tokenizer = tokenizer_folder(part, question.tokenizer, found)
    if not isinstance(tokenizer, Path):
        return None
    folders = {found.folder, tokenizer, *([found.base.folder] if isinstance(found, AdapterCheckpoint) else [])}
    folders |= {folder / TEMPLATES for folder in folders if (folder / TEMPLATES).is_dir()}
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    states = [path.stat() for path in files]
    return [
        (str(path.resolve()), (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
        for path, state in zip(files, states, strict=True)
    ]


def _is_local(source: object) -> bool:
    return isinstance(source, str | Path) and not in_objects(source)


def _joined(hashes: Iterable[bytes | None]) -> bytes | None:
    digest = hashlib.sha256()
    for each in hashes:
        if each is None:
            return None
        digest.update(each)
    return digest.digest()


def _exactly(sample: Sample) -> bytes | None:
    """A hash of a sample's place, id, domain and content, in which the keys of a message keep their order: a chat
    template may print them. None of what has no one form.
    """
    content = sample.content
    if isinstance(content, Tokenized):
        return None
    if isinstance(content, Messages) and not _is_plain([content.messages, content.tools, content.documents]):
        return None
    told = repr((sample.source_row, sample.id, sample.domain, content))
    return hashlib.sha256(told.encode(errors="surrogatepass")).digest()


def _is_plain(value: object) -> bool:
    """Whether ``repr`` tells all of ``value``."""
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _sha256(vectors: Tensor, facts: str) -> str:
    return hashlib.sha256(vectors.numpy().tobytes() + facts.encode()).hexdigest()


def _keep_newest(folder: Path) -> None:
    """Remove what killed processes left, all but the ``NEWEST`` files, and the oldest while all have more than ``MOST``
    bytes.
    """
    for path in folder.iterdir():
        if is_unfinished(path.name) and left_behind(path, set()):
            path.unlink(missing_ok=True)
    files = [(path.stat(), path) for path in folder.glob("*.safetensors") if not is_unfinished(path.name)]
    kept = 0
    for place, (state, path) in enumerate(sorted(files, key=lambda file: file[0].st_mtime_ns, reverse=True)):
        kept += state.st_size
        if place >= NEWEST or kept > MOST:
            path.unlink(missing_ok=True)
