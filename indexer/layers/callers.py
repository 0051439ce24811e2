"""Which module is called with the rows of samples for a parameter that no formula knows: its own, or one around it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from functools import cache
from itertools import pairwise

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

TAKEN = re.compile(
    r"self\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device|shape|size|data|ndim|is_|requires_grad)|\s*=[^=])"
)
BY_PARENT = frozenset({"relative_attention_bias", "dt_proj", "Llama4TextExperts"})
"""Names and classes of modules that are not called with the rows of samples."""
WHOLE = (nn.MultiheadAttention,)
"""Modules that use the weights of the modules in them without calling these. So do peft's of DoRA (a ``lora_variant``),
which call them with the identity as well.
"""
NOT_CALLED = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, ParametrizationList)
"""Modules that hold parameters but are not called with samples: the module around them is."""


def replayed_parameters(model: nn.Module, handled: Collection[str]) -> dict[str, tuple[str, ...]]:
    """By module, the names in it of the parameters that it is run again for.

    These are the parameters of modules outside ``handled`` (names), unless a handled module inside shares them: BERT's
    head has the bias of the decoder in it. ``model`` itself is never run again: parameters that only it uses are not
    among the results.
    """
    users: dict[int, list[str]] = {}
    for name in handled:
        for p in model.get_submodule(name)._parameters.values():
            users.setdefault(id(p), []).append(name)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        inside = f"{name}." if name else ""
        own = [
            key
            for key, p in module._parameters.items()
            if p is not None and not any(user.startswith(inside) for user in users.get(id(p), []))
        ]
        if name in handled or not own:
            continue
        owner = caller_of(model, name) if name else ""
        if owner:
            inner = name[len(owner) + 1 :]
            found.setdefault(owner, []).extend(f"{inner}.{key}" if inner else key for key in own)
    return _each_once(model, found)


def _each_once(model: nn.Module, found: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """``found`` without a parameter's further names in a module, or in modules inside: where a module runs again, all
    uses of the parameter in it count.
    """
    owners: dict[int, list[str]] = {}
    once: dict[str, tuple[str, ...]] = {}
    for name in sorted(found, key=lambda name: name.count(".")):
        keys = []
        for key in found[name]:
            seen = owners.setdefault(id(model.get_submodule(name).get_parameter(key)), [])
            if not any(f"{name}.".startswith(f"{owner}.") for owner in seen):
                seen.append(name)
                keys.append(key)
        if keys:
            once[name] = tuple(keys)
    return {name: once[name] for name in found if name in once}


def caller_of(model: nn.Module, name: str) -> str:
    """The module at ``name``, or the nearest around it that is called with samples; "" if that is the model."""
    parts = name.split(".")
    for stop in range(1, len(parts)):
        if _is_whole(model.get_submodule(".".join(parts[:stop]))):
            return ".".join(parts[:stop])
    name = _list_of_experts(name) or name
    if _used_by_parent(model, name):
        name = name.rpartition(".")[0]
    while name and not _called_with_samples(model.get_submodule(name)):
        name = name.rpartition(".")[0]
    return name


def _is_whole(module: nn.Module) -> bool:
    return isinstance(module, WHOLE) or bool(getattr(module, "lora_variant", None))


def _list_of_experts(name: str) -> str | None:
    """The list of experts that the module at ``name`` is in; None if it is in none."""
    parts = name.split(".")
    for place, (part, after) in enumerate(pairwise(parts)):
        if part == "experts" and (after.isdigit() or after.startswith("expert_")):
            return ".".join(parts[: place + 1])
    return None


def _called_with_samples(module: nn.Module) -> bool:
    if isinstance(module, NOT_CALLED):
        return type(module).forward not in (nn.Module.forward, ParametrizationList.forward)
    return "expert_size" not in inspect.signature(module.forward).parameters  # rows in the order of experts


def is_part_of_another(model: nn.Module, name: str) -> bool:
    """Whether the module at ``name`` is not called with the rows of samples, so that one around it must run again: an
    expert of a list, which is called with the tokens that a router picked, or a part of torch's attention.
    """
    if _list_of_experts(name) is not None or _used_by_parent(model, name):
        return True
    return _is_whole(model.get_submodule(caller_of(model, name)))


def _used_by_parent(model: nn.Module, name: str) -> bool:
    """Whether the module around the one at ``name`` takes its weights and does not call it, calls it with a table of
    positions (T5), or with the rows of all experts (Llama 4).
    """
    parent, _, child = name.rpartition(".")
    if not parent:
        return False
    module = model.get_submodule(name)
    if isinstance(module, nn.Conv1d) and type(module).forward is nn.Conv1d.forward:
        return not isinstance(
            model.get_submodule(parent), (nn.Sequential, nn.ModuleList)
        )  # mixers call it now and then
    kind = type(module).__name__
    return child in BY_PARENT or kind in BY_PARENT or child in weights_taken(type(model.get_submodule(parent)))  # type: ignore[arg-type]


@cache
def weights_taken(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes whose weight or bias the methods of ``kind`` use without calling them; none without source."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    source = re.sub(r"isinstance\(self\.\w+\.\w+", "", source)
    found = set()
    for method in re.split(r"^    (?:async )?def ", source, flags=re.MULTILINE)[1:]:
        if not re.match(r"_*(init|tie|reset|set|get|prune|resize)", method):
            found |= {match[1] for match in TAKEN.finditer(method)}
    return frozenset(child for child in found if not re.search(rf"self\.{child}\(", source))
