"""Finding, checking and fingerprinting checkpoints in transformers' format. Weights are read only from safetensors
files.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.bounds import ADAPTER_CONFIG, CONFIG, check_config, check_files, read_object
from ghoststore.checkpoint.nanogpt import SUFFIXES, is_checkpoint_file
from ghoststore.checkpoint.objects import copied, naming_address, place_of, recorded_place
from ghoststore.checkpoint.quantised import refuse_unreadable
from ghoststore.errors import CheckpointError
from ghoststore.progress import Progress
from ghoststore.settings.option import in_objects
from ghoststore.store.base.opening import open_regular, parse_json

LARGEST_HEADER = 256 << 20
TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
CHECKPOINT_PATTERNS = (*TOKENIZER_PATTERNS, "*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "pytorch_model.pt")


@dataclass(frozen=True, slots=True)
class InFolder:
    """What lies in a folder: a model, or an adapter."""

    folder: Path

    @property
    def name(self) -> str:
        """A name for it, used in default names."""
        return self.folder.resolve().name

    @property
    def recorded(self) -> str:
        """What a manifest records of where it lies."""
        return recorded_place(self.folder)


@dataclass(frozen=True, slots=True)
class Checkpoint(InFolder):
    """A folder with a model: ``config.json`` and safetensors files. :func:`find_checkpoint` makes it."""

    weights: tuple[Path, ...]
    """The safetensors files, sorted by name."""

    def identity(self) -> dict[str, Any]:
        """What a manifest records of its weights: their ``fingerprint``."""
        return {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """The SHA-256 (``sha256:…``) of the name, dtype, shape and bytes of every tensor. How tensors are divided among
        files does not change it.
        """
        return fingerprint_weights(self.weights)

    @property
    def where(self) -> str:
        """What messages call it."""
        return place_of(self.folder)

    @property
    def config_where(self) -> str:
        """What messages call its configuration."""
        return f"{self.where}/{CONFIG}"

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of its own tokenizer."""
        return self.folder

    def numbers(self) -> int:
        """The number of numbers in all tensors, from the headers of the files."""
        return sum(math.prod(shape) for shape in self.shapes())

    def shapes(self) -> list[list[int]]:
        """The shape of every tensor, from the headers of the files. CheckpointError for a damaged file."""
        return [entry["shape"] for path in self.weights for entry in tensors_of(path)[1].values()]


def locate(source: str | Path, progress: Progress | None = None) -> Path:
    """The folder of a checkpoint: ``source``, or where the files of a hub id or of an address in object storage are
    (copied unless it is cached, of which ``progress`` hears). CheckpointError if it is none.
    """
    if in_objects(source):
        folder = copied(source, CHECKPOINT_PATTERNS, suffixes=SUFFIXES, progress=progress)
    elif not exists(folder := Path(source), "checkpoint"):
        if folder.suffix in SUFFIXES:
            raise CheckpointError(f"checkpoint {source}: there is no such file")
        folder = from_hub(str(source))
    if is_checkpoint_file(folder):
        raise CheckpointError(
            f"checkpoint {source} is a file, and a folder in transformers' format is expected here; one of nanoGPT "
            f"becomes such a folder so: ghoststore.load_nanogpt({str(source)!r}).save_pretrained(folder)"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {source} is a file; give the folder that transformers' save_pretrained wrote"
        )
    return folder


def find_folder(source: str | Path, *, beside_adapter: bool = False, progress: Progress | None = None) -> Checkpoint:
    """The whole model in a folder, in object storage, or of a hub id (downloaded unless it is cached).

    CheckpointError as :func:`ghoststore.checkpoint.load.find_checkpoint`, and for an adapter; also for one beside the
    model, unless ``beside_adapter``: then it is left out.
    """
    folder = locate(source, progress)
    with naming_address(folder):
        return _whole_alone(folder, beside_adapter=beside_adapter)


def _whole_alone(folder: Path, *, beside_adapter: bool) -> Checkpoint:
    if (folder / ADAPTER_CONFIG).exists() and holds_model(folder) and not beside_adapter:
        raise CheckpointError(
            f"checkpoint {folder} holds a model and an adapter, and a whole model is expected here: give a folder with "
            "the one that you mean (the model alone, or that of model.merge_and_unload().save_pretrained(folder))"
        )
    if (folder / ADAPTER_CONFIG).exists() and not holds_model(folder):
        raise CheckpointError(
            f"checkpoint {folder} is an adapter, and a whole model is expected here: merge it into its base, "
            "model.merge_and_unload().save_pretrained(folder), and give that folder"
        )
    return whole_model(folder)


