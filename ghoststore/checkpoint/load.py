"""Finding, checking, fingerprinting and loading checkpoints in transformers' format.

Weights are read only from safetensors files, and code from a checkpoint is never run.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from ghoststore.checkpoint.bounds import CONFIG, bounded_making, check_config, check_files, read_object
from ghoststore.checkpoint.in_memory import LoadedCheckpoint, LoadedTokenizer
from ghoststore.errors import CheckpointError, UsageError
from ghoststore.lazy import importing
from ghoststore.settings.shared import Checkpoint as CheckpointSource
from ghoststore.settings.shared import TokenizerSource
from ghoststore.store.base.opening import open_regular, parse_json

LARGEST_HEADER = 256 << 20
TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
CHECKPOINT_PATTERNS = (*TOKENIZER_PATTERNS, "*.safetensors")
DTYPES = ("float32", "bfloat16", "float16")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "pytorch_model.pt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with a model: ``config.json`` and safetensors files. :func:`find_checkpoint` makes it."""

    folder: Path
    weights: tuple[Path, ...]
    """The safetensors files, sorted by name."""

    def fingerprint(self) -> str:
        """The SHA-256 (``sha256:…``) of the name, dtype, shape and bytes of every tensor. How tensors are divided among
        files does not change it.
        """
        return fingerprint_weights(self.weights)

    @property
    def where(self) -> str:
        """What messages call it."""
        return str(self.folder)

    @property
    def config_where(self) -> str:
        """What messages call its configuration."""
        return str(self.folder / CONFIG)

    @property
    def name(self) -> str:
        """A name for it, used in default names."""
        return self.folder.resolve().name

    @property
    def recorded(self) -> str:
        """What a manifest records of where it lies."""
        return str(self.folder.resolve())

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of its own tokenizer."""
        return self.folder

    def numbers(self) -> int:
        """The number of numbers in all tensors, from the headers of the files."""
        return sum(math.prod(shape) for shape in self.shapes())

    def shapes(self) -> list[list[int]]:
        """The shape of every tensor, from the headers of the files. CheckpointError for a damaged file."""
        return [entry["shape"] for path in self.weights for entry in _tensors(path)[1].values()]


AnyCheckpoint: TypeAlias = Checkpoint | LoadedCheckpoint
AnyTokenizer: TypeAlias = Path | LoadedTokenizer
"""The folder of a tokenizer, or one in memory."""


def find_checkpoint(source: CheckpointSource) -> AnyCheckpoint:
    """The checkpoint in a folder, or of a hub id (downloaded by huggingface_hub unless it is cached); or that of a
    loaded model.

    Raises CheckpointError, with what is missing (the folder, its config.json, its safetensors files) or what is wrong:
    no JSON object, a damaged header, or a configuration that asks for more than the tensors; and for a loaded model
    that cannot be used.
    """
    if not isinstance(source, str | Path):
        return LoadedCheckpoint.of(source)
    return find_folder(source)


def find_folder(source: str | Path) -> Checkpoint:
    """:func:`find_checkpoint` of a folder or a hub id."""
    folder = Path(source)
    if not _exists(folder, "checkpoint"):
        folder = _from_hub(str(source))
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {source} is a file; give the folder that transformers' save_pretrained wrote"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {folder} has no config.json; give a folder that transformers' save_pretrained wrote"
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
    return checkpoint


def _exists(folder: Path, what: str) -> bool:
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


def _from_hub(name: str, patterns: Sequence[str] = CHECKPOINT_PATTERNS, what: str = "checkpoint") -> Path:
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


def _tensors(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
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


def fingerprint_weights(files: tuple[Path, ...]) -> str:
    """The fingerprint of safetensors files: see :meth:`Checkpoint.fingerprint`. Reads every byte once, in several
    threads.
    """
    pieces: list[tuple[str, Path, int, int, str]] = []
    for path in files:
        base, header = _tensors(path)
        for name, entry in header.items():
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


def find_tokenizer(source: TokenizerSource) -> AnyTokenizer:
    """The folder of a saved tokenizer, or of the tokenizer of a hub id (downloaded without weights unless it is
    cached); or a loaded one.

    Raises CheckpointError if there is no such folder.
    """
    if not isinstance(source, str | Path):
        return LoadedTokenizer(source)
    folder = Path(source)
    exists = _exists(folder, "tokenizer")
    if folder.is_file():
        raise CheckpointError(f"tokenizer {folder} is a file; give the folder that holds it")
    return folder if exists else _from_hub(str(source), what="tokenizer", patterns=TOKENIZER_PATTERNS)


def given_tokenizer(given: TokenizerSource) -> AnyTokenizer:
    """The folder of a tokenizer that a user gives, or a loaded one."""
    return Path(given) if isinstance(given, str | Path) else LoadedTokenizer(given)


def load_tokenizer(folder: AnyTokenizer) -> Any:
    """The tokenizer saved in ``folder``; of a loaded one, the one that comes back from its saved folder. So it is
    equal to that, and nothing changes the caller's.

    CheckpointError if there is none, or if it cannot be loaded.
    """
    if isinstance(folder, LoadedTokenizer):
        with tempfile.TemporaryDirectory(prefix="ghoststore-") as temporary, quiet_transformers():
            folder.save(Path(temporary))
            return load_tokenizer(Path(temporary))
    with importing():
        from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"checkpoint {folder} has no tokenizer; save it there too: tokenizer.save_pretrained({str(folder)!r}), or "
            "give its folder with `tokenizer`"
        )
    check_files(folder, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason:.500}") from error
    return tokenizer


def resolve_device(device: str, checkpoint: object = None) -> str:
    """The torch name of ``device``; for ``auto`` that of a loaded model, if ``checkpoint`` is one; else cuda if there
    is a GPU, else cpu. UsageError for a missing device.
    """
    import torch

    if device == "auto" and isinstance(checkpoint, torch.nn.Module):
        return str(next(checkpoint.parameters()).device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"`device` {device!r} is not a device: {error}") from None
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"`device={device}`: this torch ({torch.__version__}) sees no CUDA device; use `device=cpu`"
            )
        if (parsed.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"`device={device}`: there are {torch.cuda.device_count()} CUDA devices")
    elif parsed.type != "cpu":
        raise UsageError(f"`device={device}`: cpu and cuda are supported")
    return str(parsed)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, transformers shows no progress bars and no warnings. What matters in these is checked here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(
    checkpoint: AnyCheckpoint,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> Any:
    """The causal language model of a checkpoint, in eval mode, in ``dtype`` on ``device``. That of a loaded model is a
    copy, see :meth:`LoadedCheckpoint.copied`.

    Raises CheckpointError if the architecture is not a causal language model, and if weights are missing (transformers
    would initialise them at random), have another shape, or are not finite.
    """
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"`model_dtype` {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    if attn_implementation is not None and "/" in attn_implementation:
        raise UsageError(
            f"`attn_implementation` {attn_implementation!r:.80} is code of the hub, which is not fetched and run; give "
            "sdpa, eager, or a kernel that is installed"
        )
    if isinstance(checkpoint, LoadedCheckpoint):
        model = checkpoint.copied(dtype=dtype, device=device, kernel=attn_implementation)
    else:
        model = _read_model(checkpoint, dtype, attn_implementation)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"checkpoint {checkpoint.where}: parameter {name!r} has NaN or infinite weights"
                + (f" in {dtype}; try `model_dtype=bfloat16`" if dtype == "float16" else "")
            )
    model = model.to(device).eval()
    try:
        refuse_lookahead(model, checkpoint.where)
    except CheckpointError:
        raise
    except Exception as error:  # as in reading: a wrong configuration may fail only when the model runs
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"checkpoint {checkpoint.where} cannot be run: {reason:.1000}") from error
    return model


def _read_model(checkpoint: Checkpoint, dtype: str, attn_implementation: str | None) -> Any:
    """The model of a folder, in ``dtype``. Raises as :func:`load_model`."""
    with importing():
        import torch
        import transformers.modeling_utils  # noqa: F401 - not below, while the model is made
        from transformers import AutoModelForCausalLM

    shapes = checkpoint.shapes()  # reports a damaged file before transformers reads it
    check_config(checkpoint.folder / CONFIG, shapes)
    try:
        with quiet_transformers(), bounded_making(checkpoint.folder, shapes):
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"checkpoint {checkpoint.folder} cannot be loaded: {reason:.1000}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[problem])
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} does not fit {type(model).__name__}: {problem.replace('_', ' ')} "
                f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            )
    return model


def refuse_lookahead(model: Any, where: str | Path) -> None:
    """CheckpointError unless the logits at each position are independent of later tokens, which the loss requires."""
    import torch

    size = model.get_input_embeddings().num_embeddings
    length = min(8, size, max_positions(model) or 8)
    if length < 2:
        return  # there is no position before the last token
    ids = torch.arange(length, device=model.device).unsqueeze(0)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + size // 2) % size
    if bool((changed == ids).all()):
        return
    if sees_ahead(model, ids, changed):
        raise CheckpointError(
            f"checkpoint {where} ({type(model).__name__}) is not causal: changing a later token changed the logits "
            "before it. Next-token gradients need a causal language model (for BERT-style configs, is_decoder=true)"
        )


def sees_ahead(model: Any, ids: Any, changed: Any) -> bool:
    """Whether the logits before the last token differ between ``ids`` and ``changed``, both (1, tokens), which differ
    only in the last token.
    """
    import torch

    with torch.no_grad():
        first, second = (model(input_ids=x, attention_mask=torch.ones_like(x)).logits.float() for x in (ids, changed))
    change_T = (first - second).abs().amax(dim=(0, 2))
    return float(change_T[:-1].max()) > 1e-3 * float(change_T[-1]) + 1e-6 * float(first.abs().max())


def max_positions(model: Any) -> int | None:
    """The largest number of tokens that the model accepts, from its config; None if that sets no limit."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "max_sequence_length"):
        value = getattr(getattr(model, "config", None), name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def choose_max_length(wanted: int | None, model: Any, default: int) -> int:
    """``wanted``; or by default ``default``, limited to what the model accepts. UsageError if ``wanted`` is more."""
    limit = max_positions(model)
    if wanted is None:
        return min(limit or default, default)
    if limit is not None and wanted > limit:
        raise UsageError(f"`max_length={wanted}` is more than the {limit} positions of this model")
    return wanted
