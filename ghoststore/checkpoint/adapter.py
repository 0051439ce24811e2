"""LoRA adapters as checkpoints: the folder that peft's `save_pretrained` wrote, and the base that it belongs to.

The model of an adapter is that of its base, with peft's modules in the place of those that the adapter targets. Its
parameters have ``lora_`` or ``modules_to_save`` in their paths, and the base's ``base_layer`` or ``original_module``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ghoststore.checkpoint.bounds import ADAPTER_CONFIG, check_files, read_object
from ghoststore.checkpoint.find import (
    Checkpoint,
    InFolder,
    exists,
    fingerprint_weights,
    holds_model,
    locate,
    tensors_of,
    whole_model,
)
from ghoststore.checkpoint.objects import place_of
from ghoststore.errors import CheckpointError, UsageError
from ghoststore.lazy import importing
from ghoststore.progress import Progress
from ghoststore.settings.shared import AdapterUse

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
NAME = "default"
"""How peft calls an adapter in a model; it is part of the paths of its modules."""
OWN, SAVED = "lora_", "modules_to_save"
"""Beginning of the names of the modules that a LoRA adapter adds, and the name of those that it replaces."""
IN_PEFT = "base_model.model."
"""Beginning of the paths of a model in a PeftModel, and in an adapter's file."""
BASE, REPLACED = "base_layer", "original_module"
"""What peft calls the module of the base where it adds to it, and where it replaces it."""
MERGE_ADVICE = "where it was trained, model.merge_and_unload().save_pretrained(folder), and give that folder"

INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields of an adapter's configuration that do not change what it computes once it is trained."""
UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
"""Fields under which the gradients of the adapter's parameters are known to be exact."""
MERGEABLE = UNDERSTOOD | {"bias", "target_parameters", "trainable_token_indices"}
"""Fields under which an adapter can be merged. Others change the model's layers, or name modules to import."""
TASKS = (None, "CAUSAL_LM")
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is. The others subtract something from its weights."""


def is_adapter_path(parts: Sequence[str]) -> bool:
    """Whether the module or parameter with this path is an adapter's own."""
    return any(part.startswith(OWN) or part == SAVED for part in parts)


def has_adapter(model: Any) -> bool:
    """Whether modules of ``model`` have been replaced by peft's, with a LoRA adapter beside the base's own weights."""
    return any(
        hasattr(module, BASE) and any(name.startswith(OWN) for name, _ in module.named_children())
        for module in model.modules()
    )


