"""Weights of a checkpoint that its model has no place for. transformers leaves them out, and says so in a warning."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

SHOWN, LENGTH = 3, 200
"""Names in a message, and characters of one."""


def unused_words(model: Any, keys: Collection[str]) -> str:
    """What a user hears of ``keys``, names of weights that ``model`` has no place for."""
    more = len(keys) - SHOWN
    shown = ", ".join(f"{key:.{LENGTH}}" for key in sorted(keys)[:SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{type(model).__name__} has no place for weights that its files hold: {shown}"


def cut_off(model: Any, keys: Collection[str]) -> list[str]:
    """Those of ``keys`` that are of further members of a list of layers that ``model`` has: its files hold layers that
    its configuration does not. Those that predict later tokens (DeepSeek's) stand behind the others, and are none.
    """
    from torch import nn

    prefix = getattr(model, "base_model_prefix", "")
    later = getattr(model.config, "num_nextn_predict_layers", 0)
    behind = later if isinstance(later, int) else 0
    counts = {name: len(module) + behind for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    counts |= {name.removeprefix(f"{prefix}."): count for name, count in counts.items()}  # files of a model's inside
    return sorted(key for key in keys if any(number >= counts.get(of, math.inf) for of, number in _numbers(key)))


def _numbers(key: str) -> Iterator[tuple[str, int]]:
    """(name of the list, place in it) for each number between the dots of ``key``."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:place]), int(part)