def holds_model(folder: Path) -> bool:
    """Whether a folder has the configuration and weights of a whole model."""
    return (folder / CONFIG).is_file() and bool(_weight_files(folder))


def whole_model(folder: Path) -> Checkpoint:
    """The model in a folder, whatever lies beside it. CheckpointError as :func:`find_folder`."""
    with naming_address(folder):
        return _whole_model(folder)


def _whole_model(folder: Path) -> Checkpoint:
    if not (folder / CONFIG).is_file():
        files = sorted(filter(is_checkpoint_file, folder.iterdir()))
        hint = f", or the file of nanoGPT's checkpoint: {files[0]}" if files else ""
        raise CheckpointError(
            f"checkpoint {folder} has no config.json; give a folder that transformers' save_pretrained wrote{hint}"
        )
    weights = _weight_files(folder)
    if not weights:
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise CheckpointError(
                f"checkpoint {folder} holds its weights as a pickle only ({pickles[0]}), which can run code when it is "
                "read; load it where you trust it and save it again: model.save_pretrained(folder)"
            )
        raise CheckpointError(f"checkpoint {folder} has no model.safetensors")
    check_files(folder)
    checkpoint = Checkpoint(folder=folder, weights=tuple(weights))
    check_config(folder / CONFIG, checkpoint.shapes())
    refuse_unreadable(folder)
    return checkpoint


def exists(folder: Path, what: str) -> bool:
    try:
        return folder.exists()
    except OSError as error:  # such as a name that is too long, or a parent folder without access
        raise CheckpointError(f"{what} {folder!s:.1000} cannot be read: {error.strerror}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name; empty without any. CheckpointError for a damaged index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else []
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
    missing = [
        name
        for name in names
        if not isinstance(name, str) or os.path.basename(name) != name or not (folder / name).is_file()
    ]
    if missing:
        raise CheckpointError(f"checkpoint {folder}: {index.name} names files that are not there: {missing[:3]}")
    return [folder / name for name in names]


def from_hub(name: str, patterns: Sequence[str] = CHECKPOINT_PATTERNS, what: str = "checkpoint") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError:
        raise CheckpointError(f"{what} {name}: there is no such folder") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{what} {name}: there is no such folder, and the Hugging Face hub does not give it: {reason}"
        ) from error


def tensors_of(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(offset of the first number, header by tensor name) of a safetensors file. CheckpointError if it is damaged."""
    try:
        with BufferedReader(open_regular(path)) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LARGEST_HEADER, size - 8):
                raise ValueError(f"its header claims {length} bytes")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"tensor {name!r} lies outside the file: it is cut short")
            if not all(isinstance(axis, int) and axis >= 0 for axis in entry["shape"]):
                raise ValueError(f"tensor {name!r} has the shape {entry['shape']!r:.80}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    return 8 + length, header


def fingerprint_weights(files: tuple[Path, ...], counts: Callable[[str], bool] = lambda name: True) -> str:
    """The fingerprint of the tensors in safetensors files whose name ``counts``: see :meth:`Checkpoint.fingerprint`.
    Reads every byte once, in several threads.
    """
    pieces: list[tuple[str, Path, int, int, str]] = []
    for path in files:
        base, header = tensors_of(path)
        for name, entry in header.items():
            if not counts(name):
                continue
            begin, end = entry["data_offsets"]
            described = json.dumps([name, entry["dtype"], entry["shape"]])
            pieces.append((name, path, base + begin, base + end, described))

    def digest(piece: tuple[str, Path, int, int, str]) -> bytes:
        _, path, begin, end, described = piece
        hashed = hashlib.sha256(described.encode())
        if end > begin:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                view = memoryview(data)[begin:end]
                try:
                    hashed.update(view)
                finally:
                    view.release()
        return hashed.digest()

    pieces.sort(key=lambda piece: piece[0])
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        total = hashlib.sha256(b"".join(pool.map(digest, pieces)))
    return f"sha256:{total.hexdigest()}"
