"""What a checkpoint says of its sizes, held against the tensors that it has, before anything is made of it.

A configuration of a few bytes may ask for a billion layers: a class of transformers makes lists, modules and numbers of
whatever it reads there.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghoststore.errors import CheckpointError
from ghoststore.store.base.opening import parse_json, read_bounded

LARGEST_FILE = 512 << 20
"""Of the files beside the weights: the largest is the vocabulary."""
LARGEST_CONFIG = 16 << 20
CONFIG = "config.json"
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
_TEMPLATES = "additional_chat_templates"
_SMALL = (
    CONFIG,
    "adapter_config.json",
    "added_tokens.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Files that hold one JSON object, and that transformers reads by itself."""

MOST_COUNT = 1 << 16
"""Of layers, heads, experts or labels, where a checkpoint has fewer tensors and smaller ones."""
_COUNTS = ("depth", "expert", "head", "label", "layer", "stage")
"""Words in the names of fields that configurations make lists of, as long as the number says."""
_CODE = "implementation"
"""In the names of fields that say which kernel computes attention, or experts."""

# A model may have several parameters for a tensor (tied, or cut when it is loaded), never this many.
PARAMETERS_PER_TENSOR, SPARE_PARAMETERS = 64, 10_000
NUMBERS_PER_NUMBER, SPARE_NUMBERS = 8, 1 << 24
LARGEST_BUFFER, MOST_IN_BUFFERS = 1 << 28, 1 << 30
"""Numbers of a mask or a table of positions, and of all of them."""


def check_files(folder: Path, what: str = "checkpoint") -> None:
    """CheckpointError for a file of a checkpoint or a tokenizer that is none (a pipe, a device), that is too large, or
    that should hold a JSON object and does not. Links lead where they may: the cache of the hub is made of them.
    """
    for entry in [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")]:
        if not entry.name.endswith(_SUFFIXES):
            continue
        try:
            status = os.stat(entry)
        except OSError as error:
            raise CheckpointError(f"{what} {folder}: {entry.name} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{what} {folder}: {entry.name} is a pipe or a device; a file is expected there")
        if not entry.name.endswith(".safetensors") and status.st_size > LARGEST_FILE:
            raise CheckpointError(
                f"{what} {folder}: {entry.name} has {status.st_size:,} bytes; at most {LARGEST_FILE:,} are read"
            )
    for name in _SMALL:
        if (folder / name).is_file():
            read_object(folder / name)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. CheckpointError for anything else, and for too much of it."""
    try:
        value = parse_json(read_bounded(path, LARGEST_CONFIG))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!s:.300}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {value!r:.40}; a JSON object is expected")
    return value


def check_config(path: Path, shapes: Sequence[Sequence[int]]) -> None:
    """CheckpointError for a configuration that asks for more than tensors of these ``shapes`` can be, or for code."""
    largest = max((size for shape in shapes for size in shape), default=0)
    most = max(MOST_COUNT, len(shapes), largest)
    for name, value in _fields(read_object(path)):
        last = name.rpartition(".")[2]
        if any(word in last for word in _COUNTS) and isinstance(value, int | float) and value > most:
            raise CheckpointError(
                f"{path}: {name} is {value!r:.40}, and the weights have {len(shapes):,} tensors, none longer than "
                f"{largest:,}: it is not the configuration of these weights"
            )
        # transformers fetches a kernel from the hub, and runs it, where a name has a slash.
        if _CODE in name and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{path}: {name} is {value!r:.80}, code that would be fetched from the hub and run; remove the entry, "
                "and choose a kernel of torch with `attn_implementation`"
            )


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a JSON value that is neither an object nor a list."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _fields(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _fields(inner, name)
    else:
        yield name, value


@contextmanager
def bounded_making(folder: Path, shapes: Sequence[Sequence[int]]) -> Iterator[None]:
    """A model that is made inside, without memory yet (on torch's ``meta`` device), has no more parameters and numbers
    than tensors of these ``shapes`` can fill, and masks and tables of bounded size: CheckpointError as soon as it has.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_parameter_registration_hook,
    )

    numbers = sum(math.prod(shape) for shape in shapes)
    most = PARAMETERS_PER_TENSOR * len(shapes) + SPARE_PARAMETERS
    most_numbers = NUMBERS_PER_NUMBER * numbers + SPARE_NUMBERS
    made = {"parameters": 0, "numbers": 0, "buffers": 0}

    def refuse(what: str) -> None:
        raise CheckpointError(
            f"checkpoint {folder}: its {CONFIG} asks for a model with more than {what}; the weights are "
            f"{len(shapes):,} tensors of {numbers:,} numbers"
        )

    def see(module: Any, name: str, parameter: Any) -> None:
        if parameter is None or not parameter.is_meta:
            return  # the weights themselves, put in their places
        made["parameters"] += 1
        made["numbers"] += parameter.numel()
        if made["parameters"] > most:
            refuse(f"{most:,} parameters")
        if made["numbers"] > most_numbers:
            refuse(f"{most_numbers:,} numbers")

    def see_buffer(module: Any, name: str, buffer: Any) -> None:
        if buffer is None or not buffer.is_meta:
            return
        made["buffers"] += buffer.numel()
        if buffer.numel() > LARGEST_BUFFER or made["buffers"] > MOST_IN_BUFFERS:
            refuse(f"{LARGEST_BUFFER:,} numbers in one mask or table, or {MOST_IN_BUFFERS:,} in all")

    hooks = [
        register_module_parameter_registration_hook(see),
        register_module_buffer_registration_hook(see_buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
