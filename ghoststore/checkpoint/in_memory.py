"""Models and tokenizers in memory, in the place of their saved folders. The caller's objects are never changed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststore.checkpoint.adapter import NAME, adapter_identity, has_adapter, of_base, refuse_unsupported
from ghoststore.checkpoint.nanogpt import (
    convert_loaded,
    file_of,
    fit_biases,
    has_biases,
    is_checkpoint_file,
    looks_like,
    read_file,
    uncompiled,
)
from ghoststore.checkpoint.objects import place_of, recorded_place
from ghoststore.checkpoint.token_ids import TokenIds
from ghoststore.errors import CheckpointError, UsageError
from ghoststore.lazy import importing
from ghoststore.progress import Progress
from ghoststore.settings.shared import in_memory

SAVE = "save it (`model.save_pretrained(folder)`) and give the folder"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""How safetensors calls the dtypes of torch."""


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A model of transformers in memory, in the place of a :class:`ghoststore.checkpoint.load.Checkpoint`."""

    model: Any
    """Of an adapter: the model of transformers in it, with the adapter in its modules."""
    peft: Any = None
    """The PeftModel around it; None without an adapter."""
    nanogpt: Any = None
    """The model of nanoGPT, or the file of one, that ``model`` has the weights of; None for another model."""

    @classmethod
    def of_file(cls, path: str | Path, progress: Progress | None = None) -> LoadedCheckpoint:
        """The checkpoint that nanoGPT wrote to a file. Raises as :func:`ghoststore.checkpoint.nanogpt.read_file`."""
        file = file_of(path, progress)
        return cls(read_file(file), nanogpt=file)

    @classmethod
    def of(cls, model: Any, adapter: str | None = None) -> LoadedCheckpoint:
        """CheckpointError for a model that is no plain one of transformers, nor a PeftModel with one LoRA adapter, nor
        one of nanoGPT: its saved folder would hold another. UsageError for ``adapter`` (see :func:`find_adapter`) but
        ``only``.
        """
        with importing():
            import torch
            from transformers import PreTrainedModel

        name = type(model).__name__
        peft = model if hasattr(model, "get_base_model") and hasattr(model, "peft_config") else None
        if adapter is not None and (peft is None or adapter != "only"):
            raise UsageError(
                f"`adapter={adapter}` is for the folder of an adapter, and `checkpoint` is a {name} in memory: give "
                "the model that you mean (`model.merge_and_unload()`, or the base)"
            )
        if peft is not None:
            _refuse_odd_adapters(peft)
            model = peft.get_base_model()
        if not isinstance(model, PreTrainedModel) and looks_like(model):
            own = uncompiled(model)
            return cls(convert_loaded(own), nanogpt=own)
        if not isinstance(model, PreTrainedModel):
            inner = "; of a wrapped model give the model inside" if isinstance(model, torch.nn.Module) else ""
            raise CheckpointError(
                f"`checkpoint` is a {name}; expected a folder, a hub id, or a model of transformers (PreTrainedModel)"
                f"{inner}"
            )
        odd = sorted({type(p).__name__ for p in model.parameters() if type(p) is not torch.nn.Parameter})
        places = {p.device for p in model.parameters()}
        problem = (
            f"its parameters are of the class {odd[0]}"
            if odd
            else "it has adapters"
            if getattr(model, "_hf_peft_config_loaded", False) or (peft is None and has_adapter(model))
            else f"its parameters are on {', '.join(sorted(map(str, places)))}"
            if len(places) != 1 or "meta" in {place.type for place in places}
            else None
        )
        if problem is not None:
            raise CheckpointError(f"the {name} in memory cannot be used as it is: {problem}; {SAVE}")
        return cls(model, peft)

    @property
    def where(self) -> str:
        """What messages call it."""
        if isinstance(self.nanogpt, Path):
            return place_of(self.nanogpt)
        dtype = str(self.model.dtype).removeprefix("torch.")
        adapter = "" if self.peft is None else " with an adapter"
        return f"the {type(self.model if self.nanogpt is None else self.nanogpt).__name__}{adapter} in memory ({dtype})"

    @property
    def config_where(self) -> str:
        """What messages call its configuration."""
        return self.where

    @property
    def name(self) -> str:
        """A name for it, used in default names: of a file that of its folder, for all are called ``ckpt.pt``."""
        if isinstance(self.nanogpt, Path):
            path = self.nanogpt.resolve()
            return path.parent.name or path.stem
        return type(self.model if self.nanogpt is None else self.nanogpt).__name__

    @property
    def recorded(self) -> str:
        """What a manifest records of where it lies."""
        return recorded_place(self.nanogpt) if isinstance(self.nanogpt, Path) else "-"

    @property
    def folder(self) -> Path:
        """UsageError: it has no folder."""
        raise UsageError(f"{self.where} has no folder: {SAVE}")

    @property
    def tokenizer_folder(self) -> TokenIds:
        """That of nanoGPT, which keeps none beside its models. UsageError for another model in memory."""
        if self.nanogpt is not None:
            return TokenIds(self.model.config.vocab_size)
        raise UsageError(f"{self.where} comes without a tokenizer: give `tokenizer`, a loaded one or its folder")

    def refuse_without_biases(self) -> None:
        """UsageError for a model of nanoGPT without biases: the GPT-2 of a folder has them."""
        if self.nanogpt is not None and not has_biases(self.model):
            raise UsageError(
                f"{self.where}: its layers have no biases (`bias=False`), and the GPT-2 of a folder has, so it would "
                "be trained otherwise: a training of it has to be made where it was trained"
            )

    def numbers(self) -> int:
        """The number of numbers in all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def versions(self) -> tuple[int, ...]:
        """Counts of the changes of each parameter in place, by which torch notices that weights have changed."""
        model = self.model if self.nanogpt is None or isinstance(self.nanogpt, Path) else self.nanogpt
        return tuple(p._version for p in model.parameters() if not p.is_inference())  # which count nothing

    @property
    def recorded_base(self) -> str | None:
        """What a manifest records of where the base of an adapter lies; None without an adapter."""
        return None if self.peft is None else "-"

    def identity(self) -> dict[str, Any]:
        """What a manifest records of its weights: that of the folders which `save_pretrained` would write."""
        own = self._digest(_saved_tensors(self.model))
        if self.peft is None:
            return {"fingerprint": own}
        with importing():
            from peft.utils import get_peft_model_state_dict

        adapter = get_peft_model_state_dict(self.peft, adapter_name=NAME, save_embedding_layers=False)
        return adapter_identity(own, self._digest(adapter), self.peft.peft_config[NAME].to_dict(), merged=False)

    def fingerprint(self) -> str:
        """That of the folder which `save_pretrained` would write, see :meth:`Checkpoint.fingerprint`."""
        return str(self.identity()["fingerprint"])

    def _digest(self, tensors: dict[str, Any]) -> str:
        import torch

        digests = []
        for name, tensor in sorted(tensors.items()):
            dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise CheckpointError(f"{self.where}: tensor {name!r} has the dtype {tensor.dtype}; {SAVE}")
            hashed = hashlib.sha256(json.dumps([name, dtype, list(tensor.shape)]).encode())
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            digests.append(hashed.digest())
        return f"sha256:{hashlib.sha256(b''.join(digests)).hexdigest()}"

    def copied(self, *, dtype: str | None = None, device: str | None = None, kernel: str | None = None) -> Any:
        """A copy of the model without hooks that shares the memory of its weights; in another ``dtype`` or on another
        ``device`` it has weights of its own. None: those of the model; likewise the attention ``kernel``.

        UsageError for a kernel that is not there.
        """
        import torch

        wanted = self.model.dtype if dtype is None else getattr(torch, dtype)

        def shared(tensor: Any) -> Any:
            changes = (wanted != self.model.dtype or self.peft is not None) and tensor.is_floating_point()
            return tensor.detach().to(device=device or tensor.device, dtype=wanted if changes else tensor.dtype)

        parameters = {  # deepcopy takes these in the place of copies; a tied parameter stays one
            id(parameter): torch.nn.Parameter(shared(parameter), requires_grad=parameter.requires_grad)
            for parameter in self.model.parameters()
        }
        try:
            copied = deepcopy(self.model, parameters)
        except Exception as error:
            raise CheckpointError(f"{self.where} cannot be copied ({error!s:.300}); {SAVE}") from error
        for module in copied.modules():
            if "forward" in vars(module):
                raise CheckpointError(f"{self.where}: the forward of a module was replaced by another one; {SAVE}")
            for hooks in HOOKS:
                getattr(module, hooks).clear()
        if self.nanogpt is not None:
            fit_biases(copied)
        if kernel is not None and kernel != getattr(copied.config, "_attn_implementation", None):
            try:
                copied.set_attn_implementation(kernel)
            except (ValueError, ImportError) as error:
                raise UsageError(f"`attn_implementation` {kernel!r}: {str(error).splitlines()[0]}") from error
        return copied


