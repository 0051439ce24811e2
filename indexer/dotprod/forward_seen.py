"""The forward pass of the first training batch: what went in, what came out, and how to run it once more.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ghoststore.errors import UsageError
from indexer.encode.modes import autocast_dtype, buffers_kept, device_type, devices_of

_LABELS = ("labels", "targets", "target")
"""What models call them."""

_NO_WORDS = re.compile(r"mask|type|position|cache", re.IGNORECASE)
"""Integers (B, T) that are no tokens."""

_OF_LABELS = (*_LABELS, "shift_labels", "num_items_in_batch")


@dataclass(frozen=True, slots=True)
class Start:
    """What a forward pass starts from, apart from weights and input."""

    random: Tensor
    random_of_cuda: dict[int, Tensor]
    autocast: torch.dtype | None

    @classmethod
    def now(cls, model: nn.Module) -> Start:
        """The present one."""
        cuda = {index: torch.cuda.get_rng_state(index) for index in devices_of(model)}
        return cls(torch.get_rng_state(), cuda, autocast_dtype(model))


@dataclass(frozen=True, slots=True)
class Seen:
    """A forward pass of the model itself."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    versions: dict[int, int]
    """Of each tensor in the output, by id: a loss that works in place uses up the logits."""
    start: Start

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, start: Start) -> Seen:
        """Right after the forward pass."""
        versions = {id(tensor): tensor._version for tensor in tensors_in(output).values()}
        return cls(args, kwargs, output, versions, start)

    def unchanged(self, tensor: Tensor) -> bool:
        """Whether it still holds what the model put there."""
        return self.versions.get(id(tensor)) == tensor._version


def tensors_in(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by their names; of a tuple, by their places."""
    if isinstance(output, Tensor):
        items: Any = {"the output": output}.items()
    elif isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = ((f"output[{place}]", value) for place, value in enumerate(output))
    else:
        items = getattr(output, "__dict__", {}).items()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def logits_in(output: Any, labels: Tensor) -> list[Tensor]:
    """What may be the logits for ``labels`` (B, T): (B, T, V) or (B, T − 1, V), a tensor of that name first."""
    named = tensors_in(output)
    batch, length = labels.shape
    largest = int(labels.max()) if labels.numel() else 0
    fitting = [
        (name != "logits", place, tensor)
        for place, (name, tensor) in enumerate(named.items())
        if tensor.dim() == 3
        and tensor.is_floating_point()
        and tensor.shape[-1] > largest
        and tensor.shape[0] == batch
        and tensor.shape[1] in (length, length - 1)
    ]
    return [tensor for _, _, tensor in sorted(fitting, key=lambda one: one[:2])]


def labels_by_name(model: nn.Module, seen: Seen, batch: int) -> Tensor | None:
    """The labels (B, T) of tokens that the model itself was given by a name for labels; None if its output shows that
    it is no language model, whatever they are labels of.
    """
    given = _given(model, seen)
    for name in _LABELS:
        labels = given.get(name)
        if _are_words(labels, batch):
            return labels if _may_be_of_words(seen.output, labels) else None
    return None


def words_in(model: nn.Module, seen: Seen, batch: int) -> list[Tensor]:
    """The tokens (B, T) that went in, by whatever name, the last first, where logits (B, T, V) for them came out: it
    seems to be a language model. Labels come after the input, as a rule.
    """
    return [
        words
        for name, words in _given(model, seen).items()
        if _are_words(words, batch) and not _NO_WORDS.search(name) and logits_in(seen.output, words)
    ][::-1]


def items_in(seen: Seen) -> float | None:
    """``num_items_in_batch``, where the model was given it: what its loss is divided by."""
    items = seen.kwargs.get("num_items_in_batch")
    return None if items is None else float(items)


def _given(model: nn.Module, seen: Seen) -> dict[str, Any]:
    names = _parameters_of(model)
    names += [f"args[{place}]" for place in range(len(names), len(seen.args))]
    return {**dict(zip(names, seen.args, strict=False)), **seen.kwargs}


def _are_words(given: Any, batch: int) -> TypeGuard[Tensor]:
    return (
        isinstance(given, Tensor)
        and given.dim() == 2
        and len(given) == batch
        and not given.is_floating_point()
        and given.dtype != torch.bool
    )


def _may_be_of_words(output: Any, labels: Tensor) -> bool:
    """Whether the output has logits for the tokens ``labels`` (B, T), in whatever order, or nothing but losses."""
    batch, length = labels.shape
    places = (length, length - 1)
    wide = [tensor for tensor in tensors_in(output).values() if tensor.dim() > 1 and tensor.is_floating_point()]
    return not wide or any(
        (tensor.dim() == 3 and batch in tensor.shape and any(n in tensor.shape for n in places))
        or (tensor.dim() == 2 and len(tensor) != batch and len(tensor) in [batch * n for n in places])
        for tensor in wide
    )


@torch.no_grad()
def output_without_labels(model: nn.Module, seen: Seen) -> Any:
    """The model's forward pass once more, without labels, from the same random state.

    UsageError if it does not run without them.
    """
    names = _parameters_of(model)
    args = [None if names[i : i + 1] and names[i] in _OF_LABELS else value for i, value in enumerate(seen.args)]
    kwargs = {name: value for name, value in seen.kwargs.items() if name not in _OF_LABELS}
    with replayed(model, seen.start):
        try:
            return model.forward(*args, **kwargs)  # not __call__: the hooks have had their turn
        except Exception as error:
            raise UsageError(
                f"the forward pass of {type(model).__name__} does not run without labels ({error!r:.200}), and with "
                "them it returns no logits that its loss could be held against; say what the loss is of, "
                "watch(loss, weights=…, batch=batch), or trust it: check=False"
            ) from error


@contextmanager
def replayed(model: nn.Module, start: Start) -> Iterator[None]:
    """As it was at ``start``: random state and autocast. At the end both, and every buffer, are as before."""
    with (
        buffers_kept(model),
        torch.random.fork_rng(devices=devices_of(model)),
        torch.autocast(device_type(model), dtype=start.autocast, enabled=start.autocast is not None),
    ):
        torch.set_rng_state(start.random)
        for index, state in start.random_of_cuda.items():
            torch.cuda.set_rng_state(state, index)
        yield


def _parameters_of(model: nn.Module) -> list[str]:
    """Names of what ``forward`` takes by place."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, given in inspect.signature(model.forward).parameters.items() if given.kind in kinds]
