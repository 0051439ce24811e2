"""Limits for checkpoints: the sizes in a configuration are compared with the tensors before a model is made of it.

A configuration of a few bytes may ask for a billion layers, and a class of transformers makes lists, modules and
numbers for whatever it reads there.
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
"""Most bytes of a file beside the weights. The largest such file is the vocabulary."""
LARGEST_CONFIG = 16 << 20
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")
_TEMPLATES = "additional_chat_templates"
_SMALL = (
    CONFIG,
    ADAPTER_CONFIG,
    "added_tokens.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Files with one JSON object that transformers reads by itself."""

MOST_COUNT = 1 << 16
"""Largest number of layers, heads, experts or labels, unless a checkpoint has more tensors or longer ones."""
_COUNTS = ("depth", "expert", "head", "label", "layer", "stage")
"""Words in the names of fields whose value is the length of a list that a configuration makes."""
_CODE = "implementation"
"""Word in the names of fields that say which kernel computes attention or experts."""

# A model may have several parameters for one tensor (tied, or split when it is loaded), but never this many.
PARAMETERS_PER_TENSOR, SPARE_PARAMETERS = 64, 10_000
NUMBERS_PER_NUMBER, SPARE_NUMBERS = 8, 1 << 24
LARGEST_BUFFER, MOST_IN_BUFFERS = 1 << 28, 1 << 30
"""Most numbers in one mask or table of positions, and in all of them together."""


def check_files(folder: Path, what: str = "checkpoint") -> None:
    """CheckpointError for a file of a checkpoint or a tokenizer that is no regular file (a pipe, a device), that is too
    large, or that should hold a JSON object and does not. Links are followed, because the cache of the hub consists of
    them.
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
    """The object in a JSON file of a checkpoint. CheckpointError for anything else, and for a file that is
    too large.
    """
    try:
        value = parse_json(read_bounded(path, LARGEST_CONFIG))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!s:.300}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {value!r:.40}; a JSON object is expected")
    return value


def check_config(path: Path, shapes: Sequence[Sequence[int]]) -> None:
    """CheckpointError for a configuration that does not fit weights of these ``shapes``, or that asks for code."""
    largest = max((size for shape in shapes for size in shape), default=0)
    most = max(MOST_COUNT, len(shapes), largest)
    for name, value in _fields(read_object(path)):
        last = name.rpartition(".")[2]
        if any(word in last for word in _COUNTS) and isinstance(value, int | float) and value > most:
            raise CheckpointError(
                f"{path}: {name} is {value!r:.40}, and the weights have {len(shapes):,} tensors, none longer than "
                f"{largest:,}: it is not the configuration of these weights"
            )
        # If a name has a slash, transformers fetches a kernel from the hub and runs it.
        if _CODE in name and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{path}: {name} is {value!r:.80}, code that would be fetched from the hub and run; remove the entry, "
                "and choose a kernel of torch with `attn_implementation`"
            )


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a JSON value: everything that is neither an object nor a list."""
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
    """While open, CheckpointError as soon as a model that is being made has more parameters or numbers than tensors of
    these ``shapes`` can fill, or too large masks and tables.

    Only what is on torch's ``meta`` device is counted, where transformers makes a model before it has memory.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_parameter_registration_hook,
    )

    numbers = sum(math.prod(shape) for shape in shapes)
    most = PARAMETERS_PER_TENSOR * len(shapes) + SPARE_PARAMETERS
    most_numbers = NUMBERS_PER_NUMBER * numbers + SPARE_NUMBERS
    counts = {"parameters": 0, "numbers": 0, "buffers": 0}

    def refuse(what: str) -> None:
        raise CheckpointError(
            f"checkpoint {folder}: its {CONFIG} asks for a model with more than {what}; the weights are "
            f"{len(shapes):,} tensors of {numbers:,} numbers"
        )

    def check_parameter(module: Any, name: str, parameter: Any) -> None:
        if parameter is None or not parameter.is_meta:
            return  # a loaded weight, which replaces a parameter
        counts["parameters"] += 1
        counts["numbers"] += parameter.numel()
        if counts["parameters"] > most:
            refuse(f"{most:,} parameters")
        if counts["numbers"] > most_numbers:
            refuse(f"{most_numbers:,} numbers")

    def check_buffer(module: Any, name: str, buffer: Any) -> None:
        if buffer is None or not buffer.is_meta:
            return
        counts["buffers"] += buffer.numel()
        if buffer.numel() > LARGEST_BUFFER or counts["buffers"] > MOST_IN_BUFFERS:
            refuse(f"{LARGEST_BUFFER:,} numbers in one mask or table, or {MOST_IN_BUFFERS:,} in all")

    hooks = [
        register_module_parameter_registration_hook(check_parameter),
        register_module_buffer_registration_hook(check_buffer),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