def _refuse_odd_adapters(peft: Any) -> None:
    """CheckpointError for a PeftModel that is not what its saved folder would be."""
    what = f"the {type(peft).__name__} in memory"
    if list(peft.peft_config) != [NAME]:
        raise CheckpointError(
            f"{what} has the adapters {', '.join(peft.peft_config)}; expected one, called {NAME!r}: save it "
            "(`model.save_pretrained(folder)`) and give the folder"
        )
    refuse_unsupported(what, peft.peft_config[NAME].to_dict(), merged=False)
    for name, module in peft.named_modules():
        if getattr(module, "merged", False) is True or getattr(module, "disable_adapters", False) is True:
            raise CheckpointError(
                f"{what}: the adapter is merged or switched off in {name!r}; undo that first (`unmerge_adapter()`, or "
                "leave the block of `disable_adapter()`), or give the model of `merge_and_unload()`"
            )


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer in memory, in the place of its folder."""

    tokenizer: Any

    def __str__(self) -> str:
        return f"the {type(self.tokenizer).__name__} in memory"

    def save(self, folder: Path) -> None:
        """Write it to ``folder``. UsageError for an object that is no tokenizer."""
        with importing():
            from transformers import PreTrainedTokenizerBase

        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise UsageError(
                f"`tokenizer` is a {type(self.tokenizer).__name__}; expected a folder, or a tokenizer of transformers"
            )
        self.tokenizer.save_pretrained(folder)


def checkpoint_name(given: Any) -> str:
    """What results call a checkpoint: its path, or the model in memory."""
    return str(given) if isinstance(given, str | Path) else f"the {type(given).__name__} in memory"


def tokenizer_source(found: Path | LoadedTokenizer | TokenIds) -> Any:
    """What a user could have given to mean ``found``."""
    return found.tokenizer if isinstance(found, LoadedTokenizer) else found


def _saved_tensors(model: Any) -> dict[str, Any]:
    """The tensors that ``save_pretrained`` writes, by name: without tied ones, and named as in files. With an adapter
    those of its base.
    """
    with importing():
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

    left_out = model._keys_to_ignore_on_save or ()
    state = of_base(model.state_dict()) if has_adapter(model) else model.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name not in left_out}
    saved: dict[str, Any] = revert_weight_conversion(model, remove_tied_weights_from_state_dict(tensors, model))
    return saved


@contextmanager
def as_folders(checkpoint: Any, tokenizer: Any, progress: Progress | None = None) -> Iterator[tuple[Any, Any]]:
    """A checkpoint and a tokenizer as paths, for processes that read them from there: what is in memory, or a file of
    nanoGPT, is saved to a temporary folder until the block ends. None, and paths of folders, stay. ``progress`` hears
    of a file that is copied from object storage.
    """
    with tempfile.TemporaryDirectory(prefix="ghoststore-") as folder:
        places = [Path(folder) / name for name in ("model", "tokenizer")]
        if in_memory(checkpoint) or is_checkpoint_file(checkpoint):
            loaded = (
                LoadedCheckpoint.of(checkpoint)
                if in_memory(checkpoint)
                else LoadedCheckpoint.of_file(checkpoint, progress)
            )
            if loaded.peft is not None:
                raise UsageError(f"{loaded.where}: a whole model is expected here; give `model.merge_and_unload()`")
            loaded.refuse_without_biases()
            loaded.copied().save_pretrained(places[0])
            checkpoint = places[0]
        if in_memory(tokenizer):
            LoadedTokenizer(tokenizer).save(places[1])
            tokenizer = places[1]
        yield checkpoint, tokenizer
