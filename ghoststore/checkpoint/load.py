"""Loading models and tokenizers: those of checkpoints in transformers' format, of adapters, and of objects in memory.

Code from a checkpoint is never run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from ghoststore.checkpoint.adapter import AdapterCheckpoint, find_adapter, without_adapter
from ghoststore.checkpoint.bounds import CONFIG, bounded_making, check_config, check_files, read_object
from ghoststore.checkpoint.find import TOKENIZER_PATTERNS, Checkpoint, exists, from_hub, locate, whole_model
from ghoststore.checkpoint.in_memory import LoadedCheckpoint, LoadedTokenizer
from ghoststore.checkpoint.nanogpt import is_checkpoint_file
from ghoststore.checkpoint.objects import copied, naming_address, recorded_place
from ghoststore.checkpoint.quantised import bits_of, widened
from ghoststore.checkpoint.token_ids import TokenIds
from ghoststore.checkpoint.unused import cut_off, unused_words
from ghoststore.errors import CheckpointError, UsageError
from ghoststore.lazy import importing
from ghoststore.progress import Progress
from ghoststore.settings.option import in_objects
from ghoststore.settings.shared import AdapterUse, TokenizerSource
from ghoststore.settings.shared import Checkpoint as CheckpointSource

DTYPES = ("float32", "bfloat16", "float16")
PICKLE = ".pkl"


AnyCheckpoint: TypeAlias = Checkpoint | AdapterCheckpoint | LoadedCheckpoint
AnyTokenizer: TypeAlias = Path | LoadedTokenizer | TokenIds
"""The folder of a tokenizer, one in memory, or what a checkpoint without any has."""


def find_checkpoint(
    source: CheckpointSource,
    *,
    base: str | Path | None = None,
    adapter: AdapterUse | None = None,
    progress: Progress | None = None,
) -> AnyCheckpoint:
    """The checkpoint in a folder, in object storage or of a hub id (downloaded unless it is cached); that in a file of
    nanoGPT; or that of a loaded model. ``base`` and ``adapter`` are for a LoRA adapter: see :func:`find_adapter`.
    ``progress`` hears of what is copied from object storage.

    Raises CheckpointError, with what is missing (the folder, its config.json, its safetensors files) or what is wrong:
    no JSON object, a damaged header, or a configuration that asks for more than the tensors; and for a loaded model
    that cannot be used.
    """
    if not isinstance(source, str | Path):
        if base is not None:
            raise UsageError("`base` belongs to the folder of an adapter, and `checkpoint` is in memory, with its base")
        return LoadedCheckpoint.of(source, adapter)
    if is_checkpoint_file(source):
        if base is not None or adapter is not None:
            raise UsageError(f"`base` and `adapter` belong to the folder of an adapter, and {source} is a file")
        return LoadedCheckpoint.of_file(source, progress)
    folder = locate(source, progress)
    with naming_address(folder):
        return find_adapter(folder, base, adapter, progress) or whole_model(folder)


def find_tokenizer(source: TokenizerSource, progress: Progress | None = None) -> AnyTokenizer:
    """The folder of a saved tokenizer, or of the tokenizer of a hub id or an address in object storage (downloaded
    without weights unless it is cached); or a loaded one.

    Raises CheckpointError if there is no such folder.
    """
    if not isinstance(source, str | Path):
        return LoadedTokenizer(source)
    if in_objects(source):
        return copied(source, TOKENIZER_PATTERNS, "tokenizer", progress=progress)
    folder = Path(source)
    there = exists(folder, "tokenizer")
    if folder.is_file() and folder.suffix != PICKLE:  # of which load_tokenizer says more
        raise CheckpointError(f"tokenizer {folder} is a file; give the folder that holds it")
    return folder if there else from_hub(str(source), what="tokenizer", patterns=TOKENIZER_PATTERNS)


def recorded_tokenizer(given: TokenizerSource | None) -> str | None:
    """What a manifest records of the tokenizer that a user gives: its folder, or "-" for one in memory."""
    if given is None:
        return None
    found = find_tokenizer(given)
    return recorded_place(found) if isinstance(found, Path) else "-"


def load_tokenizer(folder: AnyTokenizer) -> Any:
    """The tokenizer saved in ``folder``; of a loaded one, the one that comes back from its saved folder. So it is
    equal to that, and nothing changes the caller's.

    CheckpointError if there is none, or if it cannot be loaded.
    """
    if isinstance(folder, TokenIds):
        return folder
    if isinstance(folder, LoadedTokenizer):
        with tempfile.TemporaryDirectory(prefix="ghoststore-") as temporary, quiet_transformers():
            folder.save(Path(temporary))
            return load_tokenizer(Path(temporary))
    with naming_address(folder):
        return _load_saved(folder)


def _load_saved(folder: Path) -> Any:
    with importing():
        from transformers import AutoTokenizer

    if folder.suffix == PICKLE and folder.is_file():
        raise CheckpointError(
            f"tokenizer {folder} is a pickle, which can run code when it is read, and is not read; for the characters "
            "of nanoGPT's meta.pkl docs/nanogpt.md has the lines that save a tokenizer: give its folder"
        )
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"the folder {folder} has no tokenizer; save it there: tokenizer.save_pretrained({str(folder)!r}), or give "
            "the folder of one with `tokenizer`"
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
    encoder_decoder: bool = False,
    progress: Progress | None = None,
) -> Any:
    """The causal language model of a checkpoint, in eval mode, in ``dtype`` on ``device``. That of a loaded model is a
    copy, see :meth:`LoadedCheckpoint.copied`. With ``encoder_decoder`` also one with an encoder (T5, Bart).
    ``progress`` hears of weights that the model has no place for, such as a value head.

    Raises CheckpointError if the architecture is not such a language model, if weights are missing (transformers would
    initialise them at random), have another shape, or are not finite, and if the files hold more layers than the model.
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
        own = checkpoint.base if isinstance(checkpoint, AdapterCheckpoint) else checkpoint
        model = _read_model(own, dtype, attn_implementation, progress)
        if isinstance(checkpoint, AdapterCheckpoint):
            model = checkpoint.attached(model)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"checkpoint {checkpoint.where}: parameter {name!r} has NaN or infinite weights"
                + (f" in {dtype}; try `model_dtype=bfloat16`" if dtype == "float16" else "")
            )
    if is_encoder_decoder(model) and not encoder_decoder:
        raise CheckpointError(
            f"checkpoint {checkpoint.where}: {type(model).__name__} has an encoder and a decoder, and a causal "
            "language model is expected here; `ghoststore build`, `query` of its parts and `full-gradients` take it"
        )
    if device == "cpu" and getattr(model.config, "_attn_implementation", None) == "flex_attention":
        raise UsageError(
            "`attn_implementation` 'flex_attention' has no backward pass on a CPU: give `attn_implementation=sdpa` or "
            "eager, or a GPU with `device=cuda`"
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


def _read_model(checkpoint: Checkpoint, dtype: str, attn_implementation: str | None, progress: Progress | None) -> Any:
    """The model of a folder, in ``dtype``. Raises as :func:`load_model`."""
    with importing():
        import torch
        import transformers.modeling_utils  # noqa: F401 - not below, while the model is made

    shapes = checkpoint.shapes()  # reports a damaged file before transformers reads it
    check_config(checkpoint.folder / CONFIG, shapes)
    try:
        with (
            quiet_transformers(),
            bounded_making(checkpoint.folder, shapes),
            without_adapter(checkpoint.folder) as folder,
        ):
            model, report = _auto_class(folder).from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
            if bits_of(checkpoint.folder) is not None:
                model = widened(model, getattr(torch, dtype))
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
    unused = {str(key) for key in report.get("unexpected_keys", ())}
    if layers := cut_off(model, unused):
        raise CheckpointError(
            f"checkpoint {checkpoint.folder}: {unused_words(model, layers)}. They are of layers that {CONFIG} does not "
            "have: mend its number of layers; if the model shall be cut off there, save it so: "
            f"AutoModelForCausalLM.from_pretrained({str(checkpoint.folder)!r}).save_pretrained(another folder)"
        )
    if unused and progress is not None:
        progress.note(f"checkpoint {checkpoint.folder}: {unused_words(model, unused)}. They have no part in anything")
    return model


def _auto_class(folder: Path) -> Any:
    """The class of transformers that makes the model of a folder: that of encoder-decoder models for those."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    config = read_object(folder / CONFIG)
    names, kind = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, config.get("model_type")
    paired = isinstance(kind, str) and names.get(kind) in (config.get("architectures") or ())
    return AutoModelForSeq2SeqLM if paired else AutoModelForCausalLM


def is_encoder_decoder(model: Any) -> bool:
    """Whether ``model`` reads in an encoder, and learns what its decoder reads."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and hasattr(
        model, "prepare_decoder_input_ids_from_labels"
    )


def refuse_lookahead(model: Any, where: str | Path) -> None:
    """CheckpointError unless the logits at each position are independent of later tokens, which the loss requires."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]  # peft's embeddings have no `num_embeddings`
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
        given = {"input_ids": ids} if is_encoder_decoder(model) else {}
        name = "decoder_input_ids" if given else "input_ids"
        first, second = (
            model(**given, attention_mask=torch.ones_like(x), **{name: x}).logits.float() for x in (ids, changed)
        )
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