def of_base(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the base, under the names that they have without the adapter."""
    return {_in_base(name): tensor for name, tensor in tensors.items() if not is_adapter_path(name.split("."))}


def _in_base(name: str) -> str:
    """The name in the base of one of its tensors, from its name in a model with an adapter, or in an adapter's file."""
    parts = name.removeprefix(IN_PEFT).split(".")
    return ".".join(part for part in parts if part not in (BASE, REPLACED))


def configured(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an adapter's configuration that change what it computes, as JSON values.

    Those that are off are left out, because another release of peft may have more of them.
    """
    fields = {}
    for name, value in config.items():
        if isinstance(value, set | frozenset | list | tuple):
            value = sorted(value, key=str)  # peft writes sets, in any order
        off = value in (None, False) or (isinstance(value, list | dict) and not value)
        if name not in INERT and not (off or (name == "bias" and value == "none")):
            fields[name] = getattr(value, "value", value)
    return dict(sorted(fields.items()))


def adapter_identity(base: str, weights: str, config: Mapping[str, Any], *, merged: bool) -> dict[str, Any]:
    """What a manifest records of a base and an adapter: ``fingerprint``, of both, and ``adapter``, with each alone."""
    adapter = {"base": base, "weights": weights, "config": configured(config), "merged": merged}
    digest = hashlib.sha256(json.dumps(adapter, sort_keys=True).encode()).hexdigest()
    return {"fingerprint": f"sha256:{digest}", "adapter": adapter}


@dataclass(frozen=True, slots=True)
class AdapterCheckpoint(InFolder):
    """An adapter, in its folder, and its base, in the place of a :class:`Checkpoint`. :func:`find_adapter` makes it."""

    config: dict[str, Any]
    base: Checkpoint
    merged: bool
    """Whether the adapter is merged into the weights of the base."""

    def identity(self) -> dict[str, Any]:
        """What a manifest records of the weights of base and adapter, see :func:`adapter_identity`."""
        # Beside an adapter of embeddings peft saves those of the base, too. A merged adapter may bring biases.
        weights = fingerprint_weights((self.folder / WEIGHTS,), lambda name: self.merged or BASE not in name.split("."))
        return adapter_identity(self.base.fingerprint(), weights, self.config, merged=self.merged)

    def fingerprint(self) -> str:
        """The SHA-256 (``sha256:…``) of base and adapter, see :func:`adapter_identity`."""
        return str(self.identity()["fingerprint"])

    @property
    def where(self) -> str:
        """What messages call it."""
        return f"{place_of(self.folder)} on {self.base.where}"

    @property
    def config_where(self) -> str:
        """What messages call its configuration."""
        return self.base.config_where

    @property
    def recorded_base(self) -> str:
        """What a manifest records of where its base lies."""
        return self.base.recorded

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer: the adapter's, if it has one, because training may have added tokens."""
        own = (self.folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))
        return self.folder if any(path.is_file() for path in own) else self.base.folder

    def numbers(self) -> int:
        """The number of numbers in all tensors, those of base and adapter."""
        shapes: list[list[int]] = [entry["shape"] for entry in self.tensors().values()]
        return self.base.numbers() + sum(math.prod(shape) for shape in shapes)

    def tensors(self) -> dict[str, dict[str, Any]]:
        """The header of the adapter's weights, by name. CheckpointError for a damaged file."""
        return tensors_of(self.folder / WEIGHTS)[1]

    def attached(self, model: Any) -> Any:
        """``model``, which is the base's, with the adapter: in its modules, or merged into its weights.

        CheckpointError if the adapter does not fit.
        """
        with importing():
            import torch
            from peft import PeftModel
            from peft.utils import get_peft_model_state_dict
            from safetensors import safe_open

        header = self.tensors()
        state = model.state_dict()
        beside = {
            name: state[_in_base(name)].clone()
            for name in header
            if not is_adapter_path(name.split(".")) and _in_base(name) in state
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is missing or left over is an error below
                adapted = PeftModel.from_pretrained(
                    model, str(self.folder), adapter_name=NAME, autocast_adapter_dtype=False, torch_device="cpu"
                )
                own = get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
        except Exception as error:  # peft may raise anything for a configuration that does not fit
            reason = str(error) or type(error).__name__
            raise CheckpointError(f"adapter {self.folder} does not fit {self.base.folder}: {reason:.1000}") from error
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            for name, tensor in beside.items():
                if name not in own and torch.equal(file.get_tensor(name).to(tensor), tensor):
                    del header[name]  # peft saves embeddings of the base beside an adapter of these
        shapes = {name: list(tensor.shape) for name, tensor in own.items()}
        other = sorted(
            name for name in {*header, *shapes} if header.get(name, {"shape": None})["shape"] != shapes.get(name)
        )
        if other:
            raise CheckpointError(
                f"adapter {self.folder} does not fit {self.base.folder}: its tensors are not those of its "
                f"configuration, or it brings more than the adapter (an embedding that was resized): "
                f"{', '.join(other[:4])}{f' and {len(other) - 4} more' if len(other) > 4 else ''}. If it is the right "
                f"base: {MERGE_ADVICE}"
            )
        if self.merged:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return adapted.merge_and_unload(safe_merge=True)
        return adapted.get_base_model()


def find_adapter(
    folder: Path, base: str | Path | None, use: AdapterUse | None, progress: Progress | None = None
) -> AdapterCheckpoint | None:
    """The adapter in ``folder`` on its base; None if the folder has none, or ``use`` is ``ignore``.

    ``base`` is a folder or a hub id; None: the folder that the adapter's configuration names. UsageError if it is not
    said what to take of a folder with a model and an adapter, or which base; CheckpointError for an adapter that is not
    supported.
    """
    if use is not None and use not in get_args(AdapterUse):
        raise UsageError(f"`adapter` {use!r} is unknown; known: {', '.join(get_args(AdapterUse))}")
    path = folder / ADAPTER_CONFIG
    whole = holds_model(folder)
    if not path.is_file():
        if base is not None or use is not None:
            option = "base" if base is not None else "adapter"
            raise UsageError(f"`{option}` belongs to an adapter, and checkpoint {folder} has no {ADAPTER_CONFIG}")
        return None
    if use == "ignore":
        if not whole:
            raise UsageError(f"`adapter=ignore`: checkpoint {folder} is an adapter alone; nothing is left without it")
        if base is not None:
            raise UsageError("`base` is that of an adapter, which `adapter=ignore` leaves out: give one of them")
        return None
    if whole and base is None and use is None:
        raise UsageError(
            f"checkpoint {folder} holds a model and an adapter: choose with `adapter`: only (gradients of the adapter "
            "on that model), merge (the adapter merged into it), or ignore (the model without it)"
        )
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            f"checkpoint {folder} is an adapter, which is read with peft: pip install 'ghoststore[peft]'; or "
            f"{MERGE_ADVICE}"
        )
    check_files(folder, "adapter")
    config = read_object(path)
    if not (folder / WEIGHTS).is_file():
        why = f" but {PICKLE}, a pickle, which can run code when it is read" if (folder / PICKLE).exists() else ""
        raise CheckpointError(f"adapter {folder} has no {WEIGHTS}{why}; save it again: model.save_pretrained(folder)")
    merged = use == "merge"
    refuse_unsupported(f"adapter {folder}", config, merged=merged)
    found = AdapterCheckpoint(folder, config, _base(folder, config, base, progress, whole=whole), merged)
    _refuse_ranks(found)
    return found


def _base(
    folder: Path, config: Mapping[str, Any], given: str | Path | None, progress: Progress | None, *, whole: bool
) -> Checkpoint:
    """The base of the adapter in ``folder``: ``given``, else the model beside it, else what its configuration names."""
    if given is not None:
        place = locate(given, progress)
    elif whole:
        place = folder
    else:
        named = config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise UsageError(f"{folder / ADAPTER_CONFIG} names no base: give `base`, the folder of the model")
        # Relative paths are those that a training was given; a folder that was moved as a whole keeps its own.
        places = [path for path in (folder / named, Path(named)) if exists(path, "base") and path.is_dir()]
        if not places:
            raise UsageError(
                f"{folder / ADAPTER_CONFIG} names {named!r:.200} as its base: no folder here, and nothing is fetched "
                f"because an adapter says so; give `base`: the folder of that model, or `base={named:.200}` if it is "
                "the hub's"
            )
        place = places[0]
    if not holds_model(place) and (place / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"base {place} of adapter {folder} is an adapter itself: merge that one into its base, {MERGE_ADVICE} as "
            "`base`"
        )
    return whole_model(place)


def refuse_unsupported(what: str, config: Mapping[str, Any], *, merged: bool) -> None:
    """CheckpointError for an adapter (called ``what``) whose model, or whose gradients, would not be the right ones."""
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise CheckpointError(f"{what} is of the type {kind!r:.40}, and LoRA is read; {MERGE_ADVICE} if it can be")
    beginning = config.get("init_lora_weights", True)
    if beginning not in BEGINNINGS:
        raise CheckpointError(
            f"{what} was begun with init_lora_weights={beginning!r:.40}, which changes the weights of the base: "
            f"{MERGE_ADVICE}"
        )
    task = getattr(config.get("task_type"), "value", config.get("task_type"))
    if task not in TASKS:
        raise CheckpointError(
            f"{what} is for the task {task!r:.40}; expected one for causal language models, CAUSAL_LM"
        )
    odd = [name for name in configured(config) if name not in UNDERSTOOD]
    strange = [name for name in odd if name not in MERGEABLE]
    if strange:
        raise CheckpointError(
            f"{what} has {strange[0]}={config[strange[0]]!r:.80}, which is not understood here: {MERGE_ADVICE}"
        )
    if odd and not merged:
        name = odd[0]
        why = (
            "it trains biases of the base, whose gradients are had only together with those of their weights"
            if name == "bias"
            else "the gradients of such an adapter alone are not known to be exact"
        )
        raise CheckpointError(
            f"{what} has {name}={config[name]!r:.80}: {why}. Give `adapter=merge` for the gradients of the merged "
            "weights"
        )


def _refuse_ranks(found: AdapterCheckpoint) -> None:
    """CheckpointError for a rank that no tensor of the adapter has: modules of that size would be made."""
    config = found.config
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    longest = max((size for entry in found.tensors().values() for size in entry["shape"]), default=0)
    for rank in ranks:
        if not isinstance(rank, int) or not 0 < rank <= longest:
            raise CheckpointError(
                f"{found.folder / ADAPTER_CONFIG}: a rank is {rank!r:.40}, and the longest axis of the adapter's "
                f"tensors is {longest:,}: it is not their configuration"
            )


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """A folder with the model in ``folder`` and without an adapter beside it, which transformers would load as well."""
    if not (folder / ADAPTER_CONFIG).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ghoststore-") as temporary:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (ADAPTER_CONFIG, WEIGHTS, PICKLE):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)
